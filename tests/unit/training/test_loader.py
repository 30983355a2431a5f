"""What the loader promises of a `for`, its sizes, its shares, its random numbers and its workers."""

import multiprocessing
import os
import random
import signal
import traceback
import weakref

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

import rightbatch as rb
from fakes import Augmented
from rightbatch.errors import UsageError, WorkloadError
from rightbatch.records.schedule import BatchSetting, MilestoneSizes
from rightbatch.training.batch_schedule import DynamicBatch


def plan_of(global_batch_size, ranks=1, num_workers=None):
    each = global_batch_size // ranks
    return rb.BatchPlan(global_batch_size=global_batch_size, micro_batch_size=each, world_size=ranks, num_workers=num_workers)


def ranks_of(size, batch, ranks, **options):
    return [rb.BatchLoader(Augmented(size), plan_of(batch, ranks), rank=rank, world_size=ranks, **options) for rank in range(ranks)]


def indices_of(batches):
    return [int(index) for batch in batches for index in batch[:, 0]]


def sizes_of(batches):
    return [len(batch) for batch in batches]


def generator_states():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()


class Told:
    """A schedule whose size is whatever was set last."""

    def __init__(self, size):
        self.size = size

    def setting_at(self, samples_seen):
        return BatchSetting(global_batch_size=self.size)


# One `for`


def test_each_epoch_has_an_order_of_its_own_that_only_the_seed_decides():
    loader, again, other = (rb.BatchLoader(Augmented(23), plan_of(batch), seed=seed) for batch, seed in ((5, 1), (7, 1), (5, 2)))
    first, second = indices_of(loader), indices_of(loader)
    assert sorted(first) == sorted(second) == list(range(23))
    assert [indices_of(again), indices_of(again)] == [first, second]
    assert len({tuple(order) for order in (first, second, indices_of(other), range(23))}) == 4


def test_without_shuffling_samples_come_in_the_order_of_the_dataset():
    loader = rb.BatchLoader(Augmented(11), plan_of(4), shuffle=False)
    assert [indices_of(loader), indices_of(loader)] == [list(range(11))] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_after_a_break_the_next_for_goes_on_where_the_last_batch_was_delivered(workers):
    loader = rb.BatchLoader(Augmented(30), plan_of(4), num_workers=workers)
    begun = []
    for batch in loader:
        begun.append(batch)
        if len(begun) == 3:
            break
    assert (loader.epoch, loader.samples_seen, loader.epoch_samples_seen, len(loader)) == (0, 12, 12, 5)
    whole = torch.cat(list(rb.BatchLoader(Augmented(30), plan_of(4))))
    assert torch.equal(torch.cat([*begun, *loader]), whole)
    assert (loader.epoch, loader.samples_seen, loader.epoch_samples_seen, len(loader)) == (1, 30, 0, 8)
    loader.close()


def test_iterators_of_one_loader_share_its_place_and_end_with_the_epoch():
    loader = rb.BatchLoader(Augmented(12), plan_of(2))
    pairs = list(zip(loader, loader, strict=True))
    assert len(pairs) == 3
    assert sorted(indices_of(batch for pair in pairs for batch in pair)) == list(range(12))
    assert loader.epoch == 1


def test_a_batch_that_the_training_let_go_does_not_stay_in_memory():
    batches = iter(rb.BatchLoader(Augmented(12), plan_of(2)))
    batch = next(batches)
    is_kept = weakref.ref(batch)
    del batch
    assert is_kept() is None


def test_a_state_saved_in_the_body_of_the_last_batch_resumes_with_an_empty_rest():
    loader = rb.BatchLoader(Augmented(10), plan_of(4))
    for _ in loader:
        state = loader.state_dict()
    resumed = rb.BatchLoader(Augmented(10), plan_of(4))
    resumed.load_state_dict(state)
    assert (resumed.epoch, len(resumed), list(resumed)) == (0, 0, [])
    assert resumed.epoch == 1
    assert indices_of(resumed) == indices_of(loader)


def test_a_state_saved_before_the_first_batch_resumes_at_the_beginning():
    loader, resumed = (rb.BatchLoader(Augmented(10), plan_of(4)) for _ in range(2))
    next(iter(resumed))
    resumed.load_state_dict(loader.state_dict())
    assert (resumed.samples_seen, resumed.batch_samples) == (0, 0)
    assert torch.equal(torch.cat(list(resumed)), torch.cat(list(loader)))


def test_loading_a_state_takes_effect_in_the_for_that_runs():
    loader = rb.BatchLoader(Augmented(12), plan_of(4), num_workers=1)
    start, seen = loader.state_dict(), []
    for batch in loader:
        seen.append(indices_of([batch]))
        if len(seen) == 2:
            loader.load_state_dict(start)
    assert seen == seen[:2] + seen[:2] + seen[-1:]
    loader.close()


# Sizes


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (1, 3), (2, 6)])
def test_a_new_size_holds_after_the_batches_that_workers_have_begun(workers, ahead):
    told = Told(2)
    loader = rb.BatchLoader(Augmented(60), plan_of(2), schedule=told, num_workers=workers, prefetch_factor=3 if workers else None)
    sizes = []
    for batch in loader:
        sizes.append(len(batch))
        if len(sizes) == 4:
            told.size = 5
    assert sizes[: 4 + ahead + 1] == [2] * (4 + ahead) + [5]
    loader.close()


def test_a_schedule_of_samples_seen_counts_over_epochs():
    schedule = DynamicBatch(MilestoneSizes(milestones=((0, 2), (4, 3), (13, 6))))
    loader = rb.BatchLoader(Augmented(10), plan_of(2), schedule=schedule)
    assert [sizes_of(loader), sizes_of(loader)] == [[2, 2, 3, 3], [3, 6, 1]]


def test_asking_how_much_is_left_commits_the_schedule_to_nothing():
    schedule = DynamicBatch(MilestoneSizes(milestones=((0, 2),)))
    loader = rb.BatchLoader(Augmented(10), plan_of(2), schedule=schedule, drop_last=True)
    before = schedule.state_dict()
    assert (len(loader), loader.samples_per_epoch) == (5, 10)
    assert schedule.state_dict() == before


def test_drop_last_leaves_out_what_does_not_fill_a_batch():
    loader = rb.BatchLoader(Augmented(11), plan_of(4), drop_last=True)
    assert (len(loader), loader.samples_per_epoch, sizes_of(loader)) == (2, 8, [4, 4])
    assert (loader.epoch, loader.samples_seen) == (1, 8)


# Ranks


def test_ranks_take_contiguous_shares_that_differ_by_one_sample_at_most():
    first, second = ranks_of(19, 10, 2, shuffle=False)
    assert [indices_of([batch]) for batch in first] == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]
    assert [indices_of([batch]) for batch in second] == [[5, 6, 7, 8, 9], [15, 16, 17, 18]]


def test_a_tail_with_fewer_samples_than_ranks_joins_the_batch_before_it():
    loaders = ranks_of(14, 6, 3, shuffle=False)
    shares = [[(len(batch), loader.batch_samples) for batch in loader] for loader in loaders]
    assert shares == [[(2, 6), (3, 8)], [(2, 6), (3, 8)], [(2, 6), (2, 8)]]
    assert [len(loader) for loader in loaders] == [2, 2, 2]


def test_another_number_of_ranks_can_go_on_in_the_middle_of_an_epoch():
    (alone,) = ranks_of(20, 4, 1)
    begun = [next(iter(alone))]
    pair = ranks_of(20, 4, 2)
    for loader in pair:
        loader.load_state_dict(alone.state_dict())
    assert sorted(indices_of(begun) + indices_of(pair[0]) + indices_of(pair[1])) == list(range(20))


# Random numbers


def shuffled_rows(samples):
    return torch.stack(samples)[torch.randperm(len(samples))]


def test_transforms_in_dataset_and_collation_are_the_same_for_any_number_of_workers():
    batches = []
    for workers in (0, 1, 2):
        loader = rb.BatchLoader(Augmented(20), plan_of(6), num_workers=workers, collate_fn=shuffled_rows)
        batches.append(torch.cat([*loader, *loader]))
        loader.close()
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    assert len(batches[0][:, 1:].unique()) == 3 * 40


def test_two_ranks_draw_different_numbers():
    first, second = (next(iter(loader)) for loader in ranks_of(20, 10, 2))
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_the_training_are_left_alone(workers):
    np.random.seed(3)  # noqa: NPY002
    np.random.randn()  # noqa: NPY002  # leaves the second of a pair behind
    before = generator_states()
    loader = rb.BatchLoader(Augmented(20), plan_of(6), num_workers=workers)
    for _ in loader:
        assert generator_states() == before
    assert generator_states() == before
    loader.close()


# Datasets and workers


class InOneGo(Augmented):
    def __getitems__(self, indices):
        return [torch.tensor([index, len(indices)]) for index in indices]


def test_a_dataset_that_fetches_several_samples_at_once_is_asked_to():
    loader = rb.BatchLoader(InOneGo(10), plan_of(4))
    assert [batch[:, 1].tolist() for batch in loader] == [[4] * 4, [4] * 4, [2] * 2]


class FailsOnce(Augmented):
    """Raises for one sample, as long as a file does not exist."""

    def __init__(self, size, mark):
        super().__init__(size)
        self.mark = mark

    def __getitem__(self, index):
        if index == 7 and not self.mark.exists():
            self.mark.touch()
            raise ZeroDivisionError("sample 7 is broken")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_dataset_shows_its_traceback_and_no_sample_is_lost(workers, tmp_path):
    loader = rb.BatchLoader(FailsOnce(12, tmp_path / "mark"), plan_of(2), num_workers=workers)
    seen = []
    with pytest.raises(ZeroDivisionError, match="sample 7 is broken") as caught:
        seen.extend(loader)
    shown = "".join(traceback.format_exception(caught.value))
    assert 'raise ZeroDivisionError("sample 7 is broken")' in shown
    assert multiprocessing.active_children() == []
    state = loader.state_dict()
    assert state["position"] == 2 * len(seen)
    assert sorted(indices_of([*seen, *loader])) == list(range(12))
    loader.close()


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_stay_between_epochs_if_they_are_to(persistent):
    loader = rb.BatchLoader(WorkerNumbers(), plan_of(2), num_workers=2, persistent_workers=persistent)
    processes = [set(torch.cat(list(loader)).tolist()) for _ in range(2)]
    assert all(len(numbers) == 2 for numbers in processes)
    assert (processes[0] == processes[1]) is persistent
    assert len(multiprocessing.active_children()) == (2 if persistent else 0)
    loader.close()
    assert multiprocessing.active_children() == []


class WorkerNumbers(Augmented):
    def __init__(self):
        super().__init__(8)

    def __getitem__(self, index):
        return os.getpid()


class Opened(Augmented):
    """A dataset that each worker opens for itself."""

    handle = 0

    def __getitem__(self, index):
        return torch.tensor([index, self.handle])


def open_in_worker(number):
    get_worker_info().dataset.dataset.handle = 10 + number


def test_worker_init_fn_reaches_the_dataset_of_its_worker():
    loader = rb.BatchLoader(Opened(8), plan_of(2), num_workers=2, worker_init_fn=open_in_worker)
    assert [batch[:, 1].tolist() for batch in loader] == [[10, 10], [11, 11], [10, 10], [11, 11]]
    assert isinstance(loader.dataset, Opened)
    assert loader.dataset.handle == 0
    loader.close()


@pytest.mark.parametrize("between_epochs", [True, False])
def test_workers_that_an_interrupt_ended_are_replaced(between_epochs):
    loader = rb.BatchLoader(Augmented(12), plan_of(2), num_workers=2)
    seen = list(loader) if between_epochs else [next(iter(loader))]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        worker.join()
    seen += loader
    assert sorted(indices_of(seen)) == sorted([*range(12)] * (1 + between_epochs))
    loader.close()


def test_a_killed_worker_is_an_error_after_which_training_can_go_on():
    loader = rb.BatchLoader(Augmented(40), plan_of(2), num_workers=1, prefetch_factor=1)
    seen = []
    with pytest.raises(RuntimeError, match="worker"):  # noqa: PT012  # torch's handler may interrupt any of it
        for batch in loader:
            seen.append(batch)
            if len(seen) == 2:
                (worker,) = multiprocessing.active_children()
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()
    seen += loader
    assert sorted(indices_of(seen)) == list(range(40))
    loader.close()


def test_workers_can_be_spawned():
    loader = rb.BatchLoader(Augmented(10), plan_of(4), num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(torch.cat(list(loader)), torch.cat(list(rb.BatchLoader(Augmented(10), plan_of(4)))))
    loader.close()


def test_the_number_of_workers_is_the_plans_unless_given():
    assert rb.BatchLoader(Augmented(4), plan_of(2, num_workers=2))._torch_loader.num_workers == 2
    assert rb.BatchLoader(Augmented(4), plan_of(2, num_workers=2), num_workers=0)._torch_loader.num_workers == 0
    assert rb.BatchLoader(Augmented(4), plan_of(2))._torch_loader.num_workers == 0


# Misuse


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (Augmented(0), {}, WorkloadError, "dataset must hold at least one sample"),
        (Stream(), {}, WorkloadError, "dataset must be a map-style dataset"),
        (torch.utils.data.DataLoader([1, 2]), {}, WorkloadError, "got a DataLoader"),
        (Augmented(8), {"rank": 0, "world_size": 2}, UsageError, "it is for 1, and there are 2"),
        (Augmented(8), {"rank": 1, "world_size": 1}, UsageError, "got rank 1 of 1"),
        (Augmented(8), {"rank": -1, "world_size": 1}, UsageError, "got rank -1 of 1"),
        (Augmented(8), {"rank": 0}, UsageError, "given together"),
        (Augmented(3), {"drop_last": True}, UsageError, "got 3 samples for a batch of 4"),
        (Augmented(8), {"num_workers": -1}, ValueError, "num_workers"),
        (Augmented(8), {"seed": -1}, UsageError, "seed must be 0 or more; got -1"),
    ],
)
def test_what_cannot_be_loaded_is_refused(dataset, options, error, message):
    with pytest.raises(error, match=message):
        rb.BatchLoader(dataset, plan_of(4), **options)


def test_a_dataset_or_a_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(UsageError, match="a sample for each of the 3 ranks; got 2"):
        ranks_of(2, 3, 3)
    with pytest.raises(UsageError, match="a sample for each of the 3 ranks; got 2"):
        ranks_of(9, 3, 3, schedule=Told(2))


def test_a_batch_that_grows_beyond_the_dataset_does_not_make_empty_epochs():
    told = Told(4)
    loader = rb.BatchLoader(Augmented(8), plan_of(4), schedule=told, drop_last=True)
    list(loader)
    told.size = 9
    with pytest.raises(UsageError, match="got 8 samples for a batch of 9"):
        list(loader)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"seed": 1}, 10, "the same seed; got 1 for 0"),
        ({"shuffle": False}, 10, "the same shuffle; got False for True"),
        ({}, 11, "the same dataset_size; got 11 for 10"),
    ],
)
def test_a_state_of_another_order_is_refused(options, size, message):
    state = rb.BatchLoader(Augmented(size), plan_of(4), **options).state_dict()
    with pytest.raises(UsageError, match=message):
        rb.BatchLoader(Augmented(10), plan_of(4)).load_state_dict(state)


def test_a_rest_too_small_for_more_ranks_is_refused():
    alone = rb.BatchLoader(Augmented(10), plan_of(9))
    next(iter(alone))
    loader, _ = ranks_of(10, 4, 2)
    loader.load_state_dict(alone.state_dict())
    with pytest.raises(UsageError, match="each of the 2 ranks; got 1 after 9 samples"):
        list(loader)
