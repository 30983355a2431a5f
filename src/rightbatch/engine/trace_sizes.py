"""Which sizes to record, so that the laws found at a few samples also hold at many.

Two small sizes give the laws; one large size, as large as stays cheap, checks them. It runs on other samples and other random numbers,
so that what depends on those does not pass for a law either. A kernel that changes with the size breaks the check: then the last size
of the old laws is found by halving, and new laws from there on. One sample is often a case of its own, and is recorded as such.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rightbatch.engine.allocation_laws import UnmatchedLogsError, deviation, join, live_peak, moments, peak_of, predicted_peak
from rightbatch.engine.memory_trace import AllocationLog
from rightbatch.records.measurements import AllocationTable, LiveMoment

Record = Callable[[int, int], AllocationLog]
"""Takes a size and a draw: 0 for the usual samples and random numbers, 1 for others."""

CHECKED_SIZES = (113, 59, 27, 19, 11)
"""Candidates for the large size, largest first: odd and well below a power of two, lest these and whole pieces look like a line."""
LARGEST_GROWTH_BYTES = 2**24
"""The large size may need so much more than the smallest recorded one."""
LEAST_LIMIT_RATIO = 8
"""And takes so much less than the device may hold."""
CONFIRMED = 4
"""Laws that begin at a size are confirmed at so many times this size."""
MOST_CHANGES = 3
"""More changes than these are a pattern that no small size shows."""
MOST_HALVED_ALLOCATIONS = 2000
"""A step with more allocations takes too long to be recorded ten times more."""
_FURTHER_SIZES = (5, 7)
"""Recorded where an allocation is not affine; the first of them is the check where nothing larger is cheap."""
_EVERY_FRACTION = 12
"""A multiple of this is a whole number of halves, thirds and quarters."""
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


@dataclass(frozen=True)
class _Change:
    last: int
    """The last size at which the laws hold."""
    reason: str
    """How the next size departs from them."""
    table: AllocationTable


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
    found: list[LiveMoment] = []
    smallest = 1
    single = recordings.logs.get(1)
    if single is not None and deviation(table, single):
        found.append(_single_moment(single))
        smallest = 2
    disorder = next(filter(None, (deviation(table, recordings.at(size)) for size in known if size >= smallest)), "")
    remarks = [bound] if bound else []
    remarks += [f"The trace is a bound: {disorder}."] if disorder else []
    changes, table, doubt = _changes(recordings, table, max(known), checked, limit_bytes)
    is_exact = not remarks and not doubt
    for change in changes:
        remarks.append(f"Other laws hold from {change.last + 1} samples on: {change.reason}.")
        found += moments(change.table, smallest_size=smallest, largest_size=change.last)
        smallest = change.last + 1
    remarks += [f"The trace is an estimate {doubt}."] if doubt else []
    found += moments(table, smallest_size=smallest)
    return LearnedTrace(recordings.sizes, tuple(found), table, is_exact=is_exact, remark=" ".join(remarks))


def _record_large_size(recordings: _Recordings, pair: tuple[int, int], limit_bytes: int | None) -> int:
    """Record the largest size that is expected to be cheap, and return it."""
    one, other = (recordings.at(size) for size in pair)
    if len(one.allocations) != len(other.allocations):
        one, other = recordings.at(2), recordings.at(3)
    largest_bytes = _largest_bytes(peak_of(one)[0] + LARGEST_GROWTH_BYTES, limit_bytes)
    for size in CHECKED_SIZES:
        if _expected_peak(one, other, size) <= largest_bytes and recordings.try_at(size, 1) is not None:
            return size
    recordings.at(_FURTHER_SIZES[0], 1)
    return _FURTHER_SIZES[0]


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
    five, seven = _FURTHER_SIZES
    small = (2, 3, five, seven)
    middle = 2 * checked // 3 // _EVERY_FRACTION * _EVERY_FRACTION
    choices = [
        (*pair, checked),
        (2, 3, checked),
        (1, 2, 3, checked),
        (2, 3, five, checked),
        (*small, checked),
        (*small, middle, checked),
        small,
    ]
    failure: UnmatchedLogsError | None = None
    for sizes in choices:
        if list(sizes) == sorted(set(sizes)) and (1 not in sizes or 1 in pair):
            try:
                return *recordings.join(*sizes), sizes
            except UnmatchedLogsError as error:
                failure = error
    raise failure or UnmatchedLogsError("no size was recorded")


def _changes(
    recordings: _Recordings, table: AllocationTable, known: int, checked: int, limit_bytes: int | None
) -> tuple[list[_Change], AllocationTable, str]:
    """Follow the laws from a size at which they hold to one at which they may not.

    New laws count as confirmed where they hold at four times the size at which they begin: what is cut into pieces of a fixed size keeps
    its laws for no longer than a piece.

    Args:
        recordings: What was recorded.
        table: Laws that hold at ``known``.
        known: A size at which they hold.
        checked: A size at which they may not.
        limit_bytes: What the device may hold.

    Returns:
        The changes in ascending order, the laws above the last, and why these are doubtful; empty when they are not.
    """
    changes: list[_Change] = []
    largest_bytes = _largest_bytes(peak_of(recordings.at(2))[0] + CONFIRMED * LARGEST_GROWTH_BYTES, limit_bytes)
    while reason := deviation(table, recordings.at(checked)):
        if len(changes) == MOST_CHANGES or len(table.death) > MOST_HALVED_ALLOCATIONS:
            return changes, table, f"above {known} samples: {reason} at {checked} samples"
        last = _last_size(recordings, table, known, checked)
        try:
            upper, known = _laws_from(recordings, last + 1, checked)
        except UnmatchedLogsError as error:
            return changes, table, f"above {last} samples: {error}"
        changes.append(_Change(last, deviation(table, recordings.at(last + 1)), table))
        table = upper
        confirmed = CONFIRMED * (last + 1)
        if confirmed > checked and (predicted_peak(table, confirmed) > largest_bytes or recordings.try_at(confirmed) is None):
            return changes, table, f"above {checked} samples: no larger size was recorded"
        checked = max(checked, confirmed)
    return changes, table, ""


def _last_size(recordings: _Recordings, table: AllocationTable, last: int, broken: int) -> int:
    """Return the last size at which laws hold that hold at one size and not at a larger one, by halving."""
    while broken - last > 1:
        middle = (last + broken) // 2
        log = recordings.try_at(middle)
        if log is None or deviation(table, log):
            broken = middle
        else:
            last = middle
    return last


def _laws_from(recordings: _Recordings, first: int, checked: int) -> tuple[AllocationTable, int]:
    """Find the laws that hold from a size on, and the largest size that confirms them: the checked one, or one nearby."""
    choices = [(first, first + 1, checked), (first, first + 1, first + 2, checked), tuple(range(first, first + 4))]
    failure: UnmatchedLogsError | None = None
    for sizes in choices:
        if list(sizes) == sorted(set(sizes)):
            try:
                return recordings.join(*sizes)[0], sizes[-1]
            except UnmatchedLogsError as error:
                failure = error
    raise failure or UnmatchedLogsError("no size was recorded")


def _largest_bytes(wanted_bytes: int, limit_bytes: int | None) -> int:
    return wanted_bytes if limit_bytes is None else min(wanted_bytes, limit_bytes // LEAST_LIMIT_RATIO)


def _single_moment(log: AllocationLog) -> LiveMoment:
    peak, allocation = peak_of(log)
    return LiveMoment(fixed_bytes=peak, per_sample_bytes=0, largest_size=1, module=allocation.module, operation=allocation.operation)
