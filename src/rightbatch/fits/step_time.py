"""Step time: which sizes to time, when to stop timing, and the curve and knee that the rounds give."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.fits.intervals import FloatArray, median_estimate
from rightbatch.fits.power_of_two import fit_power_of_two
from rightbatch.records.estimates import Estimate, Status, StepTimeCurve, ThroughputPoint
from rightbatch.records.measurements import StepTimeMeasurements, StepTimePoint
from rightbatch.units import format_percent

KNEE_TOLERANCE = 0.03
"""The knee is the smallest size whose throughput is within this fraction of the best."""
MIN_ROUNDS = 5
_KNEE_OVER_HALF_SATURATION = 32
_NARROW_GAP = 1.5
"""Neighbours closer than this need no size between them."""
LARGEST_EXPONENT = 8.0
UNSTABLE_SPREAD = 0.2
"""Relative median absolute deviation between rounds above which the timings are not trusted."""
INCONSISTENT_FIT = 0.25
"""Relative distance between a measured and a fitted step time above which the law is not believed."""
_BOOTSTRAP_SEED = 20240607
_EXPONENT_PENALTY = 1e-3
_OUTLIER = 0.05
"""Residual of log t from which a size pulls no harder: throughput may fall at the largest sizes, which the law does not allow."""


@dataclass(frozen=True)
class StepTimeLaw:
    """t(b) = (t0**p + (b / tau)**p)**(1/p): a fixed cost and a saturated throughput, met with sharpness p."""

    fixed_time_s: float
    saturated_samples_per_s: float
    exponent: float

    def step_time_s(self, sizes: FloatArray) -> FloatArray:
        """Seconds of a step at each of ``sizes``."""
        p = self.exponent
        work_s = np.asarray(sizes, dtype=np.float64) / self.saturated_samples_per_s
        longest = np.maximum(self.fixed_time_s, work_s)
        shortest = np.minimum(self.fixed_time_s, work_s)
        return np.asarray(longest * (1 + (shortest / longest) ** p) ** (1 / p), dtype=np.float64)


def candidate_sizes(
    scan: Sequence[tuple[int, float]], *, largest: int, must_include: Sequence[int] = (), limit: int = 8
) -> tuple[int, ...]:
    """At most ``limit`` sizes to time properly: those of interest, and enough between them that the best is never far.

    Args:
        scan: (micro-batch size, seconds of a step), measured quickly.
        largest: The largest size that may be timed: the memory ceiling or what the budget affords.
        must_include: Sizes of special interest; those above ``largest`` are left out.
        limit: Most sizes to return.

    Returns:
        Ascending, distinct sizes from the smallest scanned to ``largest``: ``largest``, ``must_include``, the knee of the scan and a
        thirty-second of it, then powers of two that halve the widest ratio up to twice the knee. The optimum for time mostly lies in that
        range, at sqrt(B_crit * b_half): under the affine law the knee is 32 times b_half.
    """
    knee = _scanned_knee(scan, largest)
    smallest = min((size for size, _ in scan), default=1)
    wanted = (largest, *must_include, knee, max(smallest, knee // _KNEE_OVER_HALF_SATURATION))
    chosen = set(list(dict.fromkeys(size for size in wanted if smallest <= size <= largest))[:limit])
    top = max(2 * knee, *must_include, 0)
    while len(chosen) < limit and (middle := _middle_of_widest_gap(sorted(chosen), top)) is not None:
        chosen.add(middle)
    return tuple(sorted(chosen))


def _middle_of_widest_gap(sizes: Sequence[int], top: int) -> int | None:
    """The power of two nearest to the middle, in logarithms, of the widest gap that begins below ``top``; none when all are narrow."""
    gaps = [(min(high, top) / low, low, min(high, top)) for low, high in itertools.pairwise(sizes) if low < top]
    for ratio, low, high in sorted(gaps, reverse=True):
        middle = int(2 ** round(math.log2(low * high) / 2))
        if ratio >= _NARROW_GAP and low < middle < high:
            return middle
    return None


def is_decided(measurements: StepTimeMeasurements, *, precision: float = 0.02) -> bool:
    """Whether more rounds would change nothing that matters.

    Args:
        measurements: Rounds so far.
        precision: Relative half-width of a 95 % interval that is narrow enough.

    Returns:
        True from ``MIN_ROUNDS`` rounds on, when every median is known to ``precision`` or no value inside the intervals moves the knee.
        Sizes so slow that they sit rounds out need not reach the precision.
    """
    rounds = max((len(point.step_times_s) for point in measurements.points), default=0)
    if rounds < MIN_ROUNDS:
        return False
    estimates = _step_times(measurements.points)
    if all(_half_width(estimate) <= precision for estimate in estimates if estimate.n == rounds):
        return True
    return _knee_is_certain([point.micro_batch_size for point in _by_size(measurements.points)], estimates)


def fit_step_time(measurements: StepTimeMeasurements) -> StepTimeCurve:
    """Medians, the law t(b) = (t0**p + (b/tau)**p)**(1/p) by robust least squares of log t, the knee and the best throughput.

    Returns:
        ``UNSTABLE`` when the machine was busy or rounds disagree; ``INCONSISTENT`` when the law misses a size by more than a quarter, which
        leaves knee and best untouched, because they rest on the measured medians alone; ``INDETERMINATE`` when nothing was timed.
    """
    points = _by_size(measurements.points)
    estimates = _step_times(measurements.points)
    sizes = np.array([point.micro_batch_size for point in points], dtype=np.float64)
    medians_s = np.array([estimate.value for estimate in estimates], dtype=np.float64)
    law = fit_law(sizes, medians_s)
    fitted_s = law.step_time_s(sizes) if law is not None else None
    misses = np.abs(fitted_s / medians_s - 1) if fitted_s is not None else np.zeros(len(points))
    status, reasons = _verdict(measurements, points, misses)
    optimizer_times = measurements.optimizer_times_s
    return StepTimeCurve(
        status=status,
        reasons=reasons,
        points=tuple(
            _throughput_point(point, estimate, None if fitted_s is None else float(fitted_s[i]))
            for i, (point, estimate) in enumerate(zip(points, estimates, strict=True))
        ),
        fixed_time_s=law.fixed_time_s if law else None,
        saturated_samples_per_s=law.saturated_samples_per_s if law else None,
        exponent=law.exponent if law else None,
        fit_error=float(np.max(misses)) if fitted_s is not None else None,
        half_saturation=law.fixed_time_s * law.saturated_samples_per_s if law else None,
        knee=_knee(sizes, medians_s) if points else None,
        best=int(sizes[np.argmax(sizes / medians_s)]) if points else None,
        optimizer_time_s=float(np.median(optimizer_times)) if optimizer_times else 0.0,
        power_of_two=fit_power_of_two(measurements.neighbours),
    )


def fit_law(sizes: FloatArray, times_s: FloatArray) -> StepTimeLaw | None:
    """Fit t0, tau and p to step times by robust least squares of log t, from an affine start; none below two sizes.

    With two sizes p is held at 1. A weak pull towards p = 1 settles the exponent where the sizes show one regime only.
    """
    if len(sizes) < 2:
        return None
    from scipy.optimize import least_squares, nnls

    design = np.column_stack([1 / times_s, sizes / times_s])
    (fixed_s, per_sample_s), _ = nnls(design, np.ones_like(times_s))
    floor_fixed_s = 1e-6 * float(times_s.min())
    floor_per_sample_s = 1e-6 * float(np.min(times_s / sizes))
    largest_log_exponent = math.log(LARGEST_EXPONENT) if len(sizes) > 2 else 1e-9

    def residuals(parameters: FloatArray) -> FloatArray:
        fitted = _law(parameters).step_time_s(sizes)
        return np.append(np.log(fitted / times_s), _EXPONENT_PENALTY * parameters[2])

    lower = np.array([math.log(floor_fixed_s), math.log(floor_per_sample_s), 0.0])
    upper = np.array([math.log(10 * float(times_s.max())), math.log(10 * float(np.max(times_s / sizes))), largest_log_exponent])
    starts = [
        np.clip(
            [math.log(max(fixed_s, floor_fixed_s)), math.log(max(per_sample_s, floor_per_sample_s)), log_p], lower + 1e-10, upper - 1e-10
        )
        for log_p in (0.0, math.log(3.0))
    ]
    solutions = (least_squares(residuals, start, bounds=(lower, upper), loss="soft_l1", f_scale=_OUTLIER) for start in starts)
    best = min(solutions, key=lambda result: float(result.cost))
    return _law(np.asarray(best.x))


def _law(parameters: FloatArray) -> StepTimeLaw:
    return StepTimeLaw(math.exp(parameters[0]), math.exp(-parameters[1]), math.exp(parameters[2]))


def _by_size(points: Sequence[StepTimePoint]) -> list[StepTimePoint]:
    return sorted((point for point in points if point.step_times_s), key=lambda point: point.micro_batch_size)


def _step_times(points: Sequence[StepTimePoint]) -> list[Estimate]:
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    return [median_estimate(point.step_times_s, rng) for point in _by_size(points)]


def _throughput_point(point: StepTimePoint, step_time_s: Estimate, fitted_s: float | None) -> ThroughputPoint:
    def rate(seconds: float | None) -> float | None:
        return None if seconds is None else point.micro_batch_size / seconds

    return ThroughputPoint(
        micro_batch_size=point.micro_batch_size,
        step_time_s=step_time_s,
        samples_per_s=Estimate(value=rate(step_time_s.value), low=rate(step_time_s.high), high=rate(step_time_s.low), n=step_time_s.n),
        fitted_step_time_s=fitted_s,
        energy_per_step_j=float(np.median(point.energy_per_step_j)) if point.energy_per_step_j else None,
    )


def _scanned_knee(scan: Sequence[tuple[int, float]], largest: int) -> int:
    usable = sorted((size, seconds) for size, seconds in scan if size <= largest and seconds > 0)
    if not usable:
        return largest
    sizes = np.array([size for size, _ in usable], dtype=np.float64)
    return _knee(sizes, np.array([seconds for _, seconds in usable]))


def _knee(sizes: FloatArray, times_s: FloatArray) -> int:
    throughput = sizes / times_s
    return int(sizes[throughput >= (1 - KNEE_TOLERANCE) * throughput.max()].min())


def _half_width(estimate: Estimate) -> float:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return math.inf
    return (estimate.high - estimate.low) / (2 * estimate.value)


def _knee_is_certain(sizes: Sequence[int], estimates: Sequence[Estimate]) -> bool:
    """Whether the smallest size at the knee stays so for every combination of values inside the intervals."""
    slowest = np.array([size / (estimate.high or math.inf) for size, estimate in zip(sizes, estimates, strict=True)])
    fastest = np.array([size / (estimate.low or 1e-300) for size, estimate in zip(sizes, estimates, strict=True)])
    for i in range(len(sizes)):
        others_fastest = np.delete(fastest, i).max(initial=0.0)
        others_slowest = np.delete(slowest, i).max(initial=0.0)
        if slowest[i] >= (1 - KNEE_TOLERANCE) * others_fastest:
            return True
        if fastest[i] >= (1 - KNEE_TOLERANCE) * others_slowest:
            return False
    return False


def _verdict(measurements: StepTimeMeasurements, points: Sequence[StepTimePoint], misses: FloatArray) -> tuple[Status, tuple[str, ...]]:
    if not points:
        return Status.INDETERMINATE, ("No size was timed.",)
    reasons = [*measurements.contention.reasons, *_disagreement(points)]
    worst = int(np.argmax(misses))
    inconsistent = float(misses[worst]) > INCONSISTENT_FIT
    status = Status.UNSTABLE if reasons else Status.INCONSISTENT if inconsistent else Status.OK
    if inconsistent:
        size, miss = points[worst].micro_batch_size, format_percent(float(misses[worst]))
        reasons.append(f"The fitted curve misses the step time at {size} by {miss}: trust the measured sizes, not the curve.")
    return status, tuple(reasons)


def _disagreement(points: Sequence[StepTimePoint]) -> tuple[str, ...]:
    """Say in one sentence at which sizes rounds disagree too much to be trusted, and by how much; nothing where they agree."""
    spreads = {}
    for point in points:
        rounds = np.asarray(point.step_times_s)
        spread = float(np.median(np.abs(rounds - np.median(rounds))) / np.median(rounds))
        if spread > UNSTABLE_SPREAD:
            spreads[point.micro_batch_size] = spread
    if not spreads:
        return ()
    least, most = (format_percent(end(spreads.values())) for end in (min, max))
    by = most if least == most else f"{least.removesuffix(' %')} to {most}"
    return (f"Rounds differ by {by} (median absolute deviation) at batch {', '.join(str(size) for size in spreads)}.",)
