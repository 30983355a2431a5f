"""Sizes change at any step, ranks share, workers fetch ahead, the run is interrupted anywhere: every sample comes once, and the same."""

import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rightbatch as rb
from fakes import Augmented
from rightbatch.records.schedule import BatchSetting

EPOCHS = 2


class Script:
    """Sizes decided while training: each step sets the size that is told from then on."""

    def __init__(self, sizes):
        self.sizes, self.size = sizes, sizes[0]

    def decide(self, step):
        self.size = self.sizes[step % len(self.sizes)]

    def setting_at(self, samples_seen):
        return BatchSetting(global_batch_size=self.size)


class Run:
    """A training of two epochs, whose steps are batches of all ranks."""

    def __init__(self, size, sizes, ranks, workers, state=None):
        self.script = Script(sizes)
        plan = rb.BatchPlan(global_batch_size=ranks, micro_batch_size=1, world_size=ranks)
        self.loaders = [
            rb.BatchLoader(Augmented(size), plan, schedule=self.script, num_workers=workers, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        for loader in self.loaders:
            if state is not None:
                loader.load_state_dict(state)

    def steps(self, first=0):
        """Yield the epoch and each rank's batch, and decide on a size after each step."""
        step = first
        while self.loaders[0].epoch < EPOCHS:
            epoch = self.loaders[0].epoch
            for shares in zip(*self.loaders, strict=True):
                assert {loader.batch_samples for loader in self.loaders} == {sum(len(share) for share in shares)}
                self.script.decide(step)
                step += 1
                yield epoch, shares

    def close(self):
        for loader in self.loaders:
            loader.close()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def interrupted(size, sizes, ranks, workers, stop):
    """Train to a step, save, and go on with what was saved; return all steps."""
    run = Run(size, sizes, ranks, workers)
    steps = list(itertools.islice(run.steps(), stop))
    states = [loader.state_dict() for loader in run.loaders]
    assert all(state == states[0] for state in states)
    run.close()
    resumed = Run(size, sizes, ranks, workers, through_a_file(states[0]))
    resumed.script.decide(max(0, stop - 1))
    steps += resumed.steps(stop)
    resumed.close()
    return steps


def whole(size, sizes, ranks, workers):
    run = Run(size, sizes, ranks, workers)
    steps = list(run.steps())
    run.close()
    return steps


def assert_each_sample_once_an_epoch(steps, size):
    for epoch in range(EPOCHS):
        shares = [share for number, shares in steps if number == epoch for share in shares]
        assert all(len(share) > 0 for share in shares)
        assert sorted(torch.cat(shares)[:, 0].tolist()) == list(range(size))


def assert_same(steps, others):
    assert len(steps) == len(others)
    for (epoch, shares), (other_epoch, other_shares) in zip(steps, others, strict=True):
        assert epoch == other_epoch
        assert all(torch.equal(share, other) for share, other in zip(shares, other_shares, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(2, 40),
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    ranks=st.sampled_from((1, 2)),
    stop=st.integers(0, 25),
)
def test_every_sample_comes_once_an_epoch_and_a_resumed_run_sees_the_same(size, sizes, ranks, stop):
    uninterrupted = whole(size, sizes, ranks, workers=0)
    assert_each_sample_once_an_epoch(uninterrupted, size)
    assert_same(interrupted(size, sizes, ranks, 0, stop), uninterrupted)


@pytest.mark.parametrize(("ranks", "stop"), [(1, 0), (1, 7), (2, 3), (2, 12)])
def test_workers_that_fetch_ahead_change_nothing_in_that(ranks, stop):
    size, sizes = 61, [3, 9, 4, 17, 2, 6]
    uninterrupted = whole(size, sizes, ranks, workers=2)
    assert_each_sample_once_an_epoch(uninterrupted, size)
    assert len({sum(len(share) for share in shares) for _, shares in uninterrupted}) > 3
    assert_same(interrupted(size, sizes, ranks, 2, stop), uninterrupted)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 40), batch=st.integers(2, 12), ranks=st.sampled_from((1, 2)), drop_last=st.booleans(), scheduled=st.booleans())
def test_the_number_of_batches_left_is_known_at_every_step(size, batch, ranks, drop_last, scheduled):
    batch = min(size, batch) // ranks * ranks
    loader = rb.BatchLoader(
        Augmented(size),
        rb.BatchPlan(global_batch_size=batch, micro_batch_size=batch // ranks, world_size=ranks),
        schedule=Script([batch]) if scheduled else None,
        drop_last=drop_last,
        rank=0,
        world_size=ranks,
    )
    promised, samples = len(loader), loader.samples_per_epoch
    left = [(len(loader), loader.epoch_is_delivered) for _ in loader]
    assert left == [(batches, batches == 0) for batches in reversed(range(promised))]
    assert loader.samples_seen == samples == (size // batch * batch if drop_last else size)
