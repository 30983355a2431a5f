"""From the trials of a sweep to its result: what each size needs at its best rate, the critical batch size, and what the plan costs."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from rightbatch.fits.hyperbola import UNKNOWN, Hyperbola, fit_hyperbola, pooled_log_variance
from rightbatch.fits.intervals import student_quantile
from rightbatch.fits.lr_scaling import LrRule, couple_lr
from rightbatch.fits.robust_curve import robust_curve
from rightbatch.records.estimates import Estimate
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import BatchPlan, Findings
from rightbatch.records.sweep import SweepPoint, SweepResult, SweepSettings, SweptPlan, TrialResult, TrialStatus
from rightbatch.records.training import ProbeOutcome, TrainingProbe

CONTENDS = 1.25
"""Rates whose first seed came within this factor of the best's are the range of good rates."""
TOLERANCE = 0.05
"""Sizes whose time is not told apart from the least by more than this count as equivalent."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Tuned:
    """One size at its best rate.

    Attributes:
        size: Global batch size.
        lr: The best rate.
        trials: That reached the target there, one a seed.
        is_complete: Whether all seeds are there.
    """

    size: int
    lr: float
    trials: tuple[TrialResult, ...]
    is_complete: bool

    @cached_property
    def samples(self) -> tuple[float, ...]:
        """To the target, one a seed."""
        return tuple(trial.samples_to_target or 0.0 for trial in self.trials)

    @cached_property
    def trial_step_s(self) -> float:
        """Seconds a step in the trials: median over seeds."""
        return float(np.median([trial.training_s / max(trial.steps, 1) for trial in self.trials]))


def tune(settings: SweepSettings, trials: Sequence[TrialResult], size: int) -> Tuned | None:
    """Return a size at the rate with the least mean samples of those that reached the target with most seeds; none when none did."""
    by_rate: dict[float, list[TrialResult]] = {}
    failed: set[float] = set()
    for trial in trials:
        if trial.spec.global_batch_size != size:
            continue
        if trial.samples_to_target is None:
            failed.add(trial.spec.lr)
        else:
            by_rate.setdefault(trial.spec.lr, []).append(trial)
    if not by_rate:
        return None

    def rank(lr: float) -> tuple[int, bool, float]:
        reached = by_rate[lr]
        return -len(reached), lr in failed, float(np.mean([trial.samples_to_target or 0.0 for trial in reached]))

    lr = min(by_rate, key=rank)
    ordered = tuple(sorted(by_rate[lr], key=lambda trial: trial.spec.seed))
    return Tuned(size, lr, ordered, is_complete=len(ordered) == settings.seeds)


def probes_of(settings: SweepSettings, trials: Sequence[TrialResult], *, is_complete: bool) -> tuple[TrainingProbe, ...]:
    """Return what the trials say of samples by size: those at the best rate of each size; where not all seeds arrived, how far they got.

    Args:
        settings: Of the sweep.
        trials: In any order.
        is_complete: Whether no trial is left to run; until then seeds that are missing may still arrive.
    """
    probes: list[TrainingProbe] = []
    for size in settings.sizes:
        tuned = tune(settings, trials, size)
        if tuned is not None and (tuned.is_complete or not is_complete):
            probes += [
                TrainingProbe(global_batch_size=size, lr=tuned.lr, seed=trial.spec.seed, outcome=ProbeOutcome.REACHED, samples=samples)
                for trial, samples in zip(tuned.trials, tuned.samples, strict=True)
            ]
            continue
        own = [trial for trial in trials if trial.spec.global_batch_size == size and trial.samples > 0]
        if own:
            furthest = max(own, key=lambda trial: trial.samples)
            probes.append(
                TrainingProbe(global_batch_size=size, lr=furthest.spec.lr, outcome=ProbeOutcome.STOPPED, samples=furthest.samples)
            )
    return tuple(probes)


def step_times_alone(findings: Findings | None, sizes: Sequence[int]) -> dict[int, float] | None:
    """Return seconds a step at each size from steps that were timed alone; none unless they cover all sizes.

    Between timed sizes, straight lines in logarithms.
    """
    if findings is None or findings.tradeoff is None:
        return None
    timed = {point.global_batch_size: point.step_time_s for point in findings.tradeoff.points}
    if len(timed) < 2 or not sizes or min(sizes) < min(timed) or max(sizes) > max(timed):
        return None
    known = sorted(timed)
    logs = np.interp(np.log(sizes), np.log(known), np.log([timed[size] for size in known]))
    return {size: float(np.exp(value)) for size, value in zip(sizes, logs, strict=True)}


def fit_sweep(
    settings: SweepSettings,
    workload: WorkloadSummary,
    trials: Sequence[TrialResult],
    *,
    is_complete: bool,
    device_name: str,
    step_times_s: Mapping[int, float] | None = None,
    times_are_steady: bool = True,
    plan: BatchPlan | None = None,
) -> SweepResult:
    """Conclude from the trials.

    Args:
        settings: Of the sweep.
        workload: What was trained.
        trials: In any order.
        is_complete: Whether no trial is left to run.
        device_name: Where the trials ran.
        step_times_s: Seconds a step by size, timed alone; none takes the trials' own.
        times_are_steady: Whether those timings can be relied on.
        plan: What `find` recommended; none leaves its regret out.
    """
    found = {size: tune(settings, trials, size) for size in settings.sizes}
    tuned = [entry for entry in found.values() if entry is not None and (entry.is_complete or not is_complete)]
    scale = _Scale(tuned, step_times_s)
    hyperbola = fit_hyperbola([entry.size for entry in tuned], [entry.samples for entry in tuned])
    robust, band = robust_curve(
        probes_of(settings, trials, is_complete=is_complete), middle=settings.first_size, rng=np.random.default_rng(0)
    )
    best = min(tuned, key=scale.seconds, default=None)
    rule, rates = _rule_rates(settings, workload, tuned)
    statuses = Counter(trial.status for trial in trials)
    values = [point.value for trial in trials for point in trial.history]
    return SweepResult(
        status="never" if not tuned and is_complete else "ok" if is_complete else "partial",
        workload=workload,
        settings=settings,
        device_name=device_name,
        points=tuple(
            _point(settings, trials, size, next((entry for entry in tuned if entry.size == size), None), scale, is_complete=is_complete)
            for size in settings.sizes
        ),
        best_size=None if best is None else best.size,
        equivalent_sizes=() if best is None else tuple(entry.size for entry in tuned if scale.is_equivalent(entry, best)),
        time_source="side by side" if step_times_s is None else "alone" if times_are_steady else "alone, unsteady",
        critical_batch_size=UNKNOWN if hyperbola is None else hyperbola.critical,
        fewest_samples=None if hyperbola is None else hyperbola.fewest_samples,
        fewest_steps=_fewest_steps(hyperbola),
        fit_error=None if hyperbola is None else hyperbola.error,
        robust_critical_size=robust,
        band=band,
        rule=rule,
        rule_rates=rates,
        plan=_swept_plan(plan, tuned, best, scale),
        trials=tuple((status, statuses[status]) for status in TrialStatus),
        samples_trained=sum(trial.samples for trial in trials),
        grid_samples=_grid_samples(settings, trials, tuned),
        best_value=_best(values, is_loss=settings.target.is_loss),
        remarks=_remarks(settings, trials),
    )


class _Scale:
    """What all tuned sizes share: seconds a step, the spread between seeds, and how far every size was trained."""

    def __init__(self, tuned: Sequence[Tuned], step_times_s: Mapping[int, float] | None) -> None:
        self._step_times_s = step_times_s
        self._variance, self._degrees = pooled_log_variance([entry.samples for entry in tuned])
        self.equal_samples = min((trial.samples for entry in tuned for trial in entry.trials), default=0)
        self.equal_s = min((trial.steps * self.step_s(entry) for entry in tuned for trial in entry.trials), default=0.0)

    def step_s(self, entry: Tuned) -> float:
        return entry.trial_step_s if self._step_times_s is None else self._step_times_s[entry.size]

    def seconds(self, entry: Tuned) -> float:
        """Mean seconds to the target."""
        return float(np.mean(entry.samples)) / entry.size * self.step_s(entry)

    def mean(self, values: Sequence[float], factor: float = 1.0) -> Estimate:
        """Mean of positive values times a factor; the interval is that of the mean logarithm, with the spread pooled over sizes."""
        value = float(np.mean(values)) * factor
        if self._degrees == 0 or value <= 0:
            return Estimate(value=value, low=None, high=None, n=len(values))
        half = student_quantile(self._degrees) * math.sqrt(self._variance / len(values))
        return Estimate(value=value, low=value * math.exp(-half), high=value * math.exp(half), n=len(values))

    def ratio(self, seconds: float, n: int, best: Tuned) -> Estimate:
        """Seconds of another size over those of the best one, minus 1."""
        value = seconds / self.seconds(best)
        if self._degrees == 0:
            return Estimate(value=value - 1, low=None, high=None, n=n)
        half = student_quantile(self._degrees) * math.sqrt(self._variance * (1 / n + 1 / len(best.samples)))
        return Estimate(value=value - 1, low=value * math.exp(-half) - 1, high=value * math.exp(half) - 1, n=n)

    def is_equivalent(self, entry: Tuned, best: Tuned) -> bool:
        if entry.size == best.size:
            return True
        excess = self.ratio(self.seconds(entry), len(entry.samples), best)
        lowest = excess.value if excess.low is None else excess.low
        return lowest is not None and lowest <= TOLERANCE


def _point(
    settings: SweepSettings, trials: Sequence[TrialResult], size: int, tuned: Tuned | None, scale: _Scale, *, is_complete: bool
) -> SweepPoint:
    own = [trial for trial in trials if trial.spec.global_batch_size == size]
    counts = {"trials": len(own), "samples_trained": sum(trial.samples for trial in own)}
    if tuned is None:
        return SweepPoint(
            global_batch_size=size,
            status=_status_without_rate(own, is_complete=is_complete),
            lr=None,
            lr_low=None,
            lr_high=None,
            samples=UNKNOWN,
            steps=UNKNOWN,
            seconds=UNKNOWN,
            measured_seconds=UNKNOWN,
            metric_at_equal_samples=UNKNOWN,
            metric_at_equal_time=UNKNOWN,
            **counts,
        )
    low, high = _good_rates(own, tuned.lr)
    steps = [trial.steps_to_target or 0.0 for trial in tuned.trials]
    step_s, is_loss = scale.step_s(tuned), settings.target.is_loss
    return SweepPoint(
        global_batch_size=size,
        status="tuned" if tuned.is_complete else "partial",
        lr=tuned.lr,
        lr_low=low,
        lr_high=high,
        samples=scale.mean(tuned.samples),
        steps=scale.mean(steps),
        seconds=scale.mean(steps, step_s),
        measured_seconds=scale.mean([trial.seconds_to_target or 0.0 for trial in tuned.trials]),
        metric_at_equal_samples=_metric_until(tuned, scale.equal_samples, is_loss=is_loss),
        metric_at_equal_time=_metric_until(tuned, scale.equal_s / step_s * size, is_loss=is_loss),
        **counts,
    )


def _status_without_rate(own: Sequence[TrialResult], *, is_complete: bool) -> Literal["partial", "unsteady", "never", "not tried"]:
    if not is_complete:
        return "partial"
    if not own:
        return "not tried"
    return "unsteady" if any(trial.samples_to_target is not None for trial in own) else "never"


def _good_rates(own: Sequence[TrialResult], best: float) -> tuple[float, float]:
    """The range of rates whose first seed came near the best one's."""
    first = {trial.spec.lr: trial.samples_to_target for trial in own if trial.spec.seed == 0 and trial.samples_to_target is not None}
    fewest = min(first.values(), default=math.inf)
    good = [lr for lr, samples in first.items() if samples <= CONTENDS * fewest]
    return min([*good, best]), max([*good, best])


def _metric_until(tuned: Tuned, most_samples: float, *, is_loss: bool) -> Estimate:
    """Best smoothed metric of each seed within so many samples: mean and 95 % interval over seeds."""
    best = [
        _best([point.value for point in trial.history if point.samples <= most_samples * (1 + _ROUNDING)], is_loss=is_loss)
        for trial in tuned.trials
    ]
    values = [value for value in best if value is not None]
    if not values:
        return UNKNOWN
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(value=mean, low=None, high=None, n=1)
    half = student_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(value=mean, low=mean - half, high=mean + half, n=len(values))


def _best(values: Sequence[float], *, is_loss: bool) -> float | None:
    return (min if is_loss else max)(values, default=None)


def _fewest_steps(hyperbola: Hyperbola | None) -> float | None:
    """S_min = E_min / B_crit; none where B_crit is not known."""
    if hyperbola is None or hyperbola.fewest_samples is None or not hyperbola.critical.value:
        return None
    return hyperbola.fewest_samples / hyperbola.critical.value


def _rule_rates(settings: SweepSettings, workload: WorkloadSummary, tuned: Sequence[Tuned]) -> tuple[LrRule, tuple[tuple[int, float], ...]]:
    """The scaling rule from the tuned rate of the first size, or of the size nearest to it that arrived."""
    anchor = min(tuned, key=lambda entry: abs(math.log(entry.size / settings.first_size)), default=None)
    size = settings.first_size if anchor is None else anchor.size
    base = workload.model_copy(update={"lr_batch_size": size})
    couplings = {other: couple_lr(base, settings.noise_scale, other) for other in settings.sizes}
    rates = () if anchor is None else tuple((other, anchor.lr * coupling.factor) for other, coupling in couplings.items())
    return couplings[settings.sizes[0]].rule, rates


def _swept_plan(plan: BatchPlan | None, tuned: Sequence[Tuned], best: Tuned | None, scale: _Scale) -> SweptPlan | None:
    """What the plan costs: at its size, or between the two sizes that enclose it by straight lines in logarithms; none outside them."""
    if plan is None or best is None:
        return None
    size = plan.global_batch_size
    below = max((entry for entry in tuned if entry.size <= size), key=lambda entry: entry.size, default=None)
    above = min((entry for entry in tuned if entry.size >= size), key=lambda entry: entry.size, default=None)
    if below is None or above is None:
        return None
    share = 0.0 if below.size == above.size else math.log(size / below.size) / math.log(above.size / below.size)
    seconds = _between(share, scale.seconds(below), scale.seconds(above))
    lr, n = _between(share, below.lr, above.lr), min(len(below.samples), len(above.samples))
    return SweptPlan(
        global_batch_size=size,
        lr=plan.lr,
        regret=Estimate(value=0.0, low=0.0, high=0.0, n=n) if size == best.size else scale.ratio(seconds, n, best),
        lr_over_best=None if plan.lr is None else plan.lr / lr,
        is_interpolated=below.size != above.size,
    )


def _between(share: float, low: float, high: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def _grid_samples(settings: SweepSettings, trials: Sequence[TrialResult], tuned: Sequence[Tuned]) -> int:
    """Every size with every rate that was tried anywhere and every seed, each cell at the samples of its size's best rate."""
    rates = len({trial.spec.lr for trial in trials})
    of_best = {entry.size: float(np.mean(entry.samples)) for entry in tuned}
    furthest = {
        size: max((trial.samples for trial in trials if trial.spec.global_batch_size == size), default=0) for size in settings.sizes
    }
    return round(rates * settings.seeds * sum(of_best.get(size, furthest[size]) for size in settings.sizes))


def _remarks(settings: SweepSettings, trials: Sequence[TrialResult]) -> tuple[str, ...]:
    remarks = []
    failed = [trial for trial in trials if trial.status is TrialStatus.FAILED]
    if failed:
        sizes = ", ".join(str(size) for size in sorted({trial.spec.global_batch_size for trial in failed}))
        count = "one trial" if len(failed) == 1 else f"{len(failed)} trials"
        remarks.append(f"Failed at size {sizes}, {count}: {failed[0].reason}.")
    if settings.seeds == 1:
        remarks.append("One seed a size: nothing tells how far chance alone moves the samples; --seeds 3 does.")
    return tuple(remarks)
