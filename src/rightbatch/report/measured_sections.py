"""What was measured, in words: memory, speed, gradient noise."""

from rightbatch.records.estimates import LoaderCurve, MemoryCurve, NoiseScale, StepTimeCurve
from rightbatch.records.measurements import MemoryPoint, Outcome
from rightbatch.records.plan import Findings
from rightbatch.report.document import Section, Table
from rightbatch.report.phrases import estimate, number, percent, plain
from rightbatch.units import format_bytes, format_duration_s

OUTCOMES = {Outcome.RAN: "ran", Outcome.OUT_OF_MEMORY: "out of memory", Outcome.KILLED: "killed", Outcome.OVER_LIMIT: "over the limit"}
"""Words for how an attempt ended."""
CHANGES = {
    "bf16": "bfloat16 autocast",
    "checkpointing": "activation checkpointing",
    "sgd": "plain SGD",
    "sgd with momentum": "SGD with momentum",
    "adam": "Adam",
}
"""Words for the changes that are traced again."""
_SHOWN_HOLDERS = 5


def memory(findings: Findings) -> Section | None:
    """Say what the ceiling is, what stopped the search, and what fills the memory."""
    curve = findings.memory
    if curve is None:
        return None
    sentences = [_ceiling_sentence(curve), *_calibration_sentences(curve)]
    if curve.peak_module or curve.peak_operation:
        place = " in ".join(plain(word) for word in (curve.peak_operation, curve.peak_module) if word)
        sentences.append(f"Memory peaks at {place}.")
    sentences.extend(_other_ceilings(curve))
    sentences.extend(plain(remark) for remark in curve.remarks)
    shares = tuple((share.name, format_bytes(share.size_bytes)) for share in curve.shares if share.size_bytes)
    tables = [Table(caption="At the peak", header=("kind of memory", "size"), rows=shares)] if shares else []
    tables.extend(_holders_and_alternatives(curve))
    if curve.points:
        header = ("micro-batch", "measured", "how it ended")
        tables.append(
            Table(
                caption="Sizes that were tried", header=header, rows=tuple(_memory_row(point) for point in curve.points), behind_chart=True
            )
        )
    return Section(key="memory", title="Memory", sentences=tuple(sentences), tables=tuple(tables))


def _other_ceilings(curve: MemoryCurve) -> list[str]:
    """Say what was proved, and how many samples fit in the other ways of running the model."""
    sentences = []
    proof = curve.certificate
    if proof is not None and proof.holds:
        sentences.append(f"Proved: one sample more, {proof.micro_batch_size}, does not fit ({OUTCOMES[proof.outcome]}).")
    elif proof is not None:
        sentences.append(f"Not proved: {proof.micro_batch_size} samples ran within the limit too, so the ceiling is only a lower bound.")
    if curve.smooth_ceiling is not None and curve.ceiling is not None and curve.smooth_ceiling < curve.ceiling:
        sentences.append(f"Above {curve.smooth_ceiling} the allocator is predicted to free its cache and retry, which slows every step.")
    if curve.accumulation_ceiling is not None and curve.accumulation_ceiling != curve.ceiling:
        sentences.append(f"While gradients are accumulated, micro-batches of up to {curve.accumulation_ceiling} are predicted to fit.")
    if curve.evaluation_ceiling is not None:
        sentences.append(f"Without gradients, evaluation batches of up to {curve.evaluation_ceiling} are predicted to fit.")
    return sentences


def _holders_and_alternatives(curve: MemoryCurve) -> list[Table]:
    tables = []
    if curve.holders:
        rows = tuple(
            (plain(holder.module) or "(outside any module)", plain(holder.operation), format_bytes(holder.size_bytes))
            for holder in curve.holders[:_SHOWN_HOLDERS]
        )
        tables.append(Table(caption="What holds most at the peak", header=("module", "operation", "size"), rows=rows))
    if curve.alternatives:
        rows = tuple(
            (CHANGES[other.change], format_bytes(other.peak_bytes), _predicted(other.predicted_ceiling)) for other in curve.alternatives
        )
        header = ("change", f"memory at {curve.ceiling or 1}", "predicted ceiling")
        tables.append(Table(caption="What a change would do, by tracing again", header=header, rows=rows))
    return tables


def _predicted(ceiling: int | None) -> str:
    return "nothing fits" if ceiling is None else str(ceiling)


def _memory_row(point: MemoryPoint) -> tuple[str, str, str]:
    used = "" if point.used_bytes is None else format_bytes(point.used_bytes)
    return str(point.micro_batch_size), used, OUTCOMES[point.outcome]


def _ceiling_sentence(curve: MemoryCurve) -> str:
    limit = f"{format_bytes(curve.limit.limit_bytes)} ({plain(curve.limit.source)})"
    if curve.ceiling is None:
        return f"One sample needs {format_bytes(curve.bytes_at_one)}; the limit is {limit}."
    if curve.ceiling_is_limit:
        return f"The largest micro-batch that ran within the limit of {limit} is {curve.ceiling}."
    source = "the dataset" if curve.largest_allowed_source == "dataset" else curve.largest_allowed_source
    stop = {"cap": f"{source} allows no more", "budget": "the time budget ended the search"}
    reason = stop.get(curve.stopped_by, "the search stopped there")
    return f"A micro-batch of {curve.ceiling} ran within the limit of {limit}; {reason}, so more may fit."


def _calibration_sentences(curve: MemoryCurve) -> list[str]:
    sentences = []
    if curve.recorded_on == "none":
        sentences.append("No allocation trace could be recorded, so the ceiling was searched for.")
    if curve.ceiling_is_limit and curve.predicted_ceiling is not None and curve.predicted_ceiling > (curve.ceiling or 0):
        sentences.append(f"The calibrated trace lets {curve.predicted_ceiling} fit (extrapolated).")
    measured = sum(point.used_bytes is not None for point in curve.points)
    if curve.calibration_error is not None and measured > 2:
        sentences.append(
            f"Measured and calibrated use differ by {percent(curve.calibration_error)} of the largest at most ({measured} sizes)."
        )
    return sentences


def speed(findings: Findings) -> Section | None:
    """Say where throughput stops growing, what a step costs, and whether the data loader limits."""
    curve = findings.step_time
    if curve is None:
        return None
    stands_above = findings.recommendation.status == "unstable"
    sentences = [] if stands_above else [plain(reason) for reason in curve.reasons]
    sentences.extend(_knee_sentences(curve))
    if curve.fixed_time_s is not None and curve.saturated_samples_per_s is not None:
        fixed, rate = format_duration_s(curve.fixed_time_s), number(curve.saturated_samples_per_s)
        error = "" if curve.fit_error is None else f"; the fit is within {percent(curve.fit_error)}"
        sentences.append(f"A step costs {fixed} however small it is, and large batches approach {rate} samples/s{error}.")
    sentences.append(f"The optimizer's own part of a step takes {format_duration_s(curve.optimizer_time_s)}.")
    if findings.loader is not None:
        sentences.append(_loader_sentence(findings.loader, curve))
        sentences.extend([plain(findings.loader.remark)] if findings.loader.remark else [])
    rows = tuple(
        (str(point.micro_batch_size), estimate(point.step_time_s, format_duration_s), estimate(point.samples_per_s))
        for point in curve.points
    )
    header = ("micro-batch", "step, 95 % interval", "samples/s, 95 % interval")
    tables = (Table(caption="Steps without accumulation", header=header, rows=rows, behind_chart=True),) if rows else ()
    return Section(key="speed", title="Speed", sentences=tuple(sentences), tables=tables)


def _knee_sentences(curve: StepTimeCurve) -> list[str]:
    if curve.knee is None:
        return []
    best = "" if curve.best in {None, curve.knee} else f"; the best was measured at {curve.best}"
    return [f"From a micro-batch of {curve.knee} on, throughput is within 3 % of the best{best}."]


def _loader_sentence(loader: LoaderCurve, curve: StepTimeCurve) -> str:
    rate = loader.samples_per_s.value
    workers = f"{loader.num_workers} worker{'' if loader.num_workers == 1 else 's'}"
    if rate is None:
        return "The data loader's throughput could not be measured."
    fastest = max((point.samples_per_s.value or 0.0 for point in curve.points), default=0.0)
    verdict = "so sizes that the device takes faster wait for it" if rate < fastest else "more than the device can take"
    return f"The data loader with {workers} delivers {estimate(loader.samples_per_s)} samples/s, {verdict}."


def noise(findings: Findings) -> Section | None:
    """Say how noisy the gradient is, with every snapshot."""
    scale = findings.noise_scale
    if scale is None:
        return None
    sentences = [_noise_sentence(scale), *(plain(remark) for remark in scale.remarks)]
    rows = tuple((str(snapshot.samples_seen), estimate(snapshot.noise_scale), str(snapshot.noise_scale.n)) for snapshot in scale.snapshots)
    header = ("samples seen", "noise scale, 95 % interval", "gradients")
    tables = (Table(caption="Snapshots at frozen parameters", header=header, rows=rows, behind_chart=True),) if rows else ()
    return Section(key="noise", title="Gradient noise", sentences=tuple(sentences), tables=tables)


def _noise_sentence(scale: NoiseScale) -> str:
    count = f"from the gradients of {scale.n} samples"
    if scale.value is not None and scale.low is not None and scale.high is not None:
        interval = f"{number(scale.value)} samples, 95 % interval {number(scale.low)} to {number(scale.high)}"
        return f"The simple noise scale is {interval}, {count}."
    if scale.low is not None:
        return f"The simple noise scale is at least {number(scale.low)} samples, {count}; there is no upper bound."
    return f"The noise scale could not be determined {count} ({scale.status.value.replace('_', ' ')})."
