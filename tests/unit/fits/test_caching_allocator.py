"""The rules of the caching allocator, one at a time on hand-made lists, then against a slow twin on random ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rightbatch.fits.allocator_blocks import segment_bytes
from rightbatch.fits.caching_allocator import Recording, hard_ceiling, replay, smooth_ceiling
from rightbatch.fits.memory import sizes_bytes
from rightbatch.records.measurements import AllocationKind, AllocationTable
from rightbatch.units import KIB, MIB

KEPT = -1


def table(*rows: tuple[int, int, int]) -> AllocationTable:
    """Rows of (fixed bytes, bytes per sample, death)."""
    count = len(rows)
    return AllocationTable(
        fixed_bytes=tuple(row[0] for row in rows),
        per_sample_bytes=tuple(row[1] for row in rows),
        per_sample_squared_bytes=(0,) * count,
        rounding_bytes=(1,) * count,
        death=tuple(row[2] for row in rows),
        kind=(AllocationKind.TEMPORARY,) * count,
        module=(0,) * count,
        operation=(0,) * count,
        modules=("",),
        operations=("aten.empty",),
    )


# --- rounding and segments


@pytest.mark.parametrize(("size", "allocated"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB)])
def test_requests_are_rounded_up_to_512_bytes(size, allocated) -> None:
    assert replay([size], [KEPT]).peak_allocated_bytes == allocated


def test_request_of_no_bytes_takes_nothing() -> None:
    assert replay([0, 0], [KEPT, KEPT]).peak_reserved_bytes == 0


@pytest.mark.parametrize(
    ("size", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (101 * MIB, 102 * MIB),
    ],
)
def test_segments_have_the_size_of_their_class(size, reserved) -> None:
    assert replay([size], [KEPT]).peak_reserved_bytes == reserved


def test_segment_is_chosen_by_the_rounded_request() -> None:
    assert segment_bytes(10 * MIB) == 10 * MIB
    assert replay([10 * MIB - 1], [KEPT]).peak_reserved_bytes == 10 * MIB


# --- pools, best fit, splitting


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    assert replay([MIB, MIB], [KEPT] * 2).peak_reserved_bytes == 2 * MIB
    assert replay([MIB, MIB, 1], [KEPT] * 3).peak_reserved_bytes == 4 * MIB


def test_small_requests_never_take_from_the_large_pool() -> None:
    assert replay([5 * MIB, 1], [1, KEPT]).peak_reserved_bytes == 22 * MIB


def test_large_request_keeps_a_remainder_of_one_mib_and_gives_back_a_larger_one() -> None:
    # 19 MiB get a segment of 20: the remainder of exactly 1 MiB is not split off, so that all 20 count as allocated.
    assert replay([19 * MIB], [KEPT]).peak_allocated_bytes == 20 * MIB
    assert replay([19 * MIB - 512], [KEPT]).peak_allocated_bytes == 19 * MIB - 512
    assert replay([19 * MIB - 512, MIB + 512], [KEPT, KEPT]).peak_reserved_bytes == 20 * MIB


def test_small_remainder_of_512_bytes_serves_the_next_request() -> None:
    sizes = [MIB, MIB - 512, 512, 1]

    assert replay(sizes[:3], [KEPT] * 3).peak_reserved_bytes == 2 * MIB
    assert replay(sizes, [KEPT] * 4).peak_reserved_bytes == 4 * MIB


def test_smallest_free_block_that_is_large_enough_is_taken() -> None:
    # Free: 40 and 30 MiB. 29 MiB must come out of the 30, or the 40 that follow would need a new segment.
    assert replay([40 * MIB, 30 * MIB, 29 * MIB, 40 * MIB], [2, 2, KEPT, KEPT]).peak_reserved_bytes == 70 * MIB


# --- freeing


def test_neighbours_merge_when_freed() -> None:
    # Three of 6 MiB in one segment of 20; two adjacent ones freed together hold 12.
    assert replay([6 * MIB, 6 * MIB, 6 * MIB, 12 * MIB], [3, 3, KEPT, KEPT]).peak_reserved_bytes == 20 * MIB


def test_neighbours_with_a_block_in_use_between_them_do_not_merge() -> None:
    assert replay([6 * MIB, 6 * MIB, 6 * MIB, 12 * MIB], [3, KEPT, 3, KEPT]).peak_reserved_bytes == 32 * MIB


def test_blocks_of_different_segments_do_not_merge() -> None:
    assert replay([10 * MIB, 10 * MIB, 20 * MIB], [2, 2, KEPT]).peak_reserved_bytes == 40 * MIB


def test_death_is_counted_in_allocations_made() -> None:
    assert replay([30 * MIB, 30 * MIB], [1, KEPT]).peak_reserved_bytes == 30 * MIB
    assert replay([30 * MIB, 30 * MIB], [2, KEPT]).peak_reserved_bytes == 60 * MIB


def test_freed_before_it_is_made_is_misuse() -> None:
    with pytest.raises(ValueError, match="allocation 1 must be made before it is freed"):
        replay([1, 1], [KEPT, 1])


# --- capacity


def test_cached_segments_are_freed_and_the_request_tried_again_when_the_capacity_is_reached() -> None:
    result = replay([30 * MIB, 40 * MIB], [1, KEPT], capacity_bytes=40 * MIB)

    assert (result.retries, result.out_of_memory, result.peak_reserved_bytes) == (1, False, 40 * MIB)


def test_segment_with_a_part_in_use_is_not_freed() -> None:
    result = replay([6 * MIB, 6 * MIB, 30 * MIB], [2, KEPT, KEPT], capacity_bytes=40 * MIB)

    assert (result.retries, result.out_of_memory) == (1, True)


def test_both_pools_are_freed() -> None:
    assert replay([1, 30 * MIB, 40 * MIB], [2, 2, KEPT], capacity_bytes=40 * MIB).out_of_memory is False


def test_capacity_that_is_just_enough_needs_no_retry() -> None:
    assert replay([30 * MIB, 40 * MIB], [KEPT, KEPT], capacity_bytes=70 * MIB).retries == 0
    assert replay([30 * MIB, 40 * MIB], [KEPT, KEPT], capacity_bytes=70 * MIB - 1).out_of_memory


# --- expandable segments


def test_expandable_segments_map_pages_of_2_and_20_mib() -> None:
    assert replay([1], [KEPT], expandable_segments=True).peak_reserved_bytes == 2 * MIB
    assert replay([21 * MIB], [KEPT], expandable_segments=True).peak_reserved_bytes == 40 * MIB


def test_expandable_segment_grows_at_its_free_end() -> None:
    # 40 MiB freed at the end of the segment, 60 wanted: a page is added behind instead of three.
    result = replay([20 * MIB, 40 * MIB, 60 * MIB], [KEPT, 2, KEPT], expandable_segments=True)

    assert result.peak_reserved_bytes == 80 * MIB
    assert replay([20 * MIB, 40 * MIB, 60 * MIB], [KEPT, 2, KEPT]).peak_reserved_bytes == 120 * MIB


def test_expandable_segment_spares_its_free_end_for_requests_that_need_it_to_grow() -> None:
    # Free: 40 MiB in front and 20 at the end. 20 wanted come out of the 40, although the 20 fit exactly; the 40 after it grow from the end.
    result = replay([40 * MIB, 20 * MIB, 20 * MIB, 20 * MIB, 40 * MIB], [3, KEPT, 3, KEPT, KEPT], expandable_segments=True)

    assert result.peak_reserved_bytes == 100 * MIB


@pytest.mark.parametrize(("sizes", "deaths"), [((30, 10, 60), (2, KEPT, KEPT)), ((10, 30, 60), (KEPT, 2, KEPT))])
def test_only_whole_pages_are_unmapped(sizes, deaths) -> None:
    # 30 of 40 MiB are freed beside 10 in use: one page of the two can go, so that 60 more need 80 in all.
    sizes_bytes = [size * MIB for size in sizes]

    assert not replay(sizes_bytes, deaths, capacity_bytes=80 * MIB, expandable_segments=True).out_of_memory
    assert replay(sizes_bytes, deaths, capacity_bytes=80 * MIB - 1, expandable_segments=True).out_of_memory


def test_expandable_segment_gives_back_pages_in_its_middle() -> None:
    # 60 MiB in use, the middle 20 freed: 20 fewer pages, which a request at the end may use.
    result = replay([20 * MIB, 20 * MIB, 20 * MIB, 30 * MIB], [KEPT, 3, KEPT, KEPT], capacity_bytes=80 * MIB, expandable_segments=True)

    assert (result.retries, result.out_of_memory) == (1, False)


def test_expandable_segment_keeps_pages_that_are_partly_in_use() -> None:
    result = replay([10 * MIB, 10 * MIB, 30 * MIB], [2, KEPT, KEPT], capacity_bytes=40 * MIB, expandable_segments=True)

    assert result.out_of_memory


# --- a slow twin, and what is always true


def slow_replay(sizes: list[int], deaths: list[int]) -> int:
    """Peak reserved bytes by keeping every segment as a list of [owner, start, size] and looking through all of them, again and again."""
    segments: list[tuple[bool, list[list[int]]]] = []
    peak = reserved = 0
    for index, size in enumerate(sizes):
        for _, blocks in segments:
            for block in blocks:
                if block[0] >= 0 and deaths[block[0]] == index:
                    block[0] = -1
            place = 0
            while place + 1 < len(blocks):
                if blocks[place][0] < 0 and blocks[place + 1][0] < 0:
                    blocks[place][2] += blocks.pop(place + 1)[2]
                else:
                    place += 1
        needed = (size + 511) // 512 * 512
        is_small = needed <= MIB
        fitting = [
            (block[2], number, block[1])
            for number, (small, blocks) in enumerate(segments)
            if small == is_small
            for block in blocks
            if block[0] < 0 and block[2] >= needed
        ]
        if not fitting:
            whole = 2 * MIB if is_small else 20 * MIB if needed < 10 * MIB else (needed + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            segments.append((is_small, [[-1, 0, whole]]))
            reserved += whole
            peak = max(peak, reserved)
            fitting = [(whole, len(segments) - 1, 0)]
        _, number, start = min(fitting)
        blocks = segments[number][1]
        place = next(i for i, block in enumerate(blocks) if block[1] == start)
        rest = blocks[place][2] - needed
        blocks[place][0] = index
        if rest >= 512 if is_small else rest > MIB:
            blocks[place][2] = needed
            blocks.insert(place + 1, [-1, start + needed, rest])
    return peak


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    sizes = draw(
        st.lists(st.sampled_from([1, 512, 300 * KIB, MIB, MIB + 512, 3 * MIB, 9 * MIB, 10 * MIB, 21 * MIB, 47 * MIB]), max_size=40)
    )
    deaths = [draw(st.one_of(st.just(KEPT), st.integers(index + 1, len(sizes)))) for index in range(len(sizes))]
    return sizes, deaths


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lists())
def test_replay_equals_the_slow_twin(trace) -> None:
    sizes, deaths = trace
    assert replay(sizes, deaths).peak_reserved_bytes == slow_replay(sizes, deaths)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lists(), st.booleans(), st.integers(0, 200))
def test_reserved_covers_allocated_and_never_exceeds_the_capacity(trace, is_expandable, capacity_mib) -> None:
    sizes, deaths = trace
    result = replay(sizes, deaths, capacity_bytes=capacity_mib * MIB, expandable_segments=is_expandable)

    assert result.peak_allocated_bytes <= result.peak_reserved_bytes <= capacity_mib * MIB


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lists(), st.booleans())
def test_capacity_matters_only_below_what_is_reserved_without_one(trace, is_expandable) -> None:
    """Not more than that: with less, one retry may tidy up so well that fewer follow than with a little more."""
    sizes, deaths = trace
    free = replay(sizes, deaths, expandable_segments=is_expandable)

    assert replay(sizes, deaths, capacity_bytes=free.peak_reserved_bytes, expandable_segments=is_expandable) == free
    if free.peak_reserved_bytes:
        assert replay(sizes, deaths, capacity_bytes=free.peak_reserved_bytes - 1, expandable_segments=is_expandable).retries >= 1


# --- sizes and ceilings


def test_sizes_follow_the_polynomial_and_the_rounding() -> None:
    made = table((100, 10, KEPT), (0, 3, KEPT)).model_copy(update={"per_sample_squared_bytes": (2, 0), "rounding_bytes": (1, 64)})

    assert Recording(made).sizes_bytes(5).tolist() == [100 + 50 + 50, 64]
    cubic = made.model_copy(update={"per_sample_cubed_bytes": (0, 2)})
    assert Recording(cubic).sizes_bytes(5).tolist() == sizes_bytes(cubic, 5) == [200, 320]


def test_live_bytes_are_the_peak_of_rounded_blocks() -> None:
    # 512 and 1024 live together; the first is gone when 2048 arrive.
    assert Recording(table((1, 0, 2), (600, 0, KEPT), (2000, 0, KEPT))).live_bytes(1) == 1024 + 2048


STEP = table((20 * MIB, 0, KEPT), (0, 3 * MIB, 3), (0, 5 * MIB, 4), (0, 4 * MIB, KEPT), (0, 2 * MIB, 5), (0, 6 * MIB, KEPT))


@pytest.mark.parametrize("is_expandable", [False, True])
def test_ceilings_equal_counting_upwards(is_expandable) -> None:
    recording = Recording(STEP, expandable_segments=is_expandable)
    capacity = 2000 * MIB
    sizes = range(1, 400)

    smooth = max(b for b in sizes if recording.at(b).peak_reserved_bytes <= capacity)
    hard = max(b for b in sizes if not recording.within(b, capacity).out_of_memory)

    assert smooth_ceiling(recording, capacity) == smooth
    assert hard_ceiling(recording, capacity) == hard
    assert smooth <= hard


def test_a_size_between_the_ceilings_fits_with_retries() -> None:
    recording = Recording(STEP)
    smooth, hard = smooth_ceiling(recording, 2000 * MIB), hard_ceiling(recording, 2000 * MIB)
    result = recording.within(hard, 2000 * MIB)

    assert smooth < hard
    assert (result.out_of_memory, result.retries > 0) == (False, True)


@pytest.mark.parametrize("target", range(101, 121, 2))
def test_search_looks_beyond_sizes_that_do_not_fit(target) -> None:
    # Even sizes reserve 40 MiB more, so that with room for 109 odd samples 108 do not fit, and 107 has a successor that does not.
    class Bumpy(Recording):
        def at(self, size):
            return replay([26 * MIB * size + (0 if size % 2 else 40 * MIB)], [KEPT])

    recording = Bumpy(table((0, 20 * MIB, KEPT)))
    capacity = 26 * target * MIB

    assert recording.at(target - 1).peak_reserved_bytes > capacity
    assert smooth_ceiling(recording, capacity) == target


def test_tolerance_gives_a_size_that_fits_near_the_ceiling() -> None:
    recording = Recording(STEP)
    exact, rough = smooth_ceiling(recording, 2000 * MIB), smooth_ceiling(recording, 2000 * MIB, tolerance=0.05)

    assert recording.at(rough).peak_reserved_bytes <= 2000 * MIB
    assert 0.95 * exact <= rough <= exact


def test_ceiling_stops_at_the_cap_from_elsewhere() -> None:
    recording = Recording(STEP)

    assert smooth_ceiling(recording, 2000 * MIB, largest=7) == 7
    assert hard_ceiling(recording, 2000 * MIB, largest=7) == 7


def test_nothing_fits_when_one_sample_does_not() -> None:
    recording = Recording(STEP)

    assert smooth_ceiling(STEP, 25 * MIB) is None
    assert hard_ceiling(recording, 25 * MIB) is None


def test_step_that_does_not_grow_fits_at_any_size() -> None:
    assert smooth_ceiling(Recording(table((MIB, 0, KEPT))), 2 * MIB, largest=1000) == 1000
