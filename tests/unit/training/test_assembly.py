"""A plan for other ranks."""

import pytest

from rightbatch.errors import UsageError
from rightbatch.records.plan import BatchPlan
from rightbatch.training.assembly import plan_for_ranks


@pytest.mark.parametrize(
    ("given", "ranks", "wanted"),
    [
        ((512, 128, 4, 1), 1, (128, 4)),
        ((512, 128, 4, 1), 2, (128, 2)),
        ((512, 128, 4, 1), 8, (64, 1)),
        ((90, 45, 2, 1), 3, (30, 1)),
        ((70, 10, 7, 1), 2, (7, 5)),
        ((384, 96, 2, 2), 1, (96, 4)),
    ],
)
def test_the_global_batch_stays_and_micro_batches_do_not_grow(given: tuple[int, ...], ranks: int, wanted: tuple[int, int]) -> None:
    size, micro, steps, world = given
    plan = BatchPlan(global_batch_size=size, micro_batch_size=micro, accumulation_steps=steps, world_size=world)

    found = plan_for_ranks(plan, ranks)

    assert (found.global_batch_size, found.world_size) == (size, ranks)
    assert (found.micro_batch_size, found.accumulation_steps) == wanted


def test_a_batch_that_ranks_cannot_share_evenly_is_refused_with_sizes_that_can() -> None:
    with pytest.raises(UsageError, match="got 100 for 3 ranks; use --plan 99 or 102"):
        plan_for_ranks(BatchPlan(global_batch_size=100, micro_batch_size=100), 3)
