"""From recordings at a few sizes to the law of every allocation, and to the moments that can be the peak at any size."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rightbatch.engine.growth_laws import Law, Polynomial, page_bound, polynomial_through, rounded_up, steps_through, value_at
from rightbatch.engine.memory_trace import NEVER, Allocation, AllocationLog
from rightbatch.records.measurements import AllocationTable, LiveMoment, RoundedBytes


class UnmatchedLogsError(Exception):
    """The logs of different sizes do not describe the same allocations."""


def join(logs: Sequence[AllocationLog]) -> tuple[AllocationTable, str]:
    """Find the law of every allocation.

    The first two sizes give an affine law and the others check it. Where one is not affine, the third gives a quadratic law and a
    fourth checks that, and so on to cubes. With six sizes a law in steps, such as of every second sample, is tried too.
    A storage lives as long as it did in any of the logs: order within a step may differ.

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
    sizes = _sizes_at(table, log.batch_size)
    operations = [table.operations[operation] for operation in table.operation]
    for allocation, operation in zip(log.allocations, operations, strict=False):
        if allocation.operation != operation:
            return f"{allocation.operation} stands for {operation} in {allocation.module or 'the step'}"
    if len(log.allocations) != len(sizes):
        return f"the number of allocations is {len(log.allocations)} instead of {len(sizes)}"
    for allocation, operation, size_bytes in zip(log.allocations, operations, sizes, strict=True):
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


def predicted_peak(table: AllocationTable, size: int) -> int:
    """Return the most bytes that live at once at a size by the laws."""
    return live_peak(_sizes_at(table, size), table.death)


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
            per_sample_cubed_bytes=law[3],
            rounded=tuple(_rounded_bytes(term, multiple) for term, multiple in sorted(rounded.elements())),
            smallest_size=smallest_size,
            largest_size=largest_size,
            module=table.modules[table.module[index]],
            operation=table.operations[table.operation[index]],
        )
        for law, rounded, index in _undominated(_live_laws(table))
    )


def _rounded_bytes(law: Polynomial, multiple: int) -> RoundedBytes:
    return RoundedBytes(
        fixed_bytes=law[0],
        per_sample_bytes=law[1],
        per_sample_squared_bytes=law[2],
        per_sample_cubed_bytes=law[3],
        multiple_bytes=multiple,
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
        return page_bound(sizes, [allocation.size_bytes for allocation in row])
    values = [allocation.size_bytes if allocation.unrounded_bytes is None else allocation.unrounded_bytes for allocation in row]
    polynomial = polynomial_through(sizes, values)
    if polynomial is not None:
        return polynomial, row[0].rounding_bytes
    stepped = steps_through(sizes, values)
    if stepped is not None and row[0].rounding_bytes == 1:
        return stepped
    pairs = ", ".join(f"{v} bytes at {b}" for b, v in zip(sizes, values, strict=True))
    raise UnmatchedLogsError(f"{row[0].operation} in {row[0].module or 'the step'} follows no polynomial of the size ({pairs})")


def _laws_of(table: AllocationTable) -> Iterator[Law]:
    cubed = table.per_sample_cubed_bytes or (0,) * len(table.fixed_bytes)
    polynomials = zip(table.fixed_bytes, table.per_sample_bytes, table.per_sample_squared_bytes, cubed, strict=True)
    return zip(polynomials, table.rounding_bytes, strict=True)


def _sizes_at(table: AllocationTable, size: int) -> list[int]:
    return [rounded_up(value_at(law, size), multiple) for law, multiple in _laws_of(table)]


def _table(laws: Sequence[Law], deaths: Sequence[int], allocations: Sequence[Allocation]) -> AllocationTable:
    modules = sorted({allocation.module for allocation in allocations})
    operations = sorted({allocation.operation for allocation in allocations})
    module_index = {name: index for index, name in enumerate(modules)}
    operation_index = {name: index for index, name in enumerate(operations)}
    return AllocationTable(
        fixed_bytes=tuple(law[0] for law, _ in laws),
        per_sample_bytes=tuple(law[1] for law, _ in laws),
        per_sample_squared_bytes=tuple(law[2] for law, _ in laws),
        per_sample_cubed_bytes=tuple(law[3] for law, _ in laws) if any(law[3] for law, _ in laws) else (),
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
    live: Polynomial = (0, 0, 0, 0)
    rounded: Counter[Law] = Counter()
    for index, (entry, death) in enumerate(zip(_laws_of(table), table.death, strict=True)):
        for (law, multiple), sign in [(entry, 1), *((dead, -1) for dead in dying.pop(index, ()))]:
            if multiple == 1:
                live = _sum(live, law, sign)
            else:
                rounded = Counter(rounded)
                rounded[law, multiple] += sign
        if death >= 0:
            dying.setdefault(death, []).append(entry)
        yield live, +rounded, index


def _undominated(found: Iterator[_LiveLaw]) -> list[_LiveLaw]:
    """Drop every moment that another one matches or exceeds at every size."""

    def largest_first(entry: _LiveLaw) -> tuple[tuple[int, ...], int]:
        return _bound(entry[0], entry[1], 0)[::-1], entry[1].total()

    kept: list[_LiveLaw] = []
    for moment in sorted(found, key=largest_first, reverse=True):
        if not any(_dominates(other, moment) for other in kept):
            kept.append(moment)
    return kept


def _dominates(one: _LiveLaw, other: _LiveLaw) -> bool:
    """Whether one moment holds no less than another at every size, for all that is known of what only one of them rounds up."""
    more, less = one[0], other[0]
    if one[1] != other[1]:
        more, less = _bound(more, one[1] - other[1], 0), _bound(less, other[1] - one[1], 1)
    return all(theirs >= ours for theirs, ours in zip(more, less, strict=True))


def _bound(law: Polynomial, rounded: Counter[Law], slack: int) -> Polynomial:
    """Add rounded laws to a polynomial: from below (slack 0) as they are before rounding, from above (slack 1) with all that it can add."""
    for (term, multiple), count in rounded.items():
        law = _sum(_sum(law, term, count), (slack * (multiple - 1), 0, 0, 0), count)
    return law


def _sum(one: Polynomial, other: Polynomial, factor: int) -> Polynomial:
    return one[0] + factor * other[0], one[1] + factor * other[1], one[2] + factor * other[2], one[3] + factor * other[3]
