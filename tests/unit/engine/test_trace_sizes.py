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
    assert learned.remark == "Other laws hold from 26 samples on: aten.large stands for aten.small."
    for size in (1, 2, 25, 26, 27, 128, 1024):
        assert predicted(learned, size) == kernel(size), size


def test_a_kernel_that_changes_just_below_the_large_size_is_found():
    def kernel(size):
        return 4 * size if size < 128 else 100 * size

    learned = learn(lambda size, _: log_of(size, kernel(size)))
    assert learned.is_exact
    assert [predicted(learned, size) for size in (127, 128, 500)] == [508, 12800, 50000]


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
    assert learned.sizes == (2, 3, 32)
    assert learned.is_exact


def test_an_error_at_two_samples_is_the_users_own():
    def record(size, _):
        raise ValueError("this step never runs")

    with pytest.raises(ValueError, match="never runs"):
        learn(record)


@pytest.mark.parametrize(("power", "largest"), [(1, 64), (2, 32), (3, 16)])
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
    assert learned.sizes == (1, 2, 32)


def test_what_holds_at_no_large_size_is_an_estimate_and_said():
    def record(size, _):
        return log_of(size, *[8 * size] * (1 + size // 16))

    learned = learn(record)
    assert not learned.is_exact
    assert "an estimate above 7 samples: the number of allocations is 9 instead of 1 at 128 samples" in learned.remark


def test_a_step_with_very_many_allocations_is_not_recorded_ten_times_more():
    def record(size, _):
        return log_of(size, *[8 * size if size < 30 else 9 * size] * (MOST_HALVED_ALLOCATIONS + 1))

    learned = learn(record)
    assert learned.sizes == (1, 2, 3, 5, 7, 128)
    assert not learned.is_exact


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
