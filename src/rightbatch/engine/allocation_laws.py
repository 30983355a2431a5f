"""From recordings at a few sizes to the law of every allocation, and to the moments that can be the peak at any size."""

from collections.abc import Sequence

from rightbatch.engine.memory_trace import NEVER, Allocation, AllocationLog
from rightbatch.records.measurements import AllocationTable, LiveMoment

Polynomial = tuple[int, int, int]
"""(bytes fixed, per sample, per sample squared)."""
Law = tuple[Polynomial, int]
"""A polynomial, and the multiple that its value is rounded up to."""

_PAGE_BYTES = 4096
_PAGED_OPERATION = "aten.mkldnn_rnn_layer"
_MOST_PARTS = 9
"""Parts of a recurrent layer's workspace that oneDNN starts on a page of their own, at most (``set_offsets`` in its ``rnn_utils``)."""


class UnmatchedLogsError(Exception):
    """The logs of different sizes do not describe the same allocations."""


def needs_another_size(logs: Sequence[AllocationLog]) -> bool:
    """Return whether an allocation is not affine in the sizes recorded so far, so that its law needs one more to be confirmed."""
    sizes = [log.batch_size for log in logs]
    return any(
        _affine(sizes, [allocation.size_bytes for allocation in row]) is None
        for row in zip(*(log.allocations for log in logs), strict=False)
    )


def needs_a_large_size(logs: Sequence[AllocationLog]) -> bool:
    """Return whether an allocation follows no polynomial of four sizes, but may be a workspace in pages, bounded best at a large size."""
    sizes = [log.batch_size for log in logs]
    rows = (
        [allocation.size_bytes for allocation in row] for row in zip(*(log.allocations for log in logs), strict=False) if _is_paged(row)
    )
    return any(_affine(sizes, row) is None and _quadratic(sizes, row) is None for row in rows)


def join(logs: Sequence[AllocationLog]) -> tuple[AllocationTable, str]:
    """Find the law of every allocation.

    The first two sizes give an affine law and the third checks it. Where one is not affine, the third gives a quadratic law and the
    fourth checks that. A storage lives as long as it did in any of the logs: order within a step may differ.

    Args:
        logs: One log a size, in ascending order of size.

    Returns:
        The table, and what is only bounded from above in it: empty when every law is exact.

    Raises:
        UnmatchedLogsError: The logs differ in their operations, or an allocation follows no law that the last log confirms.
    """
    columns = [log.allocations for log in logs]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise UnmatchedLogsError(f"the number of allocations changes with the size ({', '.join(str(len(column)) for column in columns)})")
    sizes = [log.batch_size for log in logs]
    laws: list[Law] = []
    bounded = {}
    for index, row in enumerate(zip(*columns, strict=True)):
        if len({allocation.operation for allocation in row}) != 1:
            raise UnmatchedLogsError(f"operation {index} is {row[0].operation} at one size and {row[-1].operation} at another")
        law, is_exact = _law(sizes, [allocation.size_bytes for allocation in row], row[0])
        laws.append(law)
        if not is_exact:
            bounded[row[0].operation] = row[0].module or "the step"
    deaths = [max(column[index].death for column in columns) for index in range(len(laws))]
    remark = "".join(
        f"The workspace of {operation} in {module} is rounded up to pages by the kernel and only bounded from above. "
        for operation, module in bounded.items()
    )
    return _table(laws, deaths, columns[0]), remark.strip()


def moments(table: AllocationTable) -> tuple[LiveMoment, ...]:
    """Return the moments whose maximum at b is the peak at b, for every b >= 1: each just after an allocation, none dominated.

    Rounding counts in full, so a rounded workspace is bounded from above here.
    """
    dying: dict[int, list[Polynomial]] = {}
    live = (0, 0, 0)
    found = []
    columns = zip(table.fixed_bytes, table.per_sample_bytes, table.per_sample_squared_bytes, table.rounding_bytes, table.death, strict=True)
    for index, (fixed, slope, curvature, rounding, death) in enumerate(columns):
        law = (fixed + rounding - 1, slope, curvature)
        for dead in dying.pop(index, ()):
            live = (live[0] - dead[0], live[1] - dead[1], live[2] - dead[2])
        live = (live[0] + law[0], live[1] + law[1], live[2] + law[2])
        if death >= 0:
            dying.setdefault(death, []).append(law)
        found.append((live, index))
    return tuple(
        LiveMoment(
            fixed_bytes=law[0],
            per_sample_bytes=law[1],
            per_sample_squared_bytes=law[2],
            module=table.modules[table.module[index]],
            operation=table.operations[table.operation[index]],
        )
        for law, index in _undominated(found)
    )


def _law(sizes: Sequence[int], values: Sequence[int], allocation: Allocation) -> tuple[Law, bool]:
    affine = _affine(sizes, values)
    if affine is not None:
        return (affine, 1), True
    quadratic = _quadratic(sizes, values)
    if quadratic is not None:
        return (quadratic, 1), True
    if _is_paged([allocation]) and not any(value % _PAGE_BYTES for value in values):
        return _page_bound(sizes, values), False
    pairs = ", ".join(f"{v} bytes at {b}" for b, v in zip(sizes, values, strict=True))
    raise UnmatchedLogsError(f"{allocation.operation} in {allocation.module or 'the step'} follows no polynomial of the size ({pairs})")


def _affine(sizes: Sequence[int], values: Sequence[int]) -> Polynomial | None:
    slope, remainder = divmod(values[1] - values[0], sizes[1] - sizes[0])
    law = (values[0] - slope * sizes[0], slope, 0)
    return None if remainder or not _holds(law, sizes, values) else law


def _quadratic(sizes: Sequence[int], values: Sequence[int]) -> Polynomial | None:
    """Return the quadratic through three points by divided differences in integers, if a fourth confirms it."""
    if len(sizes) < 4:
        return None
    (b0, b1, b2), (v0, v1, v2) = sizes[:3], values[:3]
    numerator = (v2 - v0) * (b1 - b0) - (v1 - v0) * (b2 - b0)
    curvature, remainder = divmod(numerator, (b1 - b0) * (b2 - b0) * (b2 - b1))
    slope = (v1 - v0) // (b1 - b0) - curvature * (b0 + b1)
    law = (v0 - slope * b0 - curvature * b0 * b0, slope, curvature)
    return None if remainder or not _holds(law, sizes, values) else law


def _is_paged(allocations: Sequence[Allocation]) -> bool:
    return all(allocation.operation == _PAGED_OPERATION for allocation in allocations)


def _page_bound(sizes: Sequence[int], values: Sequence[int]) -> Law:
    """Return an upper bound at every size for a workspace made of parts that are each rounded up to pages of P bytes.

    Parts of s_i b bytes, S = sum s_i, take S b <= value(b) <= S b + k (P - 1). The least of value(b) / b is no less than S, and each of
    the k parts takes a page at least. The s_i themselves do not follow from a few sums of rounded parts.
    """
    slope = min(-(-value // size) for size, value in zip(sizes, values, strict=True))
    parts = max(1, min(_MOST_PARTS, min(values) // _PAGE_BYTES))
    return ((parts - 1) * (_PAGE_BYTES - 1), slope, 0), _PAGE_BYTES


def _holds(law: Polynomial, sizes: Sequence[int], values: Sequence[int]) -> bool:
    return all(law[0] + law[1] * b + law[2] * b * b == v for b, v in zip(sizes, values, strict=True))


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


def _undominated(found: Sequence[tuple[Polynomial, int]]) -> list[tuple[Polynomial, int]]:
    """Drop every moment that another one matches or exceeds in all three coefficients, hence at every size."""
    kept: list[tuple[Polynomial, int]] = []
    for law, index in sorted(found, key=lambda entry: entry[0][::-1], reverse=True):
        if not any(all(theirs >= ours for theirs, ours in zip(other, law, strict=True)) for other, _ in kept):
            kept.append((law, index))
    return kept
