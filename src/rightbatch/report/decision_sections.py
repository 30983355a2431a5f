"""What was decided, in words: why this size, what it costs, what would change it, and where everything comes from."""

from datetime import datetime

from rightbatch.records.estimates import Estimate
from rightbatch.records.plan import Binding, Findings, Goal
from rightbatch.report.document import Section, Table
from rightbatch.report.phrases import estimate, excess, listed, percent, plain, signed_percent
from rightbatch.units import format_ago_s, format_bytes, format_duration_s

GOALS = {
    Goal.TIME: "the time to a target",
    Goal.SAMPLES: "the samples to a target",
    Goal.ENERGY: "the energy to a target",
    Goal.ACCURACY: "generalisation, at a time near the shortest",
}
"""Words for what is asked for."""
_BINDING = {
    Binding.OPTIMUM: "Nothing binds: smaller and larger sizes were possible and are expected to do worse.",
    Binding.MEMORY: "Memory binds: a larger size would do better, but it does not fit.",
    Binding.DATASET: "The dataset binds: a batch cannot hold more samples than there are.",
    Binding.MAX_BATCH: "--max-batch or --max-global-batch binds: a larger size would do better.",
    Binding.LOADER: "The data loader binds: the device could take more samples a second than it delivers.",
    Binding.BUDGET: "The time budget binds: larger sizes could not be timed; a larger --budget may find a better one.",
    Binding.SMALLEST: "The smallest size that was measured is the best; a smaller one may do better still.",
}
_EVIDENCE = {
    0: "The evidence is the hardware's step-time curve alone (level 0 of 3).",
    1: "The evidence is the gradient noise at frozen parameters and along a short pilot run (level 1 of 3).",
    2: "The evidence is the gradient noise along a real run (level 2 of 3).",
    3: "The evidence is training itself: branched probes or a sweep (level 3 of 3).",
}


def why(findings: Findings) -> Section | None:
    """Say what binds, what the evidence is, and how much the choice is expected to lose."""
    recommendation = findings.recommendation
    if recommendation.plan is None:
        return None
    sentences = [f"The goal is {GOALS[recommendation.objective.goal]}."]
    if recommendation.binding_constraint is not None and recommendation.status == "ok":
        sentences.append(_BINDING[recommendation.binding_constraint])
    sentences.append(_EVIDENCE[recommendation.evidence_level])
    if findings.tradeoff is not None and findings.tradeoff.critical_batch_size.value is not None:
        critical = findings.tradeoff.critical_batch_size
        sentences.append(f"The critical batch size is {estimate(critical)} (90 % interval): above it, larger batches save few steps.")
    if recommendation.expected_regret is not None:
        regret = percent(recommendation.expected_regret)
        sentences.append(f"Expected regret: {regret} over the best size, with everything that is uncertain counted in.")
    return Section(
        key="why", title="Why this size" if recommendation.status == "ok" else "What this size rests on", sentences=tuple(sentences)
    )


def leading_advice(findings: Findings) -> int:
    """Return how many sentences of advice stand right under the headline, because there is no clear answer yet.

    Where timings are unstable the first one says so, and gives the reasons that stand there anyway; the second one stands there too if it
    says why there is no noise scale, such as a loss that is not finite.
    """
    recommendation = findings.recommendation
    if recommendation.status == "ok":
        return 0
    without_noise = findings.noise_scale is not None and recommendation.evidence_level == 0
    return min(2 if recommendation.status == "unstable" and without_noise else 1, len(recommendation.advice))


def advice(findings: Findings) -> Section | None:
    """List what the user should know or do."""
    items = tuple(plain(item) for item in findings.recommendation.advice[leading_advice(findings) :])
    return Section(key="advice", title="Good to know", items=items) if items else None


def sizes(findings: Findings) -> Section | None:
    """Say which sizes are as good, ahead of the table of sizes."""
    recommendation, tradeoff = findings.recommendation, findings.tradeoff
    if tradeoff is None and findings.step_time is None:
        return None
    if tradeoff is None:
        return Section(
            key="sizes", title="Sizes and their speed", sentences=("The cost until a target was not predicted: this is speed alone.",)
        )
    has_costs = any(point.relative_time.value is not None for point in tradeoff.points)
    sentences = ["Time is relative to the best size, samples to the least possible."] if has_costs else []
    tolerance, as_good = percent(recommendation.objective.tolerance), recommendation.equivalent_batch_sizes
    if len(as_good) > 1:
        sentences.append(f"Within {tolerance} of the best: {listed(as_good)}.")
    elif as_good:
        sentences.append(f"No size other than {as_good[0]} is surely within {tolerance} of the best.")
    sentences.extend(plain(remark) for remark in tradeoff.remarks)
    rows = tuple(
        (
            str(point.global_batch_size),
            estimate(point.relative_time),
            estimate(point.relative_samples),
            "" if point.regret is None else percent(point.regret),
            point.evidence,
        )
        for point in tradeoff.points
    )
    header = ("batch", "time", "samples", "regret", "evidence")
    table = Table(caption="Predicted cost until the target, 90 % intervals", header=header, rows=rows, behind_chart=True)
    return Section(key="sizes", title="Sizes and what they cost", sentences=tuple(sentences), tables=(table,))


def practice(findings: Findings) -> Section | None:
    """Compare the choice with what people commonly do."""
    comparisons = findings.recommendation.comparisons
    powers = _powers_of_two(findings)
    if not comparisons and not powers:
        return None
    rows = tuple(
        (plain(each.label), str(each.global_batch_size), excess(each.relative_time), excess(each.relative_samples), each.evidence)
        for each in comparisons
    )
    header = ("instead", "batch", "time", "samples", "evidence")
    tables = (Table(caption="What it would cost", header=header, rows=rows),) if rows else ()
    sentence = "Predicted cost until the target against the choice, with 90 % intervals: + is worse, - is better."
    return Section(key="practice", title="Common practice, tested", sentences=(*([sentence] if rows else []), *powers), tables=tables)


def _powers_of_two(findings: Findings) -> tuple[str, ...]:
    """Say whether the power of two that was timed beside its neighbours is faster than they are."""
    test = None if findings.step_time is None else findings.step_time.power_of_two
    if test is None:
        return ()
    return (
        f"Powers of two, tested: a step of {test.size} is {_faster_or_slower(test.relative_time)} than steps of "
        f"{test.size - 1} and {test.size + 1}, their mean.",
        f"{test.multiple_of_eight}, a multiple of 8, takes {excess(test.multiple_relative_time)} time a sample against {test.size}.",
    )


def _faster_or_slower(ratio: Estimate) -> str:
    """Word a ratio of times with its interval: ``3.1 % slower [+2.0, +4.4]``; ``no faster`` when it holds 1."""
    if ratio.value is None or ratio.low is None or ratio.high is None:
        return "not known to be faster"
    interval = f"[{signed_percent(ratio.low - 1).removesuffix(' %')}, {signed_percent(ratio.high - 1)}]"
    if ratio.low <= 1 <= ratio.high:
        return f"neither faster nor slower {interval}"
    return f"{percent(abs(ratio.value - 1))} {'faster' if ratio.value < 1 else 'slower'} {interval}"


def change(findings: Findings) -> Section | None:
    """Say what the answer would be if something were different."""
    sensitivities, plan = findings.recommendation.sensitivities, findings.recommendation.plan
    if not sensitivities:
        return None
    chosen = plan.global_batch_size if plan else None
    rows = tuple(
        (plain(each.change), f"{each.global_batch_size}" + (" (the same)" if each.global_batch_size == chosen else ""))
        for each in sensitivities
    )
    return Section(key="change", title="What would change the answer", tables=(Table(caption="", header=("if", "then"), rows=rows),))


def limits(findings: Findings) -> Section:
    """Say what is extrapolated, and what was not measured at all."""
    sentences = []
    beyond = [point for point in findings.tradeoff.points if point.evidence != "measured"] if findings.tradeoff else []
    for evidence, meaning in (("composed", "accumulation of timed micro-batches"), ("extrapolated", "computed from what was timed")):
        sizes_of_kind = [point.global_batch_size for point in beyond if point.evidence == evidence]
        if sizes_of_kind:
            sentences.append(f"{evidence.capitalize()} ({meaning}): {listed(sizes_of_kind)}.")
    memory = findings.memory
    if memory is not None and memory.predicted_ceiling is not None and memory.predicted_ceiling > (memory.ceiling or 0):
        sentences.append(f"Extrapolated: the predicted memory ceiling of {memory.predicted_ceiling}.")
    parts = {
        "memory": findings.memory, "speed": findings.step_time, "the data loader": findings.loader,
        "gradient noise": findings.noise_scale, "the cost until a target": findings.tradeoff,
    }  # fmt: skip
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        sentences.append(f"Not measured in this run: {listed(missing)}.")
    return Section(
        key="limits", title="Extrapolated or not measured", sentences=tuple(sentences) or ("Nothing: every number was measured here.",)
    )


def provenance(findings: Findings, now: datetime | None) -> Section:
    """Say on what, with what and when everything was measured."""
    place, work = findings.environment, findings.workload
    taken = datetime.fromisoformat(findings.measured_at)
    age = "" if now is None else f" ({format_ago_s((now - taken).total_seconds())})"
    spent = f"{format_duration_s(findings.duration_s)} of measuring" if findings.duration_s else "nothing measured anew"
    total = f", {format_bytes(place.device_total_bytes)}" if place.device_total_bytes else ""
    isolation = "in a child process" if place.isolation == "child" else "in the caller's process"
    rows = [
        ("device", f"{plain(place.device)}: {plain(place.device_name)}{total}"),
        ("system", f"{plain(place.operating_system)}, {place.cpu_count} cores, {place.threads} thread{'' if place.threads == 1 else 's'}"),
        ("versions", ", ".join(f"{plain(name)} {plain(version)}" for name, version in place.versions)),
        ("precision", place.precision),
        ("settings", ", ".join(f"{plain(name)} {plain(value)}" for name, value in place.flags)),
        ("isolation", f"{isolation}, seed {place.seed}"),
        ("allocator", plain(findings.memory.allocator) if findings.memory else ""),
        (
            "workload",
            f"{plain(work.name)}: {work.parameter_count:,} parameters, {plain(work.optimizer)}, {work.train_size:,} training samples",
        ),
        ("measured", f"{taken:%Y-%m-%d %H:%M} UTC{age}, {spent}"),
        ("reused", f"{listed([plain(part) for part in findings.reused_parts])} from an earlier run" if findings.reused_parts else ""),
    ]
    table = Table(caption="", header=("what", "value"), rows=tuple(row for row in rows if row[1]))
    return Section(key="provenance", title="Where this comes from", tables=(table,))
