"""The blocks, pools and segments of PyTorch's CUDA caching allocator, as rules over numbers.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch 2.x (native backend, default options, one stream) and the constants of
``c10/core/AllocatorConfig.h``. See docs/theory/caching_allocator.md.
"""

from bisect import bisect_left, insort

from rightbatch.units import MIB

BLOCK_ROUNDING_BYTES = 512
"""Every request is rounded up to a multiple of this."""
LARGEST_SMALL_BYTES = MIB
"""Requests up to here come from the pool of small blocks."""
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
"""Size of a segment for requests below ``LEAST_OWN_SEGMENT_BYTES`` that are not small."""
LEAST_OWN_SEGMENT_BYTES = 10 * MIB
"""Requests from here on get a segment of their own size."""
SEGMENT_ROUNDING_BYTES = 2 * MIB
ENDLESS_BYTES = 2**62
"""Capacity of a device without end, and the address space of an expandable segment."""


class Block:
    """A stretch of a segment: in use, free, or (in an expandable segment) not mapped."""

    __slots__ = ("address", "after", "before", "is_free", "is_mapped", "pool", "size_bytes")

    def __init__(self, address: int, size_bytes: int, pool: "Pool", before: "Block | None", after: "Block | None") -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.pool = pool
        self.before = before
        self.after = after
        self.is_free = True
        self.is_mapped = True

    def cut(self, size_bytes: int) -> "Block":
        """Keep the first bytes; return the rest as a block behind, free and mapped or not like this one."""
        rest = Block(self.address + size_bytes, self.size_bytes - size_bytes, self.pool, self, self.after)
        rest.is_mapped = self.is_mapped
        if rest.after is not None:
            rest.after.before = rest
        self.after, self.size_bytes = rest, size_bytes
        return rest


class Pool:
    """Free blocks by (size, address) and unmapped ones by address, for small or for large requests."""

    __slots__ = ("free", "least_remainder_bytes", "page_bytes", "unmapped")

    def __init__(self, *, is_small: bool, is_expandable: bool) -> None:
        self.page_bytes = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        self.least_remainder_bytes = BLOCK_ROUNDING_BYTES if is_small or is_expandable else LARGEST_SMALL_BYTES + 1
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []

    def put(self, block: Block) -> None:
        """List a block that is not in use."""
        if block.is_mapped:
            insort(self.free, (block.size_bytes, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def take(self, block: Block) -> None:
        """Strike a block off its list."""
        if block.is_mapped:
            del self.free[bisect_left(self.free, (block.size_bytes, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]

    def put_merged(self, block: Block) -> Block:
        """List a block that is not in use as one with its neighbours of the same kind."""
        before, after = block.before, block.after
        if before is not None and before.is_free and before.is_mapped == block.is_mapped:
            self.take(before)
            block.address, block.size_bytes, block.before = before.address, before.size_bytes + block.size_bytes, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.is_free and after.is_mapped == block.is_mapped:
            self.take(after)
            block.size_bytes, block.after = block.size_bytes + after.size_bytes, after.after
            if block.after is not None:
                block.after.before = block
        self.put(block)
        return block


class DeviceFullError(Exception):
    """A request does not fit even after the cache was freed."""


class Allocator:
    """The allocator with segments of fixed size."""

    def __init__(self, capacity_bytes: int, *, is_expandable: bool = False) -> None:
        self.small = Pool(is_small=True, is_expandable=is_expandable)
        self.large = Pool(is_small=False, is_expandable=is_expandable)
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.retries = 0
        self.next_address = 0

    def allocate(self, size_bytes: int) -> Block:
        """Return a block of at least that many bytes.

        Raises:
            DeviceFullError: The capacity is exceeded even after freeing what is cached.
        """
        needed = -(-size_bytes // BLOCK_ROUNDING_BYTES) * BLOCK_ROUNDING_BYTES
        pool = self.small if needed <= LARGEST_SMALL_BYTES else self.large
        block = self.best_fit(pool, needed) or self.grow(pool, needed)
        if block is None:
            self.retries += 1
            self.release_cached()
            block = self.grow(pool, needed)
            if block is None:
                raise DeviceFullError
        if block.size_bytes - needed >= pool.least_remainder_bytes:
            pool.put(block.cut(needed))
        block.is_free = False
        self.allocated_bytes += block.size_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def best_fit(self, pool: Pool, needed: int) -> Block | None:
        """Take the smallest free block that is large enough."""
        place = bisect_left(pool.free, (needed,))
        return pool.free.pop(place)[2] if place < len(pool.free) else None

    def grow(self, pool: Pool, needed: int) -> Block | None:
        """Reserve a new segment; none when the capacity does not allow it."""
        size_bytes = segment_bytes(needed)
        if not self.reserve(size_bytes):
            return None
        block = Block(self.next_address, size_bytes, pool, None, None)
        self.next_address += size_bytes
        return block

    def reserve(self, size_bytes: int) -> bool:
        """Count bytes taken from the device, if it has them."""
        if self.reserved_bytes + size_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += size_bytes
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
        return True

    def release(self, block: Block) -> None:
        """Take a block back and merge it with its free neighbours."""
        self.allocated_bytes -= block.size_bytes
        block.is_free = True
        block.pool.put_merged(block)

    def release_cached(self) -> None:
        """Give back every segment of which no part is in use."""
        for pool in (self.large, self.small):
            whole = [entry for entry in pool.free if entry[2].before is None and entry[2].after is None]
            pool.free = [entry for entry in pool.free if entry[2].before is not None or entry[2].after is not None]
            self.reserved_bytes -= sum(size for size, _, _ in whole)


class ExpandableAllocator(Allocator):
    """The allocator with ``expandable_segments:True``: one segment a pool, of which pages are mapped as they are needed."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, is_expandable=True)
        for pool in (self.small, self.large):
            space = Block(0, ENDLESS_BYTES, pool, None, None)
            space.is_mapped = False
            pool.put(space)

    def best_fit(self, pool: Pool, needed: int) -> Block | None:
        """Take the smallest free block that is large enough; one before unmapped space counts as large as it can become."""
        place = bisect_left(pool.free, (needed,))
        if place == len(pool.free):
            return None
        while place + 1 < len(pool.free) and _expandable_bytes(pool.free[place + 1][2]) < _expandable_bytes(pool.free[place][2]):
            place += 1
        return pool.free.pop(place)[2]

    def grow(self, pool: Pool, needed: int) -> Block | None:
        """Map pages at the first hole that is wide enough, together with the free block before it."""
        block = next(found for _, hole in pool.unmapped if (found := _start_of_room(hole, needed)) is not None)
        while not block.is_mapped or block.size_bytes < needed:
            hole = block if not block.is_mapped else block.after
            assert hole is not None, "room was found, so space follows"  # noqa: S101
            missing = needed if hole is block else needed - block.size_bytes
            mapped = self._map(hole, min(missing, hole.size_bytes))
            if mapped is None:
                return None
            block = mapped
        pool.take(block)
        return block

    def _map(self, hole: Block, size_bytes: int) -> Block | None:
        pool = hole.pool
        size_bytes = min(-(-size_bytes // pool.page_bytes) * pool.page_bytes, hole.size_bytes)
        if not self.reserve(size_bytes):
            return None
        pool.take(hole)
        if hole.size_bytes > size_bytes:
            pool.put(hole.cut(size_bytes))
        hole.is_mapped = True
        return pool.put_merged(hole)

    def release_cached(self) -> None:
        """Unmap every page of which no part is in use."""
        for pool in (self.large, self.small):
            for _, _, block in tuple(pool.free):
                self._unmap(block)

    def _unmap(self, block: Block) -> None:
        pool, page, end = block.pool, block.pool.page_bytes, block.address + block.size_bytes
        first, last = -(-block.address // page) * page, end // page * page
        if first >= last:
            return
        pool.take(block)
        if last < end:
            pool.put(block.cut(last - block.address))
        if block.address < first:
            pages = block.cut(first - block.address)
            pool.put(block)
            block = pages
        block.is_mapped = False
        self.reserved_bytes -= block.size_bytes
        pool.put_merged(block)


def segment_bytes(needed: int) -> int:
    """Return what is asked of the device for a request that no free block serves, in bytes."""
    if needed <= LARGEST_SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if needed < LEAST_OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-needed // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES


def _expandable_bytes(block: Block) -> int:
    after = block.after
    return block.size_bytes + (after.size_bytes if after is not None and not after.is_mapped else 0)


def _start_of_room(hole: Block, needed: int) -> Block | None:
    """The hole, or the free block before it, if from there on so many bytes are free or unmapped."""
    start = hole.before if hole.before is not None and hole.before.is_free else hole
    room_bytes, block = 0, start
    while room_bytes < needed:
        room_bytes += block.size_bytes
        if room_bytes < needed and (block.after is None or not block.after.is_free):
            return None
        block = block.after or block
    return start
