"""Which size to try next on the way to the memory ceiling: touch, approach, prove."""

from collections.abc import Callable, Sequence

from rightbatch.fits.memory import SANE_SCALES, Calibration, calibrate, largest_that, regressor, traced_peak_bytes
from rightbatch.records.measurements import MemoryPoint, MemoryTrace, Outcome
from rightbatch.units import MIB

MAX_ATTEMPTS = 6
"""Sizes that are tried in all, touches included, the proof apart."""
LARGEST_GROWTH = 8
"""No attempt is larger than this many times the largest size that ran."""
_FIRST_TOUCH_BYTES = 64 * MIB
_ERROR_OF_ONE_POINT = 0.1
_LARGEST_MARGIN = 0.25
_SMALLEST_NOISY_MARGIN = 0.01
_MARGIN_PER_ERROR = 1.0
_DETERMINISTIC_ERROR = 1e-6


def touch_sizes(trace: MemoryTrace, limit_bytes: int, largest_allowed: int) -> tuple[int, ...]:
    """One or two small sizes to run first, large enough to be seen above the granularity of a resident set.

    The first adds about 64 MiB to what the step holds at no samples at all, but traces to no more than an eighth of the limit. The second
    is an eighth of the size that traces to the limit, so that one jump of the allowed growth reaches the ceiling from there.

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

    def within(target_bytes: int) -> int:
        return largest_that(lambda b: traced_peak_bytes(trace, b) <= target_bytes, smallest, largest_allowed)

    fixed = traced_peak_bytes(trace, 0)
    seen = within(min(fixed + _FIRST_TOUCH_BYTES, limit_bytes // 8))
    wanted = max(within(fixed + 2 * _FIRST_TOUCH_BYTES), -(-within(limit_bytes) // LARGEST_GROWTH))
    sizes = {seen, max(smallest, min(wanted, within(limit_bytes // 2)))}
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
    Never go back to a size that failed, or above it. One whose use was measured has improved the line; after one that only failed, halve
    the traced distance to the largest that ran.

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
    if failed is not None and not _was_measured(points, failed):
        cap = min(cap, _midpoint(trace, size, failed))
    margin = _margin(trace, points)
    needed = _pessimistic_use(trace, points, largest)
    candidate = largest_that(lambda b: needed(b) + margin * max(needed(b), 0) <= limit_bytes, size, max(cap, size))
    if candidate <= size and len(ran) <= 2 and margin > 0:
        bare = largest_that(lambda b: needed(b) <= limit_bytes, size, max(cap, size))
        candidate = _midpoint(trace, size, bare)
    resolution = max(0.01, margin / 2) if failed is not None or margin > 0 else 0.0
    return None if candidate <= (1 + resolution) * size else candidate


def _midpoint(trace: MemoryTrace, low: int, high: int) -> int:
    half = (regressor(trace, low) + regressor(trace, high)) / 2
    return largest_that(lambda b: regressor(trace, b) <= half, low, max(high - 1, low))


def _first_attempt(trace: MemoryTrace, limit_bytes: int, cap: int, failed: int | None) -> int | None:
    if failed is not None:
        return max(1, min(cap, failed // 2))
    touches = touch_sizes(trace, limit_bytes, cap)
    return touches[0] if touches else None


def _pessimistic_use(trace: MemoryTrace, points: Sequence[MemoryPoint], largest: MemoryPoint) -> Callable[[int], int]:
    """The larger of the calibrated line, the line of the same slope through the largest size that ran, and one that grows as the trace.

    A single measured size tells no slope: then the steepest sane one is assumed, so that the second size is safe whatever the truth.
    """
    calibration = calibrate(trace, points)
    traced = regressor(trace, largest.micro_batch_size)
    if trace.moments and sum(p.used_bytes is not None for p in points) == 1:
        return lambda b: round((largest.used_bytes or 0) + SANE_SCALES[1] * (regressor(trace, b) - traced))
    used = largest.used_bytes or 0
    lift = max(used - calibration.used_bytes(traced), 0)
    slope = 1 if trace.moments else 0  # what is traced is held, so a flatter line is noise

    def needed(size: int) -> int:
        x = regressor(trace, size)
        return max(calibration.used_bytes(x) + lift, used + slope * (x - traced) if x > traced else 0)

    return needed


def _was_measured(points: Sequence[MemoryPoint], size: int) -> bool:
    return any(point.micro_batch_size == size and point.used_bytes is not None for point in points)


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
    return abs(calibration.used_bytes(regressor(trace, point.micro_batch_size)) - used) / max(used, 1)
