"""All the words of a sweep's report, made once from its result; the terminal and the page only lay them out."""

from collections.abc import Callable, Sequence

from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.sweep import SweepPoint, SweepResult, TrialStatus
from rightbatch.report.document import KeyNumber, Section, Table, Verdict, VerdictStatus
from rightbatch.report.phrases import estimate, listed, number, percent, plain, signed_percent
from rightbatch.units import format_duration_s

_STATUS: dict[str, VerdictStatus] = {"ok": "ok", "partial": "inconclusive", "never": "inconclusive"}


def build_sweep_verdict(result: SweepResult) -> Verdict:
    """Put a sweep into words."""
    sections = (_sizes(result), _critical(result), _rates(result), _generalisation(result), _plan(result), _cost(result))
    return Verdict(
        status="unstable" if result.status == "ok" and _is_unsteady(result) else _STATUS[result.status],
        workload=plain(result.workload.name),
        answer=_answer(result),
        headline=_headline(result),
        lead=_lead(result),
        key_numbers=_key_numbers(result),
        sizes=(),
        sections=tuple(section for section in sections if section is not None),
    )


def _point(result: SweepResult, size: int | None) -> SweepPoint | None:
    return next((point for point in result.points if point.global_batch_size == size), None)


def _answer(result: SweepResult) -> str:
    best = _point(result, result.best_size)
    if best is None:
        return f"no size reached {_target(result)}" if result.status == "never" else f"{result.settings.target} not reached yet"
    parts = [f"batch {best.global_batch_size}, lr {number(best.lr or 0.0)}: {result.settings.target} in {_seconds(best.seconds)}"]
    parts.append(f"{number(best.samples.value or 0.0)} samples")
    parts.append(f"B_crit {estimate(result.critical_batch_size)}")
    if result.plan is not None and result.plan.regret.value is not None:
        parts.append(f"plan {result.plan.global_batch_size}: {signed_percent(result.plan.regret.value)}")
    if result.status != "ok":
        parts.append("partial")
    if _is_unsteady(result):
        parts.append("unsteady times")
    return " · ".join(parts)


def _reached_by_some(result: SweepResult) -> list[int]:
    return [point.global_batch_size for point in result.points if point.status == "unsteady"]


def _target(result: SweepResult) -> str:
    """What no size reached; where some seeds did, that is said."""
    return f"{result.settings.target}{' with every seed' if _reached_by_some(result) else ''}"


def _is_unsteady(result: SweepResult) -> bool:
    return result.time_source == "alone, unsteady" and result.best_size is not None


def _headline(result: SweepResult) -> str:
    best = _point(result, result.best_size)
    target = result.settings.target
    if best is None:
        return f"No size reached {_target(result)}." if result.status == "never" else f"No size has reached {target} yet."
    others = [size for size in result.equivalent_sizes if size != best.global_batch_size]
    alike = f"; {listed(others)} {'is' if len(others) == 1 else 'are'} as good" if others else ""
    return f"Batches of {best.global_batch_size} reach {target} soonest{alike}."


def _lead(result: SweepResult) -> tuple[str, ...]:
    if result.status == "never":
        best = "" if result.best_value is None else f" The best smoothed {result.settings.target.quantity} was {number(result.best_value)}."
        some = _reached_by_some(result)
        fell_short = f"{listed(some)} got there with some seeds only." if some else "Every trial was stopped, diverged or failed."
        return (f"{fell_short}{best} Choose a target that is reached, or allow more with --max-samples.",)
    lead = ["The time budget ended the sweep; repeat the command to go on."] if result.status == "partial" else []
    if _is_unsteady(result):
        lead.append("The step times are too unsteady to rely on: samples and steps hold, times and which size is soonest may not.")
    return tuple(lead)


def _seconds(value: Estimate) -> str:
    return estimate(value, format_duration_s)


def _key_numbers(result: SweepResult) -> tuple[KeyNumber, ...]:
    best = _point(result, result.best_size)
    if best is None:
        return ()
    clock = "trials side by side" if result.time_source == "side by side" else f"steps timed {result.time_source}"
    keys = [
        KeyNumber(label="fastest size", value=str(best.global_batch_size), note=f"at learning rate {number(best.lr or 0.0)}"),
        KeyNumber(
            label="time to the target",
            value=format_duration_s(best.seconds.value or 0.0),
            note=f"{_interval(best.seconds, format_duration_s)}, {clock}",
        ),
        KeyNumber(label="critical batch size", value=_critical_words(result), note=_interval(result.critical_batch_size)),
        KeyNumber(label="samples trained", value=number(result.samples_trained), note=f"{_share(result)} of the full grid"),
    ]
    if result.plan is not None and result.plan.regret.value is not None:
        regret = result.plan.regret
        keys.insert(
            3, KeyNumber(label="the plan costs", value=signed_percent(regret.value or 0.0), note=f"batch {result.plan.global_batch_size}")
        )
    return tuple(keys)


def _critical_words(result: SweepResult) -> str:
    critical = result.critical_batch_size
    if critical.value is None:
        return estimate(critical)
    return number(critical.value)


def _interval(value: Estimate, write: Callable[[float], str] = number) -> str:
    if value.low is None and value.high is None:
        return "no interval"
    low = "0" if not value.low else write(value.low)
    return f"95 % from {low}" + ("" if value.high is None else f" to {write(value.high)}")


def _share(result: SweepResult) -> str:
    return percent(result.samples_trained / result.grid_samples) if result.grid_samples else "all"


_CLOCKS = {
    "alone": "Seconds are steps times the step time that rightbatch find measured alone.",
    "alone, unsteady": "Seconds are steps times the step time that rightbatch find measured alone, too unsteadily to rely on: "
    "free the machine, repeat find with --fresh, then this command.",
    "side by side": "Seconds are those of trials that ran side by side and shared the machine; after rightbatch find of the same workload, "
    "a repeated sweep command takes step times that were measured alone.",
}


def _sizes(result: SweepResult) -> Section:
    clock = _CLOCKS[result.time_source]
    rows = tuple(
        (
            str(point.global_batch_size),
            "-" if point.lr is None else number(point.lr),
            estimate(point.samples) if point.samples.value is not None else point.status,
            "-" if point.steps.value is None else estimate(point.steps),
            "-" if point.seconds.value is None else _seconds(point.seconds),
        )
        for point in result.points
    )
    table = Table(caption="To the target, each size at its best rate", header=("batch", "lr", "samples", "steps", "time"), rows=rows)
    interval = (
        "Intervals are 95 %, from the spread between seeds." if result.settings.seeds > 1 else "With one seed there are no intervals."
    )
    return Section(key="sizes", title="Sizes", sentences=(clock, interval), tables=(table,))


def _critical(result: SweepResult) -> Section | None:
    critical, fewest = result.critical_batch_size, result.fewest_samples
    if fewest is None:
        return None
    sentences = [f"The hyperbola E = E_min (1 + b / B_crit) fits with B_crit {estimate(critical)} and E_min {number(fewest)} samples."]
    if critical.status is Status.AT_LEAST:
        sentences = [
            f"The sizes bound the B_crit of the hyperbola from below only, at {number(critical.low or 0.0)}: larger sizes, or more seeds, "
            "would tell more."
        ]
    if result.fit_error is not None and sum(point.samples.value is not None for point in result.points) > 2:  # two always lie on it
        sentences.append(f"Sizes lie {percent(result.fit_error)} from it on average.")
    if result.robust_critical_size.value is not None:
        sentences.append(
            f"A curve that may bend more sharply, and by chance, puts it at {estimate(result.robust_critical_size)} (95 %): where the two "
            "differ, trust the wider."
        )
    return Section(key="critical", title="Critical batch size", sentences=tuple(sentences))


def _rates(result: SweepResult) -> Section | None:
    tuned = [point for point in result.points if point.lr is not None]
    if not tuned:
        return None
    rule = dict(result.rule_rates)
    rows = tuple(
        (
            str(point.global_batch_size),
            number(point.lr or 0.0),
            f"{number(point.lr_low or 0.0)} to {number(point.lr_high or 0.0)}",
            number(rule[point.global_batch_size]) if point.global_batch_size in rule else "-",
        )
        for point in tuned
    )
    beyond = [
        point.global_batch_size for point in tuned if (lr := rule.get(point.global_batch_size)) is not None and not _is_good(point, lr)
    ]
    judged = (
        f"The rule ({result.rule}) misses the range of good rates at {listed(beyond)}."
        if beyond
        else f"The rule ({result.rule}) stays within the range of good rates at every size."
    )
    noise = (
        "Without a measured noise scale the rule keeps the rate for larger sizes."
        if result.settings.noise_scale is None and result.rule == "saturating linear"
        else ""
    )
    table = Table(caption="Learning rates", header=("batch", "best", "good", "rule"), rows=rows, behind_chart=True)
    return Section(key="lr", title="Learning rate", sentences=tuple(filter(None, (judged, noise))), tables=(table,))


def _is_good(point: SweepPoint, lr: float) -> bool:
    """Within the range of good rates, half a step of the grid beyond it included."""
    half_step = 2**0.5
    return (point.lr_low or 0.0) / half_step <= lr <= (point.lr_high or 0.0) * half_step


def _generalisation(result: SweepResult) -> Section | None:
    tuned = [point for point in result.points if point.metric_at_equal_samples.value is not None]
    if len(tuned) < 2:
        return None
    name = result.settings.target.quantity
    rows = tuple(
        (str(point.global_batch_size), estimate(point.metric_at_equal_samples), estimate(point.metric_at_equal_time)) for point in tuned
    )
    table = Table(caption=f"Best smoothed {name}", header=("batch", "equal samples", "equal time"), rows=rows, behind_chart=True)
    return Section(
        key="generalisation",
        title="Does small generalise better?",
        sentences=(
            _trend(tuned[0].metric_at_equal_samples, tuned[-1].metric_at_equal_samples, tuned, name, "Within the same samples"),
            _trend(tuned[0].metric_at_equal_time, tuned[-1].metric_at_equal_time, tuned, name, "Within the same time"),
            "Trials end at the target, so this compares how soon sizes get there, not what they would come to if trained on.",
        ),
        tables=(table,),
    )


def _trend(small: Estimate, large: Estimate, tuned: Sequence[SweepPoint], name: str, condition: str) -> str:
    """Compare the smallest with the largest size; a difference counts where the intervals do not meet."""
    ends = f"{tuned[0].global_batch_size} and {tuned[-1].global_batch_size}"
    if None in {small.low, small.high, large.low, large.high}:
        return f"{condition}, {ends} come to {name} {estimate(small)} and {estimate(large)}."
    apart = (small.low or 0.0) > (large.high or 0.0) or (large.low or 0.0) > (small.high or 0.0)
    verdict = "they differ by more than seeds do" if apart else "seeds alone could explain the difference"
    return f"{condition}, {ends} come to {name} {estimate(small)} and {estimate(large)}: {verdict}."


def _plan(result: SweepResult) -> Section | None:
    plan = result.plan
    if plan is None or plan.regret.value is None:
        return None
    between = ", between two sizes that were trained" if plan.is_interpolated else ""
    interval = (
        ""
        if plan.regret.low is None or plan.regret.high is None
        else (f" [{signed_percent(plan.regret.low)}, {signed_percent(plan.regret.high)}]")
    )
    is_best = plan.global_batch_size == result.best_size
    cost = "the least time to the target" if is_best else f"{signed_percent(plan.regret.value)}{interval} time to the target"
    sentences = [f"The plan of rightbatch find is batch {plan.global_batch_size}{between}: {cost}."]
    if plan.lr is not None and plan.lr_over_best is not None:
        sentences.append(f"Its learning rate, {number(plan.lr)}, is {number(plan.lr_over_best)} times the tuned one.")
    return Section(key="practice", title="The plan", sentences=tuple(sentences))


def _cost(result: SweepResult) -> Section:
    counts = dict(result.trials)
    total = sum(counts.values())
    rows = tuple((str(point.global_batch_size), str(point.trials), f"{point.samples_trained}") for point in result.points)
    table = Table(caption="What was trained", header=("batch", "trials", "samples"), rows=rows, behind_chart=True)
    endings = ", ".join(f"{counts[status]} {status.value}" for status in TrialStatus if counts[status])
    grid = (
        f"They trained on {number(result.samples_trained)} samples, {_share(result)} of the {number(result.grid_samples)} that all sizes "
        "with all rates tried anywhere and all seeds would have taken, were no rate worse than the best."
    )
    sentences = (f"{total} trials: {endings}.", *([grid] if result.best_size is not None else []), *result.remarks)
    return Section(key="cost", title="Cost", sentences=sentences, tables=(table,))
