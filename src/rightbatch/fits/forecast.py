"""From a trace and the memory of GPUs that are not here to the sizes that should fit on them."""

from collections.abc import Sequence

from rightbatch.fits.caching_allocator import LARGEST_SIZE, Recording, hard_ceiling, smooth_ceiling
from rightbatch.fits.gpus import LARGEST_CONTEXT_BYTES, LEAST_CONTEXT_BYTES, LIKELY_CONTEXT_BYTES, Gpu
from rightbatch.fits.memory import peak_moment
from rightbatch.records.estimates import GpuCeiling, MemoryForecast
from rightbatch.records.measurements import AllocationKind, AllocationTable, MemoryTrace
from rightbatch.units import format_bytes

LIKELY_WORKSPACE, LARGEST_WORKSPACE = 1, 2
"""Bytes of scratch that a convolution takes, as a multiple of its result; the least is none."""
_CONVOLUTION = "convolution"


_RANGE_TOLERANCE = 0.004
"""The ends of the range are found to this share: they stand for guesses that are far rougher."""
_WORTH_SAYING = 1.05
"""Expandable segments are spoken of when they raise a ceiling by this factor at least."""


def forecast(trace: MemoryTrace, gpus: Sequence[Gpu], *, largest: int = LARGEST_SIZE, train_size: int | None = None) -> MemoryForecast:
    """Forecast the largest micro-batch on every GPU by replaying its caching allocator.

    The value takes a context of the usual size and, at every convolution, scratch memory as large as its result: cuDNN's tensor-core
    kernels copy input and output into another layout. ``low`` is the least ceiling with the largest context and scratch of no, one and two
    times the result, ``high`` the greatest with the smallest context. More scratch can raise a ceiling, because the cached blocks that it
    leaves behind serve later requests; hence all three at both ends. The range is this choice of assumptions, no statistical interval.

    Args:
        trace: The step, recorded as it would run on CUDA.
        gpus: Where it is to run.
        largest: Cap on the size from elsewhere.
        train_size: Samples in the training set; none when it is not known.

    Returns:
        One ceiling a GPU; none when the trace holds no allocations, with the reason among the remarks.
    """
    recorded_on = trace.recorded_on if trace.recorded_on != "device" else "cpu"
    if trace.allocations is None or not trace.allocations.death or recorded_on == "none":
        reason = trace.remark or "The recording holds no allocations."
        return MemoryForecast(
            recorded_on="none", consistent=False, ceilings=(), bytes_at_one=0, peak_module="", peak_operation="", remarks=(reason,)
        )
    tables = [with_workspaces(trace.allocations, factor) for factor in range(LARGEST_WORKSPACE + 1)]
    recordings = [Recording(table) for table in tables]
    ceilings = tuple(_ceiling(recordings, gpu, largest) for gpu in gpus)
    expandable = Recording(tables[LIKELY_WORKSPACE], expandable_segments=True)
    shown = max((ceiling.smooth_ceiling or 1 for ceiling in ceilings), default=1)
    peak = peak_moment(trace, shown) if trace.moments else None
    return MemoryForecast(
        recorded_on=recorded_on,
        consistent=trace.consistent,
        ceilings=ceilings,
        bytes_at_one=recordings[LIKELY_WORKSPACE].at(1).peak_reserved_bytes,
        peak_module=peak.module if peak else "",
        peak_operation=peak.operation if peak else "",
        remarks=(
            *_remarks(trace, ceilings, largest),
            *_expandable_remark(expandable, ceilings, largest),
            *_dataset_remark(ceilings, train_size),
        ),
    )


def with_workspaces(table: AllocationTable, factor: int) -> AllocationTable:
    """Add scratch memory behind every result of a convolution: ``factor`` times as large, freed before the next allocation.

    Args:
        table: The recorded allocations.
        factor: Multiple of the result's bytes; 0 leaves the table as it is.
    """
    marked = {index for index, name in enumerate(table.operations) if _CONVOLUTION in name}
    if not factor or not marked:
        return table
    added_before = [0]
    for operation in table.operation:
        added_before.append(added_before[-1] + (operation in marked))
    names = ("fixed", "per_sample", "squared", "cubed", "rounding", "death", "module", "operation")
    columns: dict[str, list[int]] = {name: [] for name in names}
    cubed = table.per_sample_cubed_bytes or (0,) * len(table.fixed_bytes)
    kinds: list[AllocationKind] = []
    for index, operation in enumerate(table.operation):
        law = (table.fixed_bytes[index], table.per_sample_bytes[index], table.per_sample_squared_bytes[index], cubed[index])
        death = table.death[index]
        rows = [(1, death if death < 0 else death + added_before[death], table.kind[index])]
        if operation in marked:
            rows.append((factor, index + added_before[index] + 2, AllocationKind.TEMPORARY))
        for multiple, new_death, kind in rows:
            values = (*(multiple * part for part in law), table.rounding_bytes[index], new_death, table.module[index], operation)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            kinds.append(kind)
    return AllocationTable(
        fixed_bytes=tuple(columns["fixed"]),
        per_sample_bytes=tuple(columns["per_sample"]),
        per_sample_squared_bytes=tuple(columns["squared"]),
        per_sample_cubed_bytes=tuple(columns["cubed"]) if any(cubed) else (),
        rounding_bytes=tuple(columns["rounding"]),
        death=tuple(columns["death"]),
        kind=tuple(kinds),
        module=tuple(columns["module"]),
        operation=tuple(columns["operation"]),
        modules=table.modules,
        operations=table.operations,
    )


def _ceiling(recordings: Sequence[Recording], gpu: Gpu, largest: int) -> GpuCeiling:
    likely = recordings[LIKELY_WORKSPACE]
    smooth = smooth_ceiling(likely, gpu.available_bytes, largest=largest)
    found = [
        [smooth_ceiling(recording, available, largest=largest, tolerance=_RANGE_TOLERANCE) or 0 for recording in recordings]
        for available in (gpu.least_available_bytes, gpu.largest_available_bytes)
    ]
    return GpuCeiling(
        gpu=gpu.name,
        total_bytes=gpu.total_bytes,
        available_bytes=gpu.available_bytes,
        smooth_ceiling=smooth,
        hard_ceiling=hard_ceiling(likely, gpu.available_bytes, largest=largest),
        low=min(*found[0], smooth or 0) or None,
        high=max(*found[1], smooth or 0) or None,
        peak_reserved_bytes=0 if smooth is None else likely.at(smooth).peak_reserved_bytes,
    )


def _expandable_remark(expandable: Recording, ceilings: Sequence[GpuCeiling], largest: int) -> tuple[str, ...]:
    """What the other way to reserve memory would do, where that is worth a sentence."""
    gains = []
    for ceiling in ceilings:
        size = smooth_ceiling(expandable, ceiling.available_bytes, largest=largest, tolerance=_RANGE_TOLERANCE) or 0
        if size > _WORTH_SAYING * (ceiling.smooth_ceiling or 0):
            gains.append(f"{size} ({ceiling.gpu})")
    if not gains:
        return ()
    return (f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lessens fragmentation; the smooth ceilings would be {', '.join(gains)}.",)


def _dataset_remark(ceilings: Sequence[GpuCeiling], train_size: int | None) -> tuple[str, ...]:
    larger = [ceiling.gpu for ceiling in ceilings if train_size is not None and (ceiling.smooth_ceiling or 0) > train_size]
    if not larger:
        return ()
    return (f"The training set holds {train_size} samples, fewer than would fit on {', '.join(larger)}: no batch can be larger than it.",)


def _remarks(trace: MemoryTrace, ceilings: Sequence[GpuCeiling], largest: int) -> tuple[str, ...]:
    where = {"cpu": "real tensors on the CPU", "meta": "tensors without data", "device": "the device here"}[trace.recorded_on]
    remarks = [
        f"Forecast, not measured: recorded with {where} as on CUDA, then replayed through the rules of PyTorch's caching allocator; "
        "no step of this has been checked on a GPU."
    ]
    if trace.remark:
        remarks.append(trace.remark)
    if not trace.consistent:
        remarks.append("The recordings disagree on how some allocations grow with the size: the ceilings are rough.")
    remarks.append(
        f"Taken off the memory: a CUDA context of {format_bytes(LIKELY_CONTEXT_BYTES)} (range: {format_bytes(LEAST_CONTEXT_BYTES)} to "
        f"{format_bytes(LARGEST_CONTEXT_BYTES)}) and cuBLAS's workspaces; other processes and a display are not."
    )
    if trace.allocations is not None and any(_CONVOLUTION in name for name in trace.allocations.operations):
        remarks.append(
            f"Each convolution is given scratch memory of {LIKELY_WORKSPACE} times its result (range: none to {LARGEST_WORKSPACE} times); "
            "cuDNN chooses the real amount on the device."
        )
    if any(ceiling.hard_ceiling != ceiling.smooth_ceiling for ceiling in ceilings):
        remarks.append("Between the smooth and the hard ceiling a size fits only once the allocator has freed its cache, which takes time.")
    if any(ceiling.smooth_ceiling == largest for ceiling in ceilings):
        remarks.append(f"No size above {largest} was considered.")
    return tuple(remarks)
