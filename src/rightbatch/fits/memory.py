"""Memory: from a trace and a few sizes that ran to bytes at any size, the next size to try, and the ceiling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.records.estimates import MemoryCurve, MemoryShare, Status
from rightbatch.records.measurements import LiveMoment, MemoryMeasurements, MemoryPoint, MemoryTrace, Outcome
from rightbatch.units import MIB, format_bytes, format_percent

LARGEST_SIZE = 2**40
"""No ceiling is searched for above this size."""
MAX_ATTEMPTS = 6
"""Sizes that are tried in all, touches included."""
LARGEST_GROWTH = 8
"""No attempt is larger than this many times the largest size that ran."""
SANE_SCALES = (0.5, 4.0)
"""A calibration outside this range is noise: the trace counts the same tensors that the device holds."""
_FIRST_TOUCH_BYTES = 64 * MIB
_SECOND_TOUCH_BYTES = 256 * MIB
_ERROR_OF_ONE_POINT = 0.1
_LARGEST_MARGIN = 0.25
_SMALLEST_NOISY_MARGIN = 0.03
_MARGIN_PER_ERROR = 1.5
_DETERMINISTIC_ERROR = 1e-9
_CURVE_POINTS = 40


@dataclass(frozen=True)
class Calibration:
    """used bytes = scale * trace(b) + offset_bytes; without a trace, scale is in bytes per sample and trace(b) = b."""

    scale: float
    offset_bytes: float
    error: float
    """Largest distance between measured and calibrated use, over the largest measured use: what matters near the limit."""

    def used_bytes(self, traced: float) -> int:
        """Calibrated use for so many traced bytes."""
        return round(self.scale * traced + self.offset_bytes)


def traced_peak_bytes(trace: MemoryTrace, micro_batch_size: int) -> int:
    """Peak live bytes at ``micro_batch_size``: max over moments of fixed + per_sample * b + per_sample_squared * b**2.

    Returns:
        Bytes; 0 for a trace without moments.
    """
    return max((_live_bytes(moment, micro_batch_size) for moment in trace.moments), default=0)


def peak_moment(trace: MemoryTrace, micro_batch_size: int) -> LiveMoment:
    """The moment with the most live bytes at ``micro_batch_size``.

    Raises:
        ValueError: The trace has no moments.
    """
    if not trace.moments:
        raise ValueError("a trace with at least one moment is needed to name the peak; got none: check trace.moments first.")
    return max(trace.moments, key=lambda moment: _live_bytes(moment, micro_batch_size))


def calibrate(trace: MemoryTrace, points: Sequence[MemoryPoint]) -> Calibration:
    """Fit used = scale * trace(b) + offset to the attempts whose use was measured.

    One size: scale 1. Two or more: least squares with weights trace(b)**2, so that the sizes nearest to the limit count most; exact
    when the sizes are exactly affine in the trace. A fitted scale outside ``SANE_SCALES``, or a line below zero at one sample, is
    noise: then scale 1 with the weighted mean offset, and ``error`` shows how badly that fits.

    Args:
        trace: Allocations of a step; without moments the line is in b itself.
        points: Attempts; those without a measured use are ignored.

    Returns:
        The line; scale 1, offset 0, error 0 without any measured size.
    """
    measured = [(_regressor(trace, p.micro_batch_size), p.used_bytes) for p in points if p.used_bytes is not None]
    if not measured:
        return Calibration(1.0, 0.0, 0.0)
    x = np.array([traced for traced, _ in measured], dtype=np.float64)
    used = np.array([bytes_ for _, bytes_ in measured], dtype=np.float64)
    weight = np.maximum(x, 1.0) ** 2
    weight /= weight.sum()
    x_mean, used_mean = float(weight @ x), float(weight @ used)
    spread = float(weight @ (x - x_mean) ** 2)
    fallback_scale = 1.0 if trace.moments else max(used_mean / max(x_mean, 1.0), 1.0)
    scale = float(weight @ ((x - x_mean) * (used - used_mean))) / spread if spread > 0 else fallback_scale
    if not _is_sane(trace, scale, used_mean - scale * x_mean):
        scale = fallback_scale
    offset = used_mean - scale * x_mean
    error = float(np.max(np.abs(scale * x + offset - used)) / max(float(used.max()), 1.0))
    return Calibration(scale, offset, error)


def touch_sizes(trace: MemoryTrace, limit_bytes: int, largest_allowed: int) -> tuple[int, ...]:
    """One or two small sizes to run first, large enough to be seen above the granularity of a resident set.

    The sizes add about 64 and 256 MiB to what the step holds at no samples at all, but trace to no more than an eighth and a third
    of the limit.

    Args:
        trace: Allocations of a step.
        limit_bytes: The most that may be used, in bytes.
        largest_allowed: Cap on the size from elsewhere.

    Returns:
        Ascending sizes, at least 2 where that is allowed and traced to fit (batch normalisation cannot train on one sample); empty when not
        even one sample is traced to fit.
    """
    if traced_peak_bytes(trace, 1) > limit_bytes:
        return ()
    smallest = 2 if largest_allowed >= 2 and traced_peak_bytes(trace, 2) <= limit_bytes else 1
    if not trace.moments:
        return tuple(sorted({smallest, min(2 * smallest, largest_allowed)}))
    fixed = traced_peak_bytes(trace, 0)
    targets = (
        min(fixed + _FIRST_TOUCH_BYTES, limit_bytes // 8),
        min(fixed + max(_SECOND_TOUCH_BYTES, limit_bytes // LARGEST_GROWTH**3), limit_bytes // 3),
    )
    sizes = {_largest(lambda b, target=target: traced_peak_bytes(trace, b) <= target, smallest, largest_allowed) for target in targets}  # type: ignore[misc]
    touched = min(sizes)
    if len(sizes) == 1 and touched < largest_allowed:  # one point calibrates nothing
        companion = max(smallest, touched // 2) if touched > smallest else touched + 1
        sizes |= {companion} if traced_peak_bytes(trace, companion) <= limit_bytes else set()
    return tuple(sorted(sizes))


def touch_is_safe(trace: MemoryTrace, limit_bytes: int, points: Sequence[MemoryPoint], size: int) -> bool:
    """Whether a touch stays within the limit even if the device needs as many times the traced growth as is sane at all."""
    ran = [p for p in points if p.outcome is Outcome.RAN]
    if not ran or not trace.moments:
        return len(ran) == len(points)
    return len(ran) == len(points) and _pessimistic_use(trace, points[:1], ran[0])(size) <= limit_bytes


def next_attempt(
    trace: MemoryTrace, limit_bytes: int, points: Sequence[MemoryPoint], largest_allowed: int, *, largest_affordable: int | None = None
) -> int | None:
    """The next size to run on the way to the ceiling, or none when the largest that ran is the answer.

    Jump to the largest size whose calibrated use and a margin for the calibration's own error stay within the limit, at most
    ``LARGEST_GROWTH`` times the largest that ran. On a device whose use follows the trace exactly the margin is zero and the ceiling exact.
    A step up smaller than half the margin is not worth trying.
    Never go back to a size that failed, or above it: then halve the traced distance to the largest that ran.

    Args:
        trace: Allocations of a step.
        limit_bytes: The most that may be used, in bytes.
        points: Every attempt so far.
        largest_allowed: Cap on the size from the dataset or the user.
        largest_affordable: Cap on the size from the time that is left.
    """
    cap = min(largest_allowed, largest_affordable if largest_affordable is not None else largest_allowed)
    failed = min((p.micro_batch_size for p in points if p.outcome is not Outcome.RAN), default=None)
    if failed is not None:
        cap = min(cap, failed - 1)
    if cap < 1 or len(points) >= MAX_ATTEMPTS:
        return None
    ran = [p for p in points if p.outcome is Outcome.RAN and (failed is None or p.micro_batch_size < failed)]
    if not ran:
        return _first_attempt(trace, limit_bytes, cap, failed)
    largest = max(ran, key=lambda p: p.micro_batch_size)
    size = largest.micro_batch_size
    cap = min(cap, LARGEST_GROWTH * size)
    if failed is not None:
        cap = min(cap, _midpoint(trace, size, failed))
    margin = _margin(trace, points)
    needed = _pessimistic_use(trace, points, largest)
    candidate = _largest(lambda b: needed(b) + margin * max(needed(b), 0) <= limit_bytes, size, max(cap, size))
    if candidate <= size and len(ran) <= 2 and margin > 0:
        bare = _largest(lambda b: needed(b) <= limit_bytes, size, max(cap, size))
        candidate = _midpoint(trace, size, bare)
    resolution = max(0.01, margin / 2) if failed is not None or margin > 0 else 0.0
    return None if candidate <= (1 + resolution) * size else candidate


def fit_memory(measurements: MemoryMeasurements) -> MemoryCurve:
    """Memory use at any size, the largest size that ran, and what the memory is spent on.

    The ceiling is a size that ran; ``predicted_ceiling`` is the honest extrapolation of the calibrated trace and may exceed the cap.
    """
    trace, points = measurements.trace, measurements.points
    calibration = calibrate(trace, points)
    ran = [p for p in points if p.outcome is Outcome.RAN]
    ceiling = max((p.micro_batch_size for p in ran), default=None)
    at_one = max(calibration.used_bytes(_regressor(trace, 1)) if trace.moments or ran else 0, 0)
    predicted = _predicted_ceiling(measurements, calibration)
    shown = ceiling if ceiling is not None else 1
    measured = any(p.used_bytes is not None for p in points)
    peak = peak_moment(trace, shown) if trace.moments else None
    return MemoryCurve(
        status=_status(measurements, ceiling, at_one),
        ceiling=ceiling,
        ceiling_is_limit=measurements.stopped_by in ("limit", "failure"),
        predicted_ceiling=predicted,
        stopped_by=measurements.stopped_by,
        largest_allowed=measurements.largest_allowed,
        largest_allowed_source=measurements.largest_allowed_source,
        limit=measurements.limit,
        calibration_scale=calibration.scale if measured and trace.moments else None,
        calibration_offset_bytes=calibration.offset_bytes if measured and trace.moments else None,
        calibration_error=calibration.error if measured else None,
        bytes_at_one=at_one,
        points=points,
        curve=_curve(trace, calibration, max(shown, min(predicted or shown, 4 * shown))) if trace.moments or measured else (),
        shares=_shares(measurements, shown),
        peak_module=peak.module if peak else "",
        peak_operation=peak.operation if peak else "",
        recorded_on=trace.recorded_on,
        allocator=measurements.allocator,
        remarks=_remarks(measurements, calibration, ceiling, predicted),
    )


def _live_bytes(moment: LiveMoment, size: int) -> int:
    return moment.fixed_bytes + moment.per_sample_bytes * size + moment.per_sample_squared_bytes * size**2


def _regressor(trace: MemoryTrace, size: int) -> int:
    return traced_peak_bytes(trace, size) if trace.moments else size


def _is_sane(trace: MemoryTrace, scale: float, offset: float) -> bool:
    low, high = SANE_SCALES if trace.moments else (1.0, float("inf"))
    return low <= scale <= high and scale * _regressor(trace, 1) + offset >= 0


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Largest size in low..high for which ``fits`` holds, when it holds up to some size; ``low`` when it holds nowhere above."""
    if high <= low or not fits(low):
        return low
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _midpoint(trace: MemoryTrace, low: int, high: int) -> int:
    half = (_regressor(trace, low) + _regressor(trace, high)) / 2
    return _largest(lambda b: _regressor(trace, b) <= half, low, max(high - 1, low))


def _first_attempt(trace: MemoryTrace, limit_bytes: int, cap: int, failed: int | None) -> int | None:
    if failed is not None:
        return max(1, min(cap, failed // 2))
    touches = touch_sizes(trace, limit_bytes, cap)
    return touches[0] if touches else None


def _pessimistic_use(trace: MemoryTrace, points: Sequence[MemoryPoint], largest: MemoryPoint) -> Callable[[int], int]:
    """The larger of the calibrated line and the line of the same slope through the largest size that ran.

    A single measured size tells no slope: then the steepest sane one is assumed, so that the second size is safe whatever the truth.
    """
    calibration = calibrate(trace, points)
    traced = _regressor(trace, largest.micro_batch_size)
    if trace.moments and sum(p.used_bytes is not None for p in points) == 1:
        return lambda b: round((largest.used_bytes or 0) + SANE_SCALES[1] * (_regressor(trace, b) - traced))
    lift = max((largest.used_bytes or 0) - calibration.used_bytes(traced), 0)
    return lambda b: calibration.used_bytes(_regressor(trace, b)) + lift


def _margin(trace: MemoryTrace, points: Sequence[MemoryPoint]) -> float:
    """Share of the predicted use to leave free: half as much again as the calibration's own error, zero where it is exact.

    The error is how badly the smaller sizes foretold the largest, or the line misses the largest two, whichever is worse.
    """
    measured = sorted((p for p in points if p.used_bytes is not None), key=lambda p: p.micro_batch_size)
    if len(measured) == 1 and trace.moments:
        return 0.0  # the steepest sane slope is assumed already
    if len(measured) < 2 or (len(measured) == 2 and not trace.moments):
        return _ERROR_OF_ONE_POINT
    calibration, earlier = calibrate(trace, measured), calibrate(trace, measured[:-1])
    misses = [_miss(earlier, trace, measured[-1]), *(_miss(calibration, trace, p) for p in measured[-2:])]
    error = max(misses)
    if error <= _DETERMINISTIC_ERROR:
        return 0.0
    return min(max(_MARGIN_PER_ERROR * error, _SMALLEST_NOISY_MARGIN), _LARGEST_MARGIN)


def _miss(calibration: Calibration, trace: MemoryTrace, point: MemoryPoint) -> float:
    used = point.used_bytes or 0
    return abs(calibration.used_bytes(_regressor(trace, point.micro_batch_size)) - used) / max(used, 1)


def _predicted_ceiling(measurements: MemoryMeasurements, calibration: Calibration) -> int | None:
    trace, limit_bytes = measurements.trace, measurements.limit.limit_bytes
    if not trace.moments or calibration.used_bytes(traced_peak_bytes(trace, 1)) > limit_bytes:
        return None
    failed = min((p.micro_batch_size for p in measurements.points if p.outcome is not Outcome.RAN), default=LARGEST_SIZE + 1)
    if failed == 1:
        return None
    return _largest(lambda b: calibration.used_bytes(traced_peak_bytes(trace, b)) <= limit_bytes, 1, failed - 1)


def _status(measurements: MemoryMeasurements, ceiling: int | None, at_one: int) -> Status:
    if ceiling is None:
        one_failed = any(p.micro_batch_size == 1 and p.outcome is not Outcome.RAN for p in measurements.points)
        return Status.NOTHING_FITS if one_failed or at_one > measurements.limit.limit_bytes else Status.INDETERMINATE
    return Status.INCONSISTENT if measurements.trace.moments and not measurements.trace.consistent else Status.OK


def _curve(trace: MemoryTrace, calibration: Calibration, largest: int) -> tuple[tuple[int, int], ...]:
    sizes = np.unique(np.round(np.geomspace(1, max(2, largest), _CURVE_POINTS)).astype(np.int64))
    return tuple((int(b), max(calibration.used_bytes(_regressor(trace, int(b))), 0)) for b in sizes)


def _shares(measurements: MemoryMeasurements, size: int) -> tuple[MemoryShare, ...]:
    trace = measurements.trace
    used = next((p.used_bytes for p in measurements.points if p.micro_batch_size == size and p.used_bytes is not None), 0)
    peak = traced_peak_bytes(trace, size) if trace.moments else used
    known = (
        MemoryShare(name="parameters", size_bytes=trace.parameter_bytes),
        MemoryShare(name="gradients", size_bytes=trace.gradient_bytes),
        MemoryShare(name="optimizer state", size_bytes=trace.optimizer_state_bytes),
        MemoryShare(name="buffers", size_bytes=trace.buffer_bytes),
        MemoryShare(name="inputs", size_bytes=trace.input_bytes_per_sample * size),
    )
    rest = max(peak - sum(share.size_bytes for share in known), 0)
    return (*known, MemoryShare(name="activations and temporaries", size_bytes=rest))


def _remarks(measurements: MemoryMeasurements, calibration: Calibration, ceiling: int | None, predicted: int | None) -> tuple[str, ...]:
    trace, limit = measurements.trace, measurements.limit
    remarks = [trace.remark] if trace.remark else []
    if not trace.moments:
        remarks.append("No trace could be recorded: the ceiling was searched for, and nothing is known beyond the sizes that ran.")
    elif not trace.consistent:
        remarks.append("The recordings disagree on how some allocations grow with the size: trust the sizes that ran, not the curve.")
    if calibration.error > 0.1:
        remarks.append(f"Measured and calibrated use differ by up to {format_percent(calibration.error)}: the predicted ceiling is rough.")
    if ceiling is None and trace.moments and traced_peak_bytes(trace, 1) > limit.limit_bytes:
        peak = peak_moment(trace, 1)
        where = f" in {peak.module}" if peak.module else ""
        remarks.append(
            f"One sample needs {format_bytes(traced_peak_bytes(trace, 1))} at its peak{where} ({peak.operation}); "
            f"the limit is {format_bytes(limit.limit_bytes)} ({limit.source})."
        )
    if ceiling is not None and measurements.stopped_by == "cap" and predicted is not None and predicted > ceiling:
        remarks.append(
            f"The search stopped at {ceiling} ({measurements.largest_allowed_source}); memory alone would allow about {predicted}."
        )
    if ceiling is not None and measurements.stopped_by == "budget":
        remarks.append(f"The time budget ended the search at {ceiling}; a larger --budget tries larger sizes.")
    return tuple(remarks)
