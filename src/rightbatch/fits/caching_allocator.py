"""What PyTorch's CUDA caching allocator would reserve for a recorded list of allocations, replayed without a GPU.

The rules are in ``allocator_blocks``. Addresses are those of a device that hands out segments in ascending order, which only decides
between free blocks of equal size. See docs/theory/caching_allocator.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rightbatch.fits.allocator_blocks import BLOCK_ROUNDING_BYTES, ENDLESS_BYTES, Allocator, Block, DeviceFullError, ExpandableAllocator
from rightbatch.records.measurements import AllocationTable

LARGEST_SIZE = 2**40
"""No ceiling is searched for above this size."""

_NEIGHBOURS = 4


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What the allocator did.

    Attributes:
        peak_reserved_bytes: Largest sum of the segments it held: ``torch.cuda.max_memory_reserved``.
        peak_allocated_bytes: Largest sum of the blocks in use, after rounding: ``torch.cuda.max_memory_allocated``.
        retries: How often it freed its cached segments because the capacity was reached: ``num_alloc_retries``.
        out_of_memory: Whether a request failed even so; the replay ends there.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    retries: int
    out_of_memory: bool


def replay(
    sizes_bytes: Sequence[int], deaths: Sequence[int], *, capacity_bytes: int | None = None, expandable_segments: bool = False
) -> Replay:
    """Replay allocations in the order of birth.

    Args:
        sizes_bytes: Bytes of each allocation; one of no bytes takes nothing.
        deaths: Number of allocations that had been made when it was freed; -1 when it never was.
        capacity_bytes: The most that may be reserved; none for a device without end.
        expandable_segments: Map pages at the end of one growing segment a pool instead of reserving segment after segment.

    Raises:
        ValueError: An allocation is freed before it is made, or the two sequences differ in length.
    """
    capacity = ENDLESS_BYTES if capacity_bytes is None else capacity_bytes
    allocator = ExpandableAllocator(capacity) if expandable_segments else Allocator(capacity)
    dying: list[list[int]] = [[] for _ in sizes_bytes]
    for index, (_, death) in enumerate(zip(sizes_bytes, deaths, strict=True)):
        if 0 <= death <= index:
            raise ValueError(f"allocation {index} must be made before it is freed; it is freed after {death} allocations.")
        if 0 <= death < len(dying):
            dying[death].append(index)
    blocks: list[Block | None] = []
    is_out_of_memory = False
    for index, size_bytes in enumerate(sizes_bytes):
        for dead in dying[index]:
            block = blocks[dead]
            if block is not None:
                allocator.release(block)
        try:
            blocks.append(allocator.allocate(size_bytes) if size_bytes else None)
        except DeviceFullError:
            is_out_of_memory = True
            break
    return Replay(
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        retries=allocator.retries,
        out_of_memory=is_out_of_memory,
    )


class Recording:
    """A recorded step whose allocations can be replayed at any micro-batch size; replays without a capacity are remembered.

    Args:
        table: Every allocation, with its size as a polynomial of the micro-batch size.
        expandable_segments: See ``replay``.
    """

    def __init__(self, table: AllocationTable, *, expandable_segments: bool = False) -> None:
        cubed = table.per_sample_cubed_bytes or (0,) * len(table.fixed_bytes)
        self._fixed, self._per_sample, self._squared, self._cubed, self._rounding = (
            np.array(column, dtype=np.int64)
            for column in (table.fixed_bytes, table.per_sample_bytes, table.per_sample_squared_bytes, cubed, table.rounding_bytes)
        )
        self._deaths = table.death
        self._expandable_segments = expandable_segments
        self._dying = np.array(table.death, dtype=np.int64)
        self._known: dict[int, Replay] = {}

    def sizes_bytes(self, micro_batch_size: int) -> NDArray[np.int64]:
        """Bytes of every allocation at one size: its polynomial, rounded up."""
        b = micro_batch_size
        exact = self._fixed + b * (self._per_sample + b * (self._squared + b * self._cubed))
        rounded: NDArray[np.int64] = -(-exact // self._rounding) * self._rounding
        return rounded

    def live_bytes(self, micro_batch_size: int) -> int:
        """Peak of the live allocations, each rounded to whole blocks: what no allocator of this kind can do without."""
        blocks = -(-self.sizes_bytes(micro_batch_size) // BLOCK_ROUNDING_BYTES) * BLOCK_ROUNDING_BYTES
        change = np.append(blocks, 0)
        freed = self._dying >= 0
        np.subtract.at(change, self._dying[freed], blocks[freed])
        return int(np.cumsum(change).max(initial=0))

    def at(self, micro_batch_size: int) -> Replay:
        """Replay on a device without end."""
        if micro_batch_size not in self._known:
            self._known[micro_batch_size] = self._replay(micro_batch_size, None)
        return self._known[micro_batch_size]

    def within(self, micro_batch_size: int, capacity_bytes: int) -> Replay:
        """Replay on a device that has so many bytes; the same as without end while those suffice."""
        known = self._known.get(micro_batch_size)
        if known is not None and known.peak_reserved_bytes <= capacity_bytes:
            return known
        return self._replay(micro_batch_size, capacity_bytes)

    def _replay(self, micro_batch_size: int, capacity_bytes: int | None) -> Replay:
        return replay(
            self.sizes_bytes(micro_batch_size).tolist(),
            self._deaths,
            capacity_bytes=capacity_bytes,
            expandable_segments=self._expandable_segments,
        )


def smooth_ceiling(
    step: Recording | AllocationTable, capacity_bytes: int, *, largest: int = LARGEST_SIZE, tolerance: float = 0.0
) -> int | None:
    """Largest size at which the allocator reserves no more than the capacity, so that it never has to free its cache and retry.

    What is reserved grows with the size, but not at every step: a larger block may happen to fit a free one better. The search narrows
    an interval whose ends are known to fit and not to fit, so it finds a size that fits and whose successor does not, then moves up while
    one of the next ``_NEIGHBOURS`` sizes fits. A smaller size that does not fit may still exist, and a larger one further up that does.

    Args:
        step: The step; a recording that is used again remembers its replays.
        capacity_bytes: The most that may be reserved.
        largest: Cap on the size from elsewhere.
        tolerance: Stop at an interval of this share of its lower end, which is then the answer; 0 finds it to the sample.

    Returns:
        The size; none when one sample does not fit.
    """
    recording = _recording(step)
    upper = _largest_live(recording, capacity_bytes, largest)
    if upper is None or recording.at(1).peak_reserved_bytes > capacity_bytes:
        return None
    if recording.at(upper).peak_reserved_bytes <= capacity_bytes:
        return upper
    low, high, turn = 1, upper, 0
    while high - low > max(1, tolerance * low):
        below = capacity_bytes - recording.at(low).peak_reserved_bytes
        above = recording.at(high).peak_reserved_bytes - capacity_bytes
        share = 0.5 if turn % 3 == 2 else below / (below + above)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if recording.at(middle).peak_reserved_bytes <= capacity_bytes else (low, middle)
        turn += 1
    if high - low > 1:
        return low
    return _best_neighbour(lambda size: recording.at(size).peak_reserved_bytes <= capacity_bytes, low, upper)


def hard_ceiling(step: Recording | AllocationTable, capacity_bytes: int, *, largest: int = LARGEST_SIZE) -> int | None:
    """Largest size that fits at all, with as many retries as it takes; the same search as ``smooth_ceiling``, with the same reservation.

    It lies between the smooth ceiling and the largest size whose live bytes fit.
    """
    recording = _recording(step)

    def fits(size: int) -> bool:
        return not recording.within(size, capacity_bytes).out_of_memory

    upper = _largest_live(recording, capacity_bytes, largest)
    low = smooth_ceiling(recording, capacity_bytes, largest=largest) or 1
    if upper is None or not fits(low):
        return None
    if fits(upper):
        return upper
    high = upper
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _best_neighbour(fits, low, upper)


def _recording(step: Recording | AllocationTable) -> Recording:
    return step if isinstance(step, Recording) else Recording(step)


def _largest_live(recording: Recording, capacity_bytes: int, largest: int) -> int | None:
    """Largest size whose live bytes fit; no larger one can."""
    if recording.live_bytes(1) > capacity_bytes:
        return None
    low = 1
    while low < largest and recording.live_bytes(min(2 * low, largest)) <= capacity_bytes:
        low = min(2 * low, largest)
    high = min(2 * low, largest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if recording.live_bytes(middle) <= capacity_bytes else (low, middle)
    return low


def _best_neighbour(fits: Callable[[int], bool], size: int, upper: int) -> int:
    """Move up as long as one of the next sizes fits; the one after ``size`` is known not to."""
    while True:
        better = next((above for above in range(min(size + _NEIGHBOURS, upper), size, -1) if fits(above)), None)
        if better is None:
            return size
        size = better
