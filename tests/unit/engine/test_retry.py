"""A step that runs out of memory is taken again with smaller micro-batches, and nothing of the failed attempt is left."""

import copy
import logging
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import rightbatch as rb
from fakes import ByteBudget
from rightbatch.engine.retry import AttemptState
from rightbatch.errors import NothingFitsError
from rightbatch.records.plan import BatchPlan

TOLERANCE = 1e-10


class Trap(nn.Module):
    """Passes its input on, and runs out of memory at a chosen forward or backward pass.

    Args:
        place: Where: ``forward`` or ``backward``.
        at: At which of its passes, counted from 0; never where it is negative.
        largest: Samples that fit whatever the pass.
    """

    def __init__(self, place="forward", at=-1, largest=0):
        super().__init__()
        self.place, self.at, self.largest, self.passes = place, at, largest, 0

    def forward(self, x):
        self.passes += 1
        number = self.passes - 1
        self.check("forward", number, len(x))
        x = x.clone()
        if x.requires_grad:
            x.register_hook(lambda gradient: self.check("backward", number, len(gradient)))
        return x

    def check(self, place, number, size):
        if place == self.place and 0 <= self.at <= number and size > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. A trap")


class Draws(nn.Module):
    """Notes what each forward pass draws."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, x):
        self.drawn.append((len(x), float(torch.rand(()))))
        return x


def net(trap=None, *, batch_norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if batch_norm else nn.Tanh()
    return nn.Sequential(nn.Linear(6, 8), trap or Trap(), middle, nn.Linear(8, 3)).double()


def stepper_of(model, micro=8, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = BatchPlan(global_batch_size=2 * micro, micro_batch_size=micro, accumulation_steps=2)
    return rb.Stepper(model, optimizer, cross_entropy, plan, **options)


def batches(sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 6, generator=generator).double(), torch.randint(0, 3, (size,), generator=generator)) for size in sizes]


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def distance(a, b):
    return float((a - b).norm() / b.norm())


class Wide(nn.Module):
    """Holds 4 KiB for each sample and feature."""

    def forward(self, x):
        return x.unsqueeze(2).expand(-1, -1, 512).tanh().mean(2)


def budgeted_net():
    """Memory that grows with the batch, in forward and backward."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Wide(), nn.Linear(8, 8), Wide(), nn.Linear(8, 3)).double()


def trained_on(device, sizes, micro):
    """Weights after a step on each batch, and the micro-batch size at the end."""
    with device:
        model = budgeted_net()
        stepper = stepper_of(model, micro=micro)
        for batch in batches(sizes):
            stepper(batch)
    return weights_of(model), stepper.micro_batch_size


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(9, 24), min_size=1, max_size=3), share=st.floats(0.0, 0.9))
def test_a_device_of_any_budget_trains_to_the_weights_of_one_without(sizes, share):
    """Whatever operation of whichever micro-batch runs out of memory."""
    least, most = ByteBudget(), ByteBudget()
    trained_on(least, sizes, micro=1)
    expected, _ = trained_on(most, sizes, micro=24)
    device = ByteBudget(round(least.peak_bytes + share * (most.peak_bytes - least.peak_bytes)))

    weights, micro_batch_size = trained_on(device, sizes, micro=24)

    assert distance(weights, expected) < TOLERANCE
    assert device.errors > 0
    assert micro_batch_size < max(sizes)


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_step_is_that_of_smaller_micro_batches_to_the_bit(place, at):
    """Weights, statistics of BatchNorm, and everything drawn: as if the step had begun so."""
    model = net(Trap(place, at, largest=4), batch_norm=True)
    expected = net(batch_norm=True)
    (batch,) = batches([24])
    outcome = stepper_of(model)(batch)
    stepper_of(expected, micro=4)(batch)

    assert outcome.micro_batch_size == 4
    assert outcome.accumulation_steps == 6
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))


def test_random_numbers_start_again_from_where_the_attempt_began():
    draws = Draws()
    model = nn.Sequential(draws, net(Trap("backward", 1, largest=4)))
    (batch,) = batches([16])
    torch.manual_seed(5)
    stepper_of(model)(batch)
    assert [size for size, _ in draws.drawn] == [8, 8, 4, 4, 4, 4]
    assert [drawn for _, drawn in draws.drawn[:2]] == [drawn for _, drawn in draws.drawn[2:4]]


def test_a_state_puts_back_the_random_numbers_of_torch_and_python():
    state = AttemptState(nn.Linear(1, 1))
    state.take()
    before = float(torch.rand(())), random.getstate()
    random.seed(7)
    state.restore()
    assert (float(torch.rand(())), random.getstate()) == before


def test_the_smaller_size_stays_is_logged_and_is_part_of_the_state(caplog):
    stepper = stepper_of(net(Trap("forward", 0, largest=4)))
    with caplog.at_level(logging.WARNING, logger="rightbatch"):
        sizes = [stepper(batch).micro_batch_size for batch in batches([16, 16])]
    assert sizes == [4, 4]
    assert [record.getMessage()[:52] for record in caplog.records] == ["out of memory with micro-batches of 8 samples: the s"]
    other = stepper_of(net())
    other.load_state_dict(stepper.state_dict())
    assert other.micro_batch_size == 4


def test_the_size_is_halved_until_it_fits():
    stepper = stepper_of(net(Trap("forward", 0, largest=1)))
    assert stepper(*batches([16])).micro_batch_size == 1


def test_when_not_even_one_sample_fits_it_says_so_and_the_weights_stay():
    model = net(Trap("backward", 0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NothingFitsError, match="one sample must fit in memory with its gradients"):
        stepper_of(model)(*batches([16]))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_other_errors_pass_through():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("not about memory")

    model = nn.Sequential(nn.Linear(6, 3), Broken()).double()
    with pytest.raises(ValueError, match="not about memory"):
        stepper_of(model)(*batches([8]))


def test_buffers_that_are_replaced_are_put_back_too():
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes = self.passes + 1
            return x

    counter = Replacing()
    stepper_of(nn.Sequential(counter, net(Trap("backward", 1, largest=4))))(*batches([16]))
    assert counter.passes == 4


def test_buffers_that_the_model_has_dropped_stay_dropped():
    model = nn.BatchNorm1d(2)
    state = AttemptState(model)
    model.running_mean = None
    state.take()
    model.running_var.fill_(7.0)
    state.restore()
    assert model.running_mean is None
    assert model.running_var.tolist() == [1.0, 1.0]


def test_a_monitored_step_is_measured_as_it_was_taken_in_the_end():
    streams = []
    for model, micro in ((net(Trap("backward", 1, largest=4)), 8), (net(), 4)):
        stepper = stepper_of(model, micro=micro, noise_every=1)
        stepper(*batches([16]))
        streams.append(stepper.monitor.stream)
    assert streams[0] == streams[1]
    assert len(streams[0].blocks) == 1
