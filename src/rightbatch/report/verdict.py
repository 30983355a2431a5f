"""All the words of a report, made once from ``Findings`` as plain data; the terminal and the page only lay them out."""

from dataclasses import replace
from datetime import datetime

from rightbatch.records.estimates import MemoryCurve, NoiseScale, Status, ThroughputPoint, TradeoffPoint
from rightbatch.records.plan import BatchPlan, Findings, Recommendation
from rightbatch.report import branch_section, decision_sections, device_section, lr_section, measured_sections
from rightbatch.report.document import KeyNumber, Section, SizeRow, Verdict
from rightbatch.report.phrases import estimate, listed, number, percent, plain, split
from rightbatch.training.progress_words import plan_words
from rightbatch.units import format_bytes, format_number

_REMEDY_NOTHING_FITS = (
    "Raise the limit, use a smaller model or input, try --precision bf16, or recompute activations (torch.utils.checkpoint)."
)


def build_verdict(findings: Findings, *, now: datetime | None = None) -> Verdict:
    """Put the findings into words.

    Args:
        findings: What one run concluded.
        now: An aware time, to say how old the measurements are; none says only when they were taken.
    """
    return Verdict(
        status=findings.recommendation.status,
        workload=plain(findings.workload.name),
        answer=answer_line(findings),
        headline=headline(findings),
        lead=_lead(findings),
        key_numbers=_key_numbers(findings),
        sizes=_size_rows(findings),
        sections=_sections(findings, now),
    )


def answer_line(findings: Findings) -> str:
    """Return the answer as one line: ``batch 512 = micro 128 x accumulate 4, lr 0.2 (from 0.1 @ 128) · ceiling 1640 · knee 128``.

    What was not measured is left out. A status other than ``ok`` ends the line, so that nobody takes the size for a clear answer.
    """
    recommendation, memory, speed = findings.recommendation, findings.memory, findings.step_time
    if recommendation.status == "nothing_fits":
        need = (
            f": one sample needs {format_bytes(memory.bytes_at_one)}, the limit is {format_bytes(memory.limit.limit_bytes)}"
            if memory
            else ""
        )
        return f"nothing fits{need}"
    parts = [_plan_words(recommendation.plan, findings)] if recommendation.plan else []
    if memory is not None and memory.ceiling is not None:
        parts.append(f"ceiling {_ceiling(memory)}")
    if speed is not None and speed.knee is not None:
        parts.append(f"knee {speed.knee}")
    noise = _noise(findings.noise_scale) if findings.noise_scale else ""
    if noise:
        parts.append(f"noise scale {noise}")
    if recommendation.status != "ok" and not _memory_alone(findings):
        parts.append(recommendation.status)
    return " · ".join(parts)


def headline(findings: Findings) -> str:
    """Return the answer as one sentence for people."""
    recommendation, memory = findings.recommendation, findings.memory
    plan = recommendation.plan
    if recommendation.status == "nothing_fits":
        return "Not even one sample fits in memory."
    if plan is None:
        if _memory_alone(findings) and memory is not None:
            bound = "" if memory.ceiling_is_limit else "at least "
            return f"The largest micro-batch that fits is {bound}{memory.ceiling}."
        return "No batch size can be recommended yet."
    size = f"batches of {plan.global_batch_size}"
    if recommendation.status == "unstable":
        return f"Too unsteady to rely on: this run points to {size}."
    if recommendation.status == "inconclusive":
        open_point = "the hardware alone chose it" if recommendation.evidence_level == 0 else "the measurements leave the best size open"
        return f"Start with {size}{_split_words(plan)}: {open_point}."
    return f"Train with {size}{_split_words(plan)}{_lr_words(plan)}."


def _plan_words(plan: BatchPlan, findings: Findings) -> str:
    text = f"batch {plan_words(plan)}"
    if plan.lr is None:
        return text
    origin = _lr_origin(plan, findings)
    return f"{text}, lr {number(plan.lr)}" + (f" ({origin})" if origin else "")


def _lr_origin(plan: BatchPlan, findings: Findings) -> str:
    """Say which rate it was scaled from, whether that one comes from a sweep or a range test, and whether several were trained."""
    lr, workload = findings.recommendation.lr, findings.workload
    if lr.base_lr is None:
        return ""
    parts = [] if lr.base_batch_size in {None, plan.global_batch_size} else [f"from {number(lr.base_lr)} @ {lr.base_batch_size}"]
    if findings.swept is not None:
        parts.append("swept")
    elif lr.base_is_tested:
        parts.append("tested" if workload.optimizer_given else f"tested with {plain(workload.optimizer)}")
    if lr.over_rule is not None:
        parts.append("trained")
    return ", ".join(parts)


def _split_words(plan: BatchPlan) -> str:
    micro = (
        f"{plan.accumulation_steps} micro-batches of {plan.micro_batch_size}" if plan.accumulation_steps > 1 else f"{plan.micro_batch_size}"
    )
    if plan.world_size > 1:
        return f" ({micro} on each of {plan.world_size} ranks)"
    return f" ({micro})" if plan.accumulation_steps > 1 else ""


def _lr_words(plan: BatchPlan) -> str:
    return "" if plan.lr is None else f" at learning rate {number(plan.lr)}"


def _ceiling(memory: MemoryCurve) -> str:
    return f"{memory.ceiling}" if memory.ceiling_is_limit else f">= {memory.ceiling}"


def _noise(noise: NoiseScale) -> str:
    if noise.status is Status.AT_LEAST and noise.low is not None:
        return f">= {number(noise.low)}"
    if noise.value is None or noise.low is None or noise.high is None:
        return ""
    return f"{number(noise.value)} [{number(noise.low)}, {number(noise.high)}]"


def _memory_alone(findings: Findings) -> bool:
    """Tell whether the memory is all that was asked for."""
    return (
        findings.memory is not None and findings.step_time is None and findings.noise_scale is None and findings.recommendation.plan is None
    )


def _lead(findings: Findings) -> tuple[str, ...]:
    recommendation = findings.recommendation
    next_step = tuple(plain(sentence) for sentence in recommendation.advice[: decision_sections.leading_advice(findings)])
    if recommendation.status == "nothing_fits":
        return (*_need(findings.memory), *(next_step or (_REMEDY_NOTHING_FITS,)))
    if _memory_alone(findings):
        return ("Speed and gradient noise were not measured, so this is a bound and no recommendation.", *next_step)
    if recommendation.status == "unstable":
        reasons = tuple(plain(reason) for reason in findings.step_time.reasons) if findings.step_time else ()
        return (*next_step[1:], *reasons, "Free the machine, then measure again with --fresh.")
    if recommendation.status == "inconclusive":
        return next_step or ("Measure longer with a larger --budget to decide.",)
    return _lead_ok(recommendation)


def _need(memory: MemoryCurve | None) -> tuple[str, ...]:
    if memory is None:
        return ()
    need, limit = format_bytes(memory.bytes_at_one), format_bytes(memory.limit.limit_bytes)
    peak = f" The peak is in {plain(memory.peak_module)}." if memory.peak_module else ""
    return (f"One sample needs {need}; the limit is {limit} ({plain(memory.limit.source)}).{peak}",)


def _lead_ok(recommendation: Recommendation) -> tuple[str, ...]:
    plan, sizes = recommendation.plan, recommendation.equivalent_batch_sizes
    lead = []
    if recommendation.expected_regret is not None:
        lead.append(f"Expected to cost {percent(recommendation.expected_regret)} more than the best possible size.")
    others = [size for size in sizes if plan is None or size != plan.global_batch_size]
    if others:
        verb = "is" if len(others) == 1 else "are"
        lead.append(f"{listed(others)} {verb} as good within {percent(recommendation.objective.tolerance)}.")
    return tuple(lead)


def _key_numbers(findings: Findings) -> tuple[KeyNumber, ...]:
    recommendation, memory, speed, noise = findings.recommendation, findings.memory, findings.step_time, findings.noise_scale
    plan, keys = recommendation.plan, []
    if plan is not None:
        whole = plan.accumulation_steps * plan.world_size == 1
        note = "in one piece" if whole else "= " + split(plan.micro_batch_size, plan.accumulation_steps, plan.world_size)
        keys.append(KeyNumber(label="batch size", value=str(plan.global_batch_size), note=note))
    if plan is not None and plan.lr is not None:
        keys.append(KeyNumber(label="learning rate", value=number(plan.lr), note=_lr_origin(plan, findings)))
    if memory is not None and memory.ceiling is not None:
        limit = f"micro-batch in {format_bytes(memory.limit.limit_bytes)}"
        keys.append(KeyNumber(label="memory ceiling", value=_ceiling(memory), note=limit))
    if speed is not None and speed.knee is not None:
        best = next((point for point in speed.points if point.micro_batch_size == speed.knee), None)
        rate = f"{estimate(best.samples_per_s)} samples/s" if best else ""
        keys.append(KeyNumber(label="knee", value=str(speed.knee), note=rate))
    if noise is not None and _noise(noise):
        value, _, interval = _noise(noise).partition(" [")
        note = f"95 % interval [{interval}" if interval else "a lower bound"
        keys.append(KeyNumber(label="noise scale", value=value, note=note))
    return tuple(keys)


def _size_rows(findings: Findings) -> tuple[SizeRow, ...]:
    recommendation = findings.recommendation
    chosen = recommendation.plan.global_batch_size if recommendation.plan else None
    equivalent = recommendation.equivalent_batch_sizes
    if findings.tradeoff is not None and findings.tradeoff.points:
        quickest = max(point.samples_per_s for point in findings.tradeoff.points)
        rows = [_tradeoff_row(point, quickest) for point in findings.tradeoff.points]
    elif findings.step_time is not None and findings.step_time.points:
        points = findings.step_time.points
        fastest = max(point.samples_per_s.value or 0.0 for point in points)
        rows = [_speed_row(point, fastest) for point in points]
    else:
        return ()
    return tuple(_marked(row, chosen, equivalent) for row in rows)


def _tradeoff_row(point: TradeoffPoint, quickest: float) -> SizeRow:
    time, samples = point.relative_time.value, point.relative_samples.value
    return SizeRow(
        global_batch_size=point.global_batch_size,
        split=split(point.micro_batch_size, point.accumulation_steps),
        samples_per_s=number(point.samples_per_s),
        relative_time="" if time is None else format_number(time),
        relative_samples="" if samples is None else format_number(samples),
        evidence=point.evidence,
        bar_fraction=point.samples_per_s / quickest if not time else min(1.0, 1 / time),
        mark="",
    )


def _speed_row(point: ThroughputPoint, fastest: float) -> SizeRow:
    rate = point.samples_per_s.value or 0.0
    return SizeRow(
        global_batch_size=point.micro_batch_size,
        split=split(point.micro_batch_size, 1),
        samples_per_s=number(rate) if rate else "unknown",
        relative_time="",
        relative_samples="",
        evidence="measured",
        bar_fraction=rate / fastest if fastest else 0.0,
        mark="",
    )


def _marked(row: SizeRow, chosen: int | None, equivalent: tuple[int, ...]) -> SizeRow:
    if row.global_batch_size == chosen:
        return replace(row, mark="chosen")
    return replace(row, mark="equivalent") if row.global_batch_size in equivalent else row


def _sections(findings: Findings, now: datetime | None) -> tuple[Section, ...]:
    sections = (
        decision_sections.why(findings),
        decision_sections.advice(findings),
        branch_section.branches(findings),
        branch_section.swept(findings),
        decision_sections.sizes(findings),
        measured_sections.memory(findings),
        measured_sections.speed(findings),
        measured_sections.noise(findings),
        lr_section.learning_rate(findings),
        decision_sections.practice(findings),
        device_section.devices(findings),
        decision_sections.change(findings),
        decision_sections.limits(findings),
        decision_sections.provenance(findings, now),
    )
    return tuple(section for section in sections if section is not None)
