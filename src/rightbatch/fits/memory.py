"""Memory: from a trace and a few sizes that ran to bytes at any size, the next size to try, and the ceiling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.fits.caching_allocator import smooth_ceiling
from rightbatch.records.estimates import Certificate, MemoryAlternative, MemoryCurve, MemoryHolder, MemoryShare, Status
from rightbatch.records.measurements import (
    AllocationKind,
    AllocationTable,
    LiveMoment,
    MemoryMeasurements,
    MemoryPoint,
    MemoryTrace,
    Outcome,
    RoundedBytes,
)
from rightbatch.units import format_bytes, format_percent

LARGEST_SIZE = 2**40
"""No ceiling is searched for above this size."""
SANE_SCALES = (0.5, 4.0)
"""A calibration outside this range is noise: the trace counts the same tensors that the device holds."""
_CURVE_POINTS = 40
_LARGEST_HOLDERS = 8


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
    """Peak live bytes at ``micro_batch_size``: the most over the moments that exist at this size.

    Returns:
        Bytes; 0 for a trace without moments.
    """
    return max((_live_bytes(moment, micro_batch_size) for moment in _moments_at(trace, micro_batch_size)), default=0)


def peak_moment(trace: MemoryTrace, micro_batch_size: int) -> LiveMoment:
    """The moment with the most live bytes at ``micro_batch_size``.

    Raises:
        ValueError: The trace has no moments.
    """
    if not trace.moments:
        raise ValueError("a trace with at least one moment is needed to name the peak; got none: check trace.moments first.")
    return max(_moments_at(trace, micro_batch_size), key=lambda moment: _live_bytes(moment, micro_batch_size))


def sizes_bytes(table: AllocationTable, micro_batch_size: int) -> list[int]:
    """Return the bytes of every allocation of a table at one size."""
    cubed = table.per_sample_cubed_bytes or (0,) * len(table.fixed_bytes)
    columns = zip(table.fixed_bytes, table.per_sample_bytes, table.per_sample_squared_bytes, cubed, table.rounding_bytes, strict=True)
    b = micro_batch_size
    return [
        -(-(fixed + b * (slope + b * (squared + b * cube))) // rounding) * rounding for fixed, slope, squared, cube, rounding in columns
    ]


def live_at_peak(table: AllocationTable, micro_batch_size: int) -> dict[int, int]:
    """Return the bytes of each allocation that is live at the peak, by its place in the table."""
    sizes = sizes_bytes(table, micro_batch_size)
    dying: dict[int, list[int]] = {}
    live, peak, peak_place = 0, -1, 0
    for index, (size_bytes, death) in enumerate(zip(sizes, table.death, strict=True)):
        live += size_bytes - sum(sizes[dead] for dead in dying.pop(index, ()))
        if death >= 0:
            dying.setdefault(death, []).append(index)
        if live > peak:
            peak, peak_place = live, index
    return {index: sizes[index] for index in range(peak_place + 1) if table.death[index] < 0 or table.death[index] > peak_place}


def calibrate(trace: MemoryTrace, points: Sequence[MemoryPoint]) -> Calibration:
    """Fit used = scale * trace(b) + offset to the recordings and attempts whose use was measured.

    One size: scale 1. Two or more: least squares with weights trace(b)**2, so that the sizes nearest to the limit count most; exact
    when the sizes are exactly affine in the trace. A fitted scale outside ``SANE_SCALES``, or a line below zero at one sample, is
    noise: then scale 1 with the weighted mean offset, and ``error`` shows how badly that fits.

    Args:
        trace: Allocations of a step; without moments the line is in b itself.
        points: Attempts; those without a measured use are ignored.

    Returns:
        The line; scale 1, offset 0, error 0 without any measured size.
    """
    measured = readings(trace, points)
    if not measured:
        return Calibration(1.0, 0.0, 0.0)
    x = np.array([regressor(trace, size) for size, _ in measured], dtype=np.float64)
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


def readings(trace: MemoryTrace, points: Sequence[MemoryPoint]) -> list[tuple[int, int]]:
    """Return sizes and their measured use: of the attempts, and beside one at least of the recordings, by ascending size."""
    attempted = [(p.micro_batch_size, p.used_bytes) for p in points if p.used_bytes is not None]
    return sorted([*recorded_use(trace), *attempted]) if attempted else []


def recorded_use(trace: MemoryTrace) -> list[tuple[int, int]]:
    """Return sizes and measured use of the recordings; without the first one, during which a process loads the code of its kernels."""
    if not trace.moments or not trace.used_bytes:
        return []
    return [(size, used) for size, used in zip(trace.batch_sizes, trace.used_bytes, strict=True) if size != trace.warm_up_size]


def regressor(trace: MemoryTrace, micro_batch_size: int) -> int:
    """What use is fitted against: the traced peak in bytes, or the size itself where nothing was traced."""
    return traced_peak_bytes(trace, micro_batch_size) if trace.moments else micro_batch_size


def largest_that(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest size in low..high for which ``fits`` holds, when it holds up to some size; ``low`` when it holds nowhere above."""
    if high <= low or not fits(low):
        return low
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fit_memory(measurements: MemoryMeasurements) -> MemoryCurve:
    """Memory use at any size, the largest size that ran, and what the memory is spent on.

    The ceiling is a size that ran; ``predicted_ceiling`` is the honest extrapolation of the calibrated trace and may exceed the cap.
    """
    trace, points = measurements.trace, measurements.points
    calibration = calibrate(trace, points)
    ran = [p for p in points if p.outcome is Outcome.RAN]
    ceiling = max((p.micro_batch_size for p in ran), default=None)
    at_one = max(calibration.used_bytes(regressor(trace, 1)) if trace.moments or ran else 0, 0)
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
        holders=_holders(trace, shown),
        accumulation_ceiling=_other_ceiling(measurements, measurements.accumulation_trace, calibration, ceiling),
        evaluation_ceiling=_other_ceiling(measurements, measurements.evaluation_trace, calibration, None),
        smooth_ceiling=_smooth_ceiling(measurements),
        alternatives=_alternatives(measurements, calibration, shown),
        certificate=_certificate(points, ceiling),
    )


def _live_bytes(moment: LiveMoment, size: int) -> int:
    return _polynomial(moment, size) + sum(
        -(-_polynomial(term, size) // term.multiple_bytes) * term.multiple_bytes for term in moment.rounded
    )


def _polynomial(term: LiveMoment | RoundedBytes, size: int) -> int:
    squared, cubed = term.per_sample_squared_bytes * size**2, term.per_sample_cubed_bytes * size**3
    return term.fixed_bytes + term.per_sample_bytes * size + squared + cubed


def _moments_at(trace: MemoryTrace, size: int) -> list[LiveMoment]:
    return [m for m in trace.moments if m.smallest_size <= max(size, 1) and (m.largest_size is None or size <= m.largest_size)]


def _is_sane(trace: MemoryTrace, scale: float, offset: float) -> bool:
    low, high = SANE_SCALES if trace.moments else (1.0, float("inf"))
    return low <= scale <= high and scale * regressor(trace, 1) + offset >= 0


def _predicted_ceiling(measurements: MemoryMeasurements, calibration: Calibration) -> int | None:
    trace, limit_bytes = measurements.trace, measurements.limit.limit_bytes
    if not trace.moments or calibration.used_bytes(traced_peak_bytes(trace, 1)) > limit_bytes:
        return None
    failed = min((p.micro_batch_size for p in measurements.points if p.outcome is not Outcome.RAN), default=LARGEST_SIZE + 1)
    if failed == 1:
        return None
    return largest_that(lambda b: calibration.used_bytes(traced_peak_bytes(trace, b)) <= limit_bytes, 1, failed - 1)


def _status(measurements: MemoryMeasurements, ceiling: int | None, at_one: int) -> Status:
    if ceiling is None:
        one_failed = any(p.micro_batch_size == 1 and p.outcome is not Outcome.RAN for p in measurements.points)
        return Status.NOTHING_FITS if one_failed or at_one > measurements.limit.limit_bytes else Status.INDETERMINATE
    return Status.INCONSISTENT if measurements.trace.moments and not measurements.trace.consistent else Status.OK


def _curve(trace: MemoryTrace, calibration: Calibration, largest: int) -> tuple[tuple[int, int], ...]:
    sizes = np.unique(np.round(np.geomspace(1, max(2, largest), _CURVE_POINTS)).astype(np.int64))
    return tuple((int(b), max(calibration.used_bytes(regressor(trace, int(b))), 0)) for b in sizes)


def _shares(measurements: MemoryMeasurements, size: int) -> tuple[MemoryShare, ...]:
    trace = measurements.trace
    used = next((p.used_bytes for p in measurements.points if p.micro_batch_size == size and p.used_bytes is not None), 0)
    if trace.allocations is not None:
        kinds = dict.fromkeys(AllocationKind, 0)
        for index, bytes_ in live_at_peak(trace.allocations, size).items():
            kinds[trace.allocations.kind[index]] += bytes_
        return tuple(MemoryShare(name=kind.value, size_bytes=bytes_) for kind, bytes_ in kinds.items() if bytes_)
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


def _holders(trace: MemoryTrace, size: int) -> tuple[MemoryHolder, ...]:
    """Modules by what of theirs is live at the peak, largest first, each with its operation that holds most."""
    table = trace.allocations
    if table is None:
        return ()
    held: dict[tuple[int, int], int] = {}
    for index, bytes_ in live_at_peak(table, size).items():
        place = (table.module[index], table.operation[index])
        held[place] = held.get(place, 0) + bytes_
    modules: dict[int, list[tuple[int, int]]] = {}
    for (module, operation), bytes_ in held.items():
        modules.setdefault(module, []).append((bytes_, operation))
    ranked = sorted(modules.items(), key=lambda entry: -sum(bytes_ for bytes_, _ in entry[1]))
    return tuple(
        MemoryHolder(
            module=table.modules[module],
            operation=table.operations[max(parts)[1]],
            size_bytes=sum(bytes_ for bytes_, _ in parts),
        )
        for module, parts in ranked[:_LARGEST_HOLDERS]
    )


def _other_ceiling(
    measurements: MemoryMeasurements, trace: MemoryTrace | None, calibration: Calibration, at_most: int | None
) -> int | None:
    """Largest size that fits by another trace of the same workload under the same calibration; none when it was not traced or none fits.

    Above ``at_most`` nothing is claimed: a size that did not run alone does not run beside more.
    """
    if trace is None or not trace.moments or not measurements.trace.moments:
        return None
    limit_bytes = measurements.limit.limit_bytes

    def fits(size: int) -> bool:
        return calibration.used_bytes(traced_peak_bytes(trace, size) + measurements.bucket_bytes) <= limit_bytes

    if not fits(1):
        return None
    found = largest_that(fits, 1, LARGEST_SIZE)
    return found if at_most is None else min(found, at_most)


def _smooth_ceiling(measurements: MemoryMeasurements) -> int | None:
    """Largest size that a CUDA caching allocator is predicted to run without freeing its cache and retrying."""
    if not measurements.allocator.startswith("cuda") or measurements.trace.allocations is None:
        return None
    return smooth_ceiling(measurements.trace.allocations, measurements.limit.limit_bytes - measurements.bucket_bytes)


def _alternatives(measurements: MemoryMeasurements, calibration: Calibration, size: int) -> tuple[MemoryAlternative, ...]:
    return tuple(
        MemoryAlternative(
            change=other.change,
            peak_bytes=max(calibration.used_bytes(traced_peak_bytes(other.trace, size)), 0),
            predicted_ceiling=_other_ceiling(measurements, other.trace, calibration, None),
        )
        for other in measurements.alternatives
    )


def _certificate(points: Sequence[MemoryPoint], ceiling: int | None) -> Certificate | None:
    """What the last proof says about the ceiling; none when none was tried, and when it was not one sample above."""
    proofs = [point for point in points if point.purpose == "proof"]
    if not proofs or ceiling is None:
        return None
    last = proofs[-1]
    holds = last.outcome is not Outcome.RAN and last.micro_batch_size == ceiling + 1
    return Certificate(micro_batch_size=last.micro_batch_size, outcome=last.outcome, holds=holds)


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
