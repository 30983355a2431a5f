"""Which sizes to record, so that the laws found at a few samples also hold at many.

Two small sizes give the laws; one large size, as large as stays cheap, checks them. It runs on other samples and other random numbers,
so that what depends on those does not pass for a law either. A kernel that changes with the size breaks the check: then the last size
of the old laws is found by halving, and new laws from there on. One sample is often a case of its own, and is recorded as such.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rightbatch.engine.allocation_laws import UnmatchedLogsError, deviation, join, live_peak, moments, peak_of
from rightbatch.engine.memory_trace import AllocationLog
from rightbatch.records.measurements import AllocationTable, LiveMoment

Record = Callable[[int, int], AllocationLog]
"""Takes a size and a draw: 0 for the usual samples and random numbers, 1 for others."""

CHECKED_SIZES = (128, 64, 32, 16, 8)
"""Candidates for the large size, largest first."""
LARGEST_GROWTH_BYTES = 2**25
"""The large size may need so much more than two samples do."""
LEAST_LIMIT_RATIO = 8
"""And takes so much less than the device may hold."""
MOST_HALVED_ALLOCATIONS = 2000
"""A step with more allocations takes too long to be recorded ten times more."""
_LEAST_CHECKED_SIZE = 5
_UNKNOWN_POWER = 3.0
"""How an allocation is taken to grow that is empty at the smaller of two sizes."""


@dataclass(frozen=True)
class LearnedTrace:
    """What the recordings say.

    Attributes:
        sizes: Sizes that were recorded, in ascending order.
        moments: Moments that can be the peak.
        table: Laws of every allocation above the last change of kernel; none when there are none.
        is_exact: Whether every recording was predicted to the byte.
        remark: What changes, or is not exact; empty when there is nothing to say.
    """

    sizes: tuple[int, ...]
    moments: tuple[LiveMoment, ...]
    table: AllocationTable | None
    is_exact: bool
    remark: str


@dataclass
class _Recordings:
    record: Record
    logs: dict[int, AllocationLog] = field(default_factory=dict)

    def at(self, size: int, draw: int = 0) -> AllocationLog:
        if size not in self.logs:
            self.logs[size] = self.record(size, draw)
        return self.logs[size]

    def try_at(self, size: int, draw: int = 0) -> AllocationLog | None:
        """Record a size at which the step need not run at all: normalisation refuses one sample, and a user's assertion may refuse many."""
        with contextlib.suppress(Exception):
            return self.at(size, draw)
        return None

    def join(self, *sizes: int) -> tuple[AllocationTable, str]:
        logs = [self.try_at(size) for size in sizes]
        if any(log is None for log in logs):
            raise UnmatchedLogsError(f"the step does not run at all of {', '.join(map(str, sizes))} samples")
        return join([log for log in logs if log is not None])

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self.logs))


def learn(record: Record, *, limit_bytes: int | None = None) -> LearnedTrace:
    """Record a few sizes, and find the moments that can be the peak at any size.

    Args:
        record: Logs the allocations of the step at one size.
        limit_bytes: What the device may hold; the large size is expected to take an eighth of it at most.
    """
    recordings = _Recordings(record)
    recordings.at(2)
    pair = (1, 2) if recordings.try_at(1) is not None else (2, 3)
    checked = _record_large_size(recordings, pair, limit_bytes)
    try:
        table, bound, known = _small_laws(recordings, pair, checked)
    except UnmatchedLogsError as error:
        remark = f"The trace was given up: {error}; the ceiling is searched for by measuring alone."
        return LearnedTrace(recordings.sizes, (), None, is_exact=False, remark=remark)
    remarks = [bound] if bound else []
    found: list[LiveMoment] = []
    smallest = 1
    single = recordings.logs.get(1)
    if single is not None and deviation(table, single):
        found.append(_single_moment(single))
        smallest = 2
    disorder = next(filter(None, (deviation(table, recordings.at(size)) for size in known if size >= smallest)), "")
    if disorder:
        remarks.append(f"The trace is a bound: {disorder}.")
    is_exact = not remarks
    change = "" if checked in known else deviation(table, recordings.at(checked))
    if change:
        try:
            last, upper = _laws_above_a_change(recordings, table, max(known), checked)
        except UnmatchedLogsError:
            is_exact = False
            remarks.append(f"The trace is an estimate above {max(known)} samples: {change} at {checked} samples.")
        else:
            remarks.append(f"Other laws hold from {last + 1} samples on: {change}.")
            found += moments(table, smallest_size=smallest, largest_size=last)
            smallest, table = last + 1, upper
    found += moments(table, smallest_size=smallest)
    return LearnedTrace(recordings.sizes, tuple(found), table, is_exact=is_exact, remark=" ".join(remarks))


def _record_large_size(recordings: _Recordings, pair: tuple[int, int], limit_bytes: int | None) -> int:
    """Record the largest size that is expected to be cheap, and return it."""
    one, other = (recordings.at(size) for size in pair)
    if len(one.allocations) != len(other.allocations):
        one, other = recordings.at(2), recordings.at(3)
    largest_bytes = peak_of(one)[0] + LARGEST_GROWTH_BYTES
    if limit_bytes is not None:
        largest_bytes = min(largest_bytes, limit_bytes // LEAST_LIMIT_RATIO)
    for size in CHECKED_SIZES:
        if _expected_peak(one, other, size) <= largest_bytes and recordings.try_at(size, 1) is not None:
            return size
    recordings.at(_LEAST_CHECKED_SIZE, 1)
    return _LEAST_CHECKED_SIZE


def _expected_peak(one: AllocationLog, other: AllocationLog, size: int) -> int:
    """Guess the peak at a size: each allocation grows along the line through two small sizes, or by their power where that is steeper."""
    sizes_bytes = []
    for small, large in zip(one.allocations, other.allocations, strict=False):
        slope = (large.size_bytes - small.size_bytes) / (other.batch_size - one.batch_size)
        power = _UNKNOWN_POWER if large.size_bytes else 0.0
        if small.size_bytes:
            power = math.log(max(large.size_bytes, 1) / small.size_bytes) / math.log(other.batch_size / one.batch_size)
        line = large.size_bytes + slope * (size - other.batch_size)
        sizes_bytes.append(round(line if power <= 1 else max(line, large.size_bytes * (size / other.batch_size) ** power)))
    return live_peak(sizes_bytes, [allocation.death for allocation in other.allocations[: len(sizes_bytes)]])


def _small_laws(recordings: _Recordings, pair: tuple[int, int], checked: int) -> tuple[AllocationTable, str, Sequence[int]]:
    """Join as few recordings as suffice; the last resort leaves the large size out, at which other laws may hold.

    Returns:
        The table, what is only bounded in it, and the sizes that were joined.
    """
    for sizes in dict.fromkeys(((*pair, checked), (2, 3, checked), (1, 2, 3, checked), (2, 3, _LEAST_CHECKED_SIZE, checked))):
        if len(set(sizes)) < len(sizes) or (1 in sizes and 1 not in pair):
            continue
        with contextlib.suppress(UnmatchedLogsError):
            return *recordings.join(*sizes), sizes
    sizes = (2, 3, _LEAST_CHECKED_SIZE, 7)
    return *recordings.join(*sizes), sizes


def _laws_above_a_change(recordings: _Recordings, table: AllocationTable, last: int, broken: int) -> tuple[int, AllocationTable]:
    """Find the last size at which the laws hold, and the laws above it.

    Args:
        recordings: What was recorded.
        table: Laws that hold at ``last`` and not at ``broken``.
        last: A size at which they hold.
        broken: A larger size at which they do not.

    Raises:
        UnmatchedLogsError: No laws hold from there to ``broken``, or looking for them would take long.
    """
    if len(table.death) > MOST_HALVED_ALLOCATIONS:
        raise UnmatchedLogsError("a step with so many allocations is not recorded ten times more")
    high = broken
    while high - last > 1:
        middle = (last + high) // 2
        log = recordings.try_at(middle)
        if log is None or deviation(table, log):
            high = middle
        else:
            last = middle
    end = max(broken, high + 3)
    with contextlib.suppress(UnmatchedLogsError):
        return last, recordings.join(high, high + 1, end)[0]
    return last, recordings.join(high, high + 1, high + 2, end)[0]


def _single_moment(log: AllocationLog) -> LiveMoment:
    peak, allocation = peak_of(log)
    return LiveMoment(fixed_bytes=peak, per_sample_bytes=0, largest_size=1, module=allocation.module, operation=allocation.operation)
