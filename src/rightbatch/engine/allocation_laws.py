"""From recordings at a few sizes to the law of every allocation, and to the moments that can be the peak at any size."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rightbatch.engine.memory_trace import NEVER, Allocation, AllocationLog
from rightbatch.engine.recurrent_workspace import PAGE_BYTES
from rightbatch.records.measurements import AllocationTable, LiveMoment, RoundedBytes

Polynomial = tuple[int, int, int]
"""(bytes fixed, per sample, per sample squared)."""
Law = tuple[Polynomial, int]
"""A polynomial, and the multiple that its value is rounded up to."""

_LEAST_RECORDINGS = 3
_MOST_PARTS = 9
"""Parts of a recurrent layer's workspace that oneDNN starts on a page of their own, at most (``set_offsets`` in its ``rnn_utils``)."""


class UnmatchedLogsError(Exception):
    """The logs of different sizes do not describe the same allocations."""


def join(logs: Sequence[AllocationLog]) -> tuple[AllocationTable, str]:
    """Find the law of every allocation.

    The first two sizes give an affine law and the others check it. Where one is not affine, the third gives a quadratic law and a
    fourth checks that. A storage lives as long as it did in any of the logs: order within a step may differ.

    Args:
        logs: One log a size, at least three.

    Returns:
        The table, and what is only bounded from above in it: empty when every law is exact.

    Raises:
        UnmatchedLogsError: The logs differ in their operations, or an allocation follows no law that the last log confirms.
    """
    columns = [log.allocations for log in logs]
    difference = _difference(columns)
    if difference:
        raise UnmatchedLogsError(difference)
    sizes = [log.batch_size for log in logs]
    laws: list[Law] = []
    bounded = {}
    for row in zip(*columns, strict=True):
        laws.append(_law(sizes, row))
        if any(map(_is_unknown, row)):
            bounded[row[0].operation] = row[0].module or "the step"
    deaths = [max(allocation.death for allocation in row) for row in zip(*columns, strict=True)]
    remark = "".join(
        f"The workspace of {operation} in {module} is rounded up to pages by the kernel and only bounded from above. "
        for operation, module in bounded.items()
    )
    return _table(laws, deaths, columns[0]), remark.strip()


def deviation(table: AllocationTable, log: AllocationLog) -> str:
    """Say where a log departs from the laws: in its operations, in the bytes of an allocation, or in the peak.

    Returns:
        The first departure; empty when the table predicts the log to the byte.
    """
    if len(log.allocations) != len(table.death):
        return f"the number of allocations is {len(log.allocations)} instead of {len(table.death)}"
    sizes = _sizes_at(table, log.batch_size)
    for index, (allocation, size_bytes) in enumerate(zip(log.allocations, sizes, strict=True)):
        operation = table.operations[table.operation[index]]
        if allocation.operation != operation:
            return f"{allocation.operation} stands for {operation}"
        if allocation.size_bytes != size_bytes and not _is_unknown(allocation):
            return f"{operation} in {allocation.module or 'the step'} takes {allocation.size_bytes} bytes instead of {size_bytes}"
    predicted, recorded = live_peak(sizes, table.death), peak_of(log)[0]
    if predicted != recorded and not any(map(_is_unknown, log.allocations)):
        return f"memory is freed in another order, so that the peak is {recorded} bytes instead of {predicted}"
    return ""


def peak_of(log: AllocationLog) -> tuple[int, Allocation]:
    """Return the most bytes that live at once in a log, and the allocation that makes them so many."""
    dying: Counter[int] = Counter()
    live, peak, at_peak = 0, -1, log.allocations[0]
    for index, allocation in enumerate(log.allocations):
        live += allocation.size_bytes - dying.pop(index, 0)
        dying[allocation.death] += allocation.size_bytes
        if live > peak:
            peak, at_peak = live, allocation
    return peak, at_peak


def live_peak(sizes_bytes: Sequence[int], deaths: Sequence[int]) -> int:
    """Return the most bytes that live at once.

    Args:
        sizes_bytes: Bytes of each allocation in the order of birth.
        deaths: Number of allocations that had been made when each was freed; none ever reach that number for one that was not.
    """
    dying: Counter[int] = Counter()
    live = peak = 0
    for index, (size_bytes, death) in enumerate(zip(sizes_bytes, deaths, strict=True)):
        live += size_bytes - dying.pop(index, 0)
        dying[death] += size_bytes
        peak = max(peak, live)
    return peak


def moments(table: AllocationTable, *, smallest_size: int = 1, largest_size: int | None = None) -> tuple[LiveMoment, ...]:
    """Return the moments whose maximum at b is the peak at b, for every b in a range: each just after an allocation, none dominated."""
    return tuple(
        LiveMoment(
            fixed_bytes=law[0],
            per_sample_bytes=law[1],
            per_sample_squared_bytes=law[2],
            rounded=tuple(
                RoundedBytes(fixed_bytes=fixed, per_sample_bytes=slope, per_sample_squared_bytes=curvature, multiple_bytes=multiple)
                for (fixed, slope, curvature), multiple in sorted(rounded.elements())
            ),
            smallest_size=smallest_size,
            largest_size=largest_size,
            module=table.modules[table.module[index]],
            operation=table.operations[table.operation[index]],
        )
        for law, rounded, index in _undominated(_live_laws(table))
    )


def _is_unknown(allocation: Allocation) -> bool:
    """Whether it was rounded up, and nobody knows from what."""
    return allocation.rounding_bytes > 1 and allocation.unrounded_bytes is None


def _difference(columns: Sequence[Sequence[Allocation]]) -> str:
    """Say how the logs differ in their operations; nothing when they do not."""
    if len({len(column) for column in columns}) != 1:
        return f"the number of allocations changes with the size ({', '.join(str(len(column)) for column in columns)})"
    for index, row in enumerate(zip(*columns, strict=True)):
        first = row[0].operation
        other = next((allocation.operation for allocation in row if allocation.operation != first), "")
        if other:
            return f"operation {index} is {first} at one size and {other} at another"
    return ""


def _law(sizes: Sequence[int], row: Sequence[Allocation]) -> Law:
    if any(map(_is_unknown, row)):
        return _page_bound(sizes, [allocation.size_bytes for allocation in row])
    values = [allocation.size_bytes if allocation.unrounded_bytes is None else allocation.unrounded_bytes for allocation in row]
    law = _affine(sizes, values) or _quadratic(sizes, values)
    if law is not None:
        return law, row[0].rounding_bytes
    pairs = ", ".join(f"{v} bytes at {b}" for b, v in zip(sizes, values, strict=True))
    raise UnmatchedLogsError(f"{row[0].operation} in {row[0].module or 'the step'} follows no polynomial of the size ({pairs})")


def _affine(sizes: Sequence[int], values: Sequence[int]) -> Polynomial | None:
    slope, remainder = divmod(values[1] - values[0], sizes[1] - sizes[0])
    law = (values[0] - slope * sizes[0], slope, 0)
    return None if remainder or not _holds(law, sizes, values) else law


def _quadratic(sizes: Sequence[int], values: Sequence[int]) -> Polynomial | None:
    """Return the quadratic through three points by divided differences in integers, if a fourth confirms it."""
    if len(sizes) <= _LEAST_RECORDINGS:
        return None
    (b0, b1, b2), (v0, v1, v2) = sizes[:3], values[:3]
    numerator = (v2 - v0) * (b1 - b0) - (v1 - v0) * (b2 - b0)
    curvature, remainder = divmod(numerator, (b1 - b0) * (b2 - b0) * (b2 - b1))
    slope = (v1 - v0) // (b1 - b0) - curvature * (b0 + b1)
    law = (v0 - slope * b0 - curvature * b0 * b0, slope, curvature)
    return None if remainder or not _holds(law, sizes, values) else law


def _page_bound(sizes: Sequence[int], values: Sequence[int]) -> Law:
    """Return an upper bound at every size for a workspace made of parts that are each rounded up to pages of P bytes.

    Parts of s_i b bytes, S = sum s_i, take S b <= value(b) <= S b + k (P - 1). The least of value(b) / b is no less than S, and each of
    the k parts takes a page at least. The s_i themselves do not follow from a few sums of rounded parts.
    """
    slope = min(-(-value // size) for size, value in zip(sizes, values, strict=True))
    parts = max(1, min(_MOST_PARTS, min(values) // PAGE_BYTES))
    return ((parts - 1) * (PAGE_BYTES - 1), slope, 0), PAGE_BYTES


def _holds(law: Polynomial, sizes: Sequence[int], values: Sequence[int]) -> bool:
    return all(_value(law, b) == v for b, v in zip(sizes, values, strict=True))


def _value(law: Polynomial, size: int) -> int:
    return law[0] + law[1] * size + law[2] * size * size


def _rounded_up(size_bytes: int, multiple: int) -> int:
    return -(-size_bytes // multiple) * multiple


def _laws_of(table: AllocationTable) -> Iterator[Law]:
    polynomials = zip(table.fixed_bytes, table.per_sample_bytes, table.per_sample_squared_bytes, strict=True)
    return zip(polynomials, table.rounding_bytes, strict=True)


def _sizes_at(table: AllocationTable, size: int) -> list[int]:
    return [_rounded_up(_value(law, size), multiple) for law, multiple in _laws_of(table)]


def _table(laws: Sequence[Law], deaths: Sequence[int], allocations: Sequence[Allocation]) -> AllocationTable:
    modules = sorted({allocation.module for allocation in allocations})
    operations = sorted({allocation.operation for allocation in allocations})
    module_index = {name: index for index, name in enumerate(modules)}
    operation_index = {name: index for index, name in enumerate(operations)}
    return AllocationTable(
        fixed_bytes=tuple(law[0] for law, _ in laws),
        per_sample_bytes=tuple(law[1] for law, _ in laws),
        per_sample_squared_bytes=tuple(law[2] for law, _ in laws),
        rounding_bytes=tuple(rounding for _, rounding in laws),
        death=tuple(-1 if death >= NEVER else death for death in deaths),
        kind=tuple(allocation.kind for allocation in allocations),
        module=tuple(module_index[allocation.module] for allocation in allocations),
        operation=tuple(operation_index[allocation.operation] for allocation in allocations),
        modules=tuple(modules),
        operations=tuple(operations),
    )


_LiveLaw = tuple[Polynomial, Counter[Law], int]
"""What lives at one moment: the sum of the polynomials, the rounded laws and how often each, and the allocation that made the moment."""


def _live_laws(table: AllocationTable) -> Iterator[_LiveLaw]:
    dying: dict[int, list[Law]] = {}
    live = (0, 0, 0)
    rounded: Counter[Law] = Counter()
    for index, (entry, death) in enumerate(zip(_laws_of(table), table.death, strict=True)):
        changes = [(entry, 1), *((dead, -1) for dead in dying.pop(index, ()))]
        for (law, multiple), sign in changes:
            if multiple == 1:
                live = (live[0] + sign * law[0], live[1] + sign * law[1], live[2] + sign * law[2])
            else:
                rounded = rounded + Counter({(law, multiple): 1}) if sign > 0 else rounded - Counter({(law, multiple): 1})
        if death >= 0:
            dying.setdefault(death, []).append(entry)
        yield live, rounded, index


def _undominated(found: Iterator[_LiveLaw]) -> list[_LiveLaw]:
    """Drop every moment that another one matches or exceeds in all three coefficients and in its rounded laws, hence at every size."""
    kept: list[_LiveLaw] = []
    for law, rounded, index in sorted(found, key=lambda entry: (entry[1].total(), entry[0][::-1]), reverse=True):
        if not any(all(theirs >= ours for theirs, ours in zip(other, law, strict=True)) and rounded <= more for other, more, _ in kept):
            kept.append((law, rounded, index))
    return kept
