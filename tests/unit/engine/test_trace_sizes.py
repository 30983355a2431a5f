"""Few recordings suffice, kernels that change with the size are found, and what follows no law is said."""

import pytest

from rightbatch.engine.memory_trace import Allocation, AllocationLog
from rightbatch.engine.trace_sizes import CHECKED_SIZES, LARGEST_GROWTH_BYTES, MOST_HALVED_ALLOCATIONS, learn
from rightbatch.fits.memory import traced_peak_bytes
from rightbatch.records.measurements import MemoryTrace


def log_of(size, *sizes_bytes, operation="aten.relu"):
    return AllocationLog(size, [Allocation(size_bytes, "layer", operation) for size_bytes in sizes_bytes])


def predicted(learned, size):
    trace = MemoryTrace(
        batch_sizes=learned.sizes, recorded_on="device", event_count=1, moments=learned.moments, consistent=True, allocations=learned.table
    )
    return traced_peak_bytes(trace, size)


def test_an_affine_law_is_checked_at_one_large_size_on_another_draw():
    asked = []

    def record(size, draw):
        asked.append((size, draw))
        return log_of(size, 100, 8 * size)

    learned = learn(record)
    assert asked == [(2, 0), (1, 0), (CHECKED_SIZES[0], 1)]
    assert learned.is_exact
    assert learned.remark == ""
    assert predicted(learned, 1000) == 8100


def test_a_kernel_that_changes_is_found_by_halving():
    def kernel(size):
        return 10 + 4 * size if size <= 25 else 4 * size + 2 * size * size

    learned = learn(lambda size, _: log_of(size, kernel(size), operation="aten.small" if size <= 25 else "aten.large"))
    assert learned.is_exact
    assert learned.remark == "Other laws hold from 26 samples on: aten.large stands for aten.small in layer."
    for size in (1, 2, 25, 26, 27, 128, 1024):
        assert predicted(learned, size) == kernel(size), size


def test_a_kernel_that_changes_just_below_the_large_size_is_found():
    def kernel(size):
        return 4 * size if size < 113 else 100 * size

    learned = learn(lambda size, _: log_of(size, kernel(size)))
    assert learned.is_exact
    assert [predicted(learned, size) for size in (112, 113, 500)] == [448, 11300, 50000]


def test_one_sample_that_is_a_case_of_its_own_is_exact():
    learned = learn(lambda size, _: log_of(size, 8 * size) if size > 1 else log_of(size, 5, 1))
    assert learned.is_exact
    assert [predicted(learned, size) for size in (1, 2, 300)] == [6, 16, 2400]


def test_a_size_at_which_the_step_cannot_run_is_left_out():
    def record(size, _):
        if size == 1 or size > 40:
            raise ValueError("more than one value, and no more than forty")
        return log_of(size, 8 * size)

    learned = learn(record)
    assert learned.sizes == (2, 3, 27)
    assert learned.is_exact


def test_an_error_at_two_samples_is_the_users_own():
    def record(size, _):
        raise ValueError("this step never runs")

    with pytest.raises(ValueError, match="never runs"):
        learn(record)


@pytest.mark.parametrize(("power", "largest"), [(1, 59), (2, 27), (3, 19)])
def test_the_large_size_stays_cheap_however_allocations_grow(power, largest):
    per_power = LARGEST_GROWTH_BYTES // largest**power
    asked = []

    def record(size, _):
        asked.append(size)
        return log_of(size, per_power * size**power)

    learn(record)
    assert max(asked) == largest


def test_the_large_size_stays_far_below_the_limit_of_the_device():
    learned = learn(lambda size, _: log_of(size, 100 * size), limit_bytes=8 * 100 * 33)
    assert learned.sizes == (1, 2, 27)


def test_two_changes_are_both_found():
    def kernel(size):
        return 8 * size if size <= 10 else 3 * size * size if size <= 21 else 500 + size

    learned = learn(lambda size, _: log_of(size, kernel(size)))
    assert learned.is_exact
    for size in (1, 10, 11, 21, 22, 128, 1024):
        assert predicted(learned, size) == kernel(size), size


@pytest.mark.parametrize("piece", [16, 64])
def test_what_is_cut_into_pieces_of_a_fixed_size_is_an_estimate_and_said(piece):
    learned = learn(lambda size, _: log_of(size, *[8 * size] * -(-size // piece)))
    assert not learned.is_exact
    assert "The trace is an estimate above" in learned.remark
    assert "the number of allocations" in learned.remark


def test_laws_above_a_change_that_would_cost_much_to_confirm_are_an_estimate():
    def kernel(size):
        return size * (LARGEST_GROWTH_BYTES // 113 if size <= 100 else LARGEST_GROWTH_BYTES // 64)

    learned = learn(lambda size, _: log_of(size, kernel(size)))
    assert learned.remark.endswith("The trace is an estimate above 113 samples: no larger size was recorded.")
    assert not learned.is_exact
    assert predicted(learned, 1000) == kernel(1000)


def test_a_step_with_very_many_allocations_is_not_recorded_ten_times_more():
    def record(size, _):
        return log_of(size, *[8 * size if size < 30 else 9 * size] * (MOST_HALVED_ALLOCATIONS + 1))

    learned = learn(record)
    assert learned.sizes == (1, 2, 3, 5, 7, 72, 113)
    assert "an estimate above 7 samples: aten.relu in layer takes 1017 bytes instead of 904 at 113 samples" in learned.remark
    assert not learned.is_exact


@pytest.mark.parametrize(
    ("law", "sizes"),
    [
        (lambda b: 12 * b * b + 4 * b + 7, (1, 2, 3, 113)),
        (lambda b: 4 * b**3 + b, (1, 2, 3, 5, 7, 113)),
        (lambda b: 40 * (b // 2), (1, 2, 3, 5, 7, 72, 113)),
        (lambda b: 48 * -(-b // 3), (1, 2, 3, 5, 7, 72, 113)),
        (lambda b: 24 * max(1, b // 2), (1, 2, 3, 5, 7, 72, 113)),
        (lambda b: 4 * (b * (b - 1) // 2), (1, 2, 3, 113)),
    ],
)
def test_squares_cubes_pairs_and_fractions_of_a_batch_are_exact(law, sizes):
    learned = learn(lambda size, _: log_of(size, 100, law(size)))
    assert learned.is_exact, learned.remark
    assert learned.sizes == sizes
    for size in (1, 2, 4, 9, 31, 100, 1001):
        assert predicted(learned, size) == 100 + law(size), size


@pytest.mark.parametrize("sizes_bytes", [lambda b: 8 * (b * 3 // 10), lambda b: 8 << b.bit_length(), lambda b: 8 * (b % 7)])
def test_what_follows_no_law_is_given_up_and_said(sizes_bytes):
    learned = learn(lambda size, _: log_of(size, 100, sizes_bytes(size)))
    assert learned.moments == ()
    assert not learned.is_exact
    assert "aten.relu in layer follows no polynomial of the size" in learned.remark


def test_allocations_that_depend_on_the_draw_are_no_law():
    learned = learn(lambda size, draw: log_of(size, 8 * size + draw))
    assert not learned.is_exact


def test_an_order_that_changes_with_the_size_is_a_bound_and_said():
    def record(size, _):
        freed_early = AllocationLog(size, [Allocation(8 * size, "", "a", 1), Allocation(8 * size, "", "b"), Allocation(4, "", "c")])
        freed_late = AllocationLog(size, [Allocation(8 * size, "", "a", 2), Allocation(8 * size, "", "b"), Allocation(4, "", "c")])
        return freed_late if size > 100 else freed_early

    learned = learn(record)
    assert not learned.is_exact
    assert "freed in another order" in learned.remark
    assert predicted(learned, 128) == 2048
