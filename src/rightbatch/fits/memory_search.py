"""Which size to try next on the way to the memory ceiling: touch, approach, prove."""

import math
from collections.abc import Callable, Collection, Sequence

from rightbatch.fits.memory import (
    SANE_SCALES,
    Calibration,
    calibrate,
    largest_that,
    readings,
    recorded_use,
    regressor,
    traced_peak_bytes,
)
from rightbatch.records.measurements import MemoryPoint, MemoryTrace, Outcome
from rightbatch.units import MIB

MAX_ATTEMPTS = 5
"""Sizes that are tried in all, touches included, the proof apart."""
LARGEST_GROWTH = 8
"""No attempt is larger than this many times the largest size that ran."""
_VISIBLE_BYTES = 64 * MIB
"""Traced growth that stands out from the granularity of a resident set."""
_ERROR_OF_ONE_POINT = 0.1
_LARGEST_MARGIN = 0.25
_LEAST_STEP = 0.01
"""On a device that is not exact no smaller step up is tried."""
_OWN_ERROR = 0.02
"""Added in quadrature to what readings differ by: noisy ones can agree by chance."""
_OWN_ERROR_OF_REFUSALS = 0.25
"""The same where going over the limit is refused in the middle of a step, by an allocator whose use varies that much by itself: glibc's
malloc at its defaults took 276 to 359 MiB of address space for the same steps, in four fresh processes."""
_HEAP_BYTES = 64 * MIB
"""glibc's malloc reserves address space for a thread in heaps of so much (HEAP_MAX_SIZE); backward runs on a thread of its own."""
_DETERMINISTIC_ERROR = 1e-6
_ROUNDING_BYTES = 2
"""Both a line's value and a use that is a fraction of bytes are rounded to whole ones."""


def touch_sizes(trace: MemoryTrace, limit_bytes: int, largest_allowed: int, *, is_refused: bool = False) -> tuple[int, ...]:
    """One or two small sizes to run first.

    Where use was measured while recording, one size is enough: the largest that fits even if the device needs as many times the traced
    growth as is sane at all. Otherwise two, large enough to be seen above the granularity of a resident set: the first adds about 64 MiB to
    what the step holds at no samples at all, but traces to no more than an eighth of the limit; the second is an eighth of the size that
    traces to the limit, so that one jump of the allowed growth reaches the ceiling from there.

    Args:
        trace: Allocations of a step.
        limit_bytes: The most that may be used, in bytes.
        largest_allowed: Cap on the size from elsewhere.
        is_refused: Whether the kernel refuses what is over the limit, in the middle of a step, to an allocator of no fixed use; then the
            first size leaves free what that use varies by, and one heap.

    Returns:
        Ascending sizes, at least 2 where that is allowed and traced to fit (batch normalisation cannot train on one sample); empty when not
        even one sample is traced to fit.
    """
    if traced_peak_bytes(trace, 1) > limit_bytes:
        return ()
    smallest = 2 if largest_allowed >= 2 and traced_peak_bytes(trace, 2) <= limit_bytes else 1
    if not trace.moments:
        return tuple(sorted({smallest, min(2 * smallest, largest_allowed)}))
    recorded = recorded_use(trace)
    if recorded:
        steepest = _steepest_use(trace, *recorded[-1])
        safe_bytes = min(limit_bytes / (1 + _OWN_ERROR_OF_REFUSALS), limit_bytes - _HEAP_BYTES) if is_refused else limit_bytes
        return (largest_that(lambda b: max(steepest(b), traced_peak_bytes(trace, b)) <= safe_bytes, smallest, largest_allowed),)

    def within(target_bytes: int) -> int:
        return largest_that(lambda b: traced_peak_bytes(trace, b) <= target_bytes, smallest, largest_allowed)

    fixed = traced_peak_bytes(trace, 0)
    seen = within(min(fixed + _VISIBLE_BYTES, limit_bytes // 8))
    wanted = max(within(fixed + 2 * _VISIBLE_BYTES), -(-within(limit_bytes) // LARGEST_GROWTH))
    sizes = {seen, max(smallest, min(wanted, within(limit_bytes)))}
    touched = min(sizes)
    if len(sizes) == 1 and touched < largest_allowed:  # one point calibrates nothing
        companion = max(smallest, touched // 2) if touched > smallest else touched + 1
        sizes |= {companion} if traced_peak_bytes(trace, companion) <= limit_bytes else set()
    return tuple(sorted(sizes))


def safe_touch(trace: MemoryTrace, limit_bytes: int, points: Sequence[MemoryPoint], size: int) -> int:
    """The touch that is wanted, or the largest that is safe even if the device needs as many times the traced growth as is sane at all.

    Args:
        trace: Allocations of a step.
        limit_bytes: The most that may be used, in bytes.
        points: Every attempt so far.
        size: The touch that is wanted.

    Returns:
        A size; 0 where none above the first touch is safe.
    """
    ran = [p for p in points if p.outcome is Outcome.RAN]
    if len(ran) < len(points):
        return 0
    if not ran or not trace.moments:
        return size
    first = ran[0].micro_batch_size
    steepest = _steepest_use(trace, first, ran[0].used_bytes or 0)
    safe = largest_that(lambda b: steepest(b) <= limit_bytes, first, size)
    return safe if safe > first else 0


def next_attempt(
    trace: MemoryTrace,
    limit_bytes: int,
    points: Sequence[MemoryPoint],
    largest_allowed: int,
    *,
    largest_affordable: int | None = None,
    is_refused: bool = False,
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
        is_refused: Whether the kernel refuses what is over the limit, in the middle of a step, to an allocator of no fixed use; then a
            quarter is left free, and use is taken to grow in proportion to the trace at least.
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
    margin = _margin(trace, points, _OWN_ERROR_OF_REFUSALS if is_refused else _OWN_ERROR)
    needed = _pessimistic_use(trace, points, largest, is_refused=is_refused)
    candidate = largest_that(lambda b: needed(b) + margin * max(needed(b), 0) <= limit_bytes, size, max(cap, size))
    resolution = max(_LEAST_STEP, margin / 2) if failed is not None or margin > 0 else 0.0
    if candidate <= (1 + resolution) * size and len(ran) <= 2 and not _error_is_known(trace, points):
        line = calibrate(trace, points)
        bare = largest_that(lambda b: line.used_bytes(regressor(trace, b)) <= limit_bytes, size, max(cap, size))
        candidate, resolution = _midpoint(trace, size, bare + 1), 0.0  # a third reading tells whether the device follows the line
    return None if candidate <= (1 + resolution) * size else candidate


def _midpoint(trace: MemoryTrace, low: int, high: int) -> int:
    half = (regressor(trace, low) + regressor(trace, high)) / 2
    return largest_that(lambda b: regressor(trace, b) <= half, low, max(high - 1, low))


def _first_attempt(trace: MemoryTrace, limit_bytes: int, cap: int, failed: int | None) -> int | None:
    if failed is not None:
        return max(1, min(cap, failed // 2))
    touches = touch_sizes(trace, limit_bytes, cap)
    return touches[0] if touches else None


def _pessimistic_use(trace: MemoryTrace, points: Sequence[MemoryPoint], largest: MemoryPoint, *, is_refused: bool) -> Callable[[int], int]:
    """The larger of the calibrated line, the line of the same slope through the largest size that ran, and one that grows as the trace.

    A line that fits every reading exactly is taken as it is.
    Before anything tells a slope the steepest sane one is assumed, so that the next size is safe whatever the truth.
    """
    used, traced = largest.used_bytes or 0, regressor(trace, largest.micro_batch_size)
    if not _tells_a_slope(trace, points):
        return _steepest_use(trace, largest.micro_batch_size, used)
    calibration = calibrate(trace, points)
    if _is_exact(trace, points):
        return lambda b: calibration.used_bytes(regressor(trace, b))
    lift = max(used - calibration.used_bytes(traced), 0)
    slope = 1.0 if trace.moments else 0.0  # what is traced is held, so a flatter line is noise
    if is_refused:
        slope = max(slope, used / max(traced, 1))

    def needed(size: int) -> int:
        x = regressor(trace, size)
        return max(calibration.used_bytes(x) + lift, round(used + slope * (x - traced)) if x > traced else 0)

    return needed


def _steepest_use(trace: MemoryTrace, size: int, used_bytes: int) -> Callable[[int], int]:
    traced = regressor(trace, size)
    return lambda b: round(used_bytes + SANE_SCALES[1] * (regressor(trace, b) - traced))


def _tells_a_slope(trace: MemoryTrace, points: Sequence[MemoryPoint]) -> bool:
    """Whether two attempts were measured, or one that traces far above what was recorded."""
    measured = [p for p in points if p.used_bytes is not None]
    if len(measured) != 1 or not trace.moments or _is_exact(trace, points):
        return True
    recorded = recorded_use(trace)
    return bool(recorded) and regressor(trace, measured[0].micro_batch_size) - regressor(trace, recorded[-1][0]) >= _VISIBLE_BYTES


def _is_exact(trace: MemoryTrace, points: Sequence[MemoryPoint]) -> bool:
    """Whether one line goes through the measured use of three sizes and more: chance does not do that, so the device follows the trace."""
    measured = {*zip(trace.batch_sizes, trace.used_bytes, strict=False), *readings(trace, points)}
    line = calibrate(trace, points)
    misses = ((abs(line.used_bytes(regressor(trace, size)) - used), used) for size, used in measured)
    return len({size for size, _ in measured}) > 2 and all(
        miss <= max(_ROUNDING_BYTES, _DETERMINISTIC_ERROR * used) for miss, used in misses
    )


def _error_is_known(trace: MemoryTrace, points: Sequence[MemoryPoint]) -> bool:
    """Whether a line foretold the last attempt, so that what it missed is the error of a line and not of a guessed slope."""
    return _is_exact(trace, points) or (bool(recorded_use(trace)) and _tells_a_slope(trace, points))


def _was_measured(points: Sequence[MemoryPoint], size: int) -> bool:
    return any(point.micro_batch_size == size and point.used_bytes is not None for point in points)


def _margin(trace: MemoryTrace, points: Sequence[MemoryPoint], own_error: float) -> float:
    """Share of the predicted use to leave free: for the calibration's own error, and none where it is exact.

    The error is how badly the smaller sizes foretold the largest, or the line misses the largest two, whichever is worse.
    """
    if _is_exact(trace, points) or not _tells_a_slope(trace, points):
        return 0.0  # the steepest sane slope is assumed already
    measured = sorted((p for p in points if p.used_bytes is not None), key=lambda p: p.micro_batch_size)
    if len(measured) < 2 or (len(measured) == 2 and not trace.moments):
        return max(_ERROR_OF_ONE_POINT, own_error)
    foretold = _worst_miss(calibrate(trace, measured[:-1]), trace, readings(trace, measured)[-1:])
    error = max(foretold, _worst_miss(calibrate(trace, measured), trace, readings(trace, measured)[-2:]))
    return min(math.hypot(error, own_error), _LARGEST_MARGIN)


def _worst_miss(calibration: Calibration, trace: MemoryTrace, measured: Collection[tuple[int, int]]) -> float:
    """Largest distance between measured and calibrated use, over that use."""
    return max(abs(calibration.used_bytes(regressor(trace, size)) - used) / max(used, 1) for size, used in measured)
