"""An average that forgets by samples is the same however the samples are cut into steps."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import rightbatch as rb
from rightbatch.errors import UsageError
from rightbatch.training.sample_average import SampleAverage


def constant(value):
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return model


@pytest.mark.parametrize("sizes", [(64,), (32, 32), (8, 40, 16)])
def test_after_a_half_life_half_is_left_whatever_the_batch_sizes(sizes):
    start, later = constant(1.0), constant(3.0)
    average = SampleAverage(start, 64)
    average.count_samples(1)
    average.update_parameters(start)
    for size in sizes:
        average.count_samples(size)
        average.update_parameters(later)
    assert average.averaged.module.weight.tolist() == [[pytest.approx(2.0)] * 2]
    assert float(average(torch.zeros(1, 2)).detach()) == pytest.approx(2.0)


def test_complex_weights_are_averaged_too():
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([1.0 + 1.0j]))
    average = SampleAverage(model, 64)
    average.update_parameters(model)
    with torch.no_grad():
        model.weight.fill_(3.0 - 1.0j)
    average.count_samples(64)
    average.update_parameters(model)
    assert average.averaged.module.weight.tolist() == [pytest.approx(2.0)]


def test_a_decay_per_step_becomes_its_power_at_another_size():
    rho, base, size = 0.99, 32, 128
    half_life = base * torch.log(torch.tensor(0.5, dtype=torch.float64)) / torch.log(torch.tensor(rho, dtype=torch.float64))
    average = SampleAverage(constant(0.0), float(half_life))
    average.update_parameters(constant(0.0))
    average.count_samples(size)
    average.update_parameters(constant(1.0))
    assert float(average.averaged.module.bias.detach()) == pytest.approx(1 - rho ** (size / base), rel=1e-5)


def test_buffers_are_averaged_on_request_and_counters_copied():
    model = nn.BatchNorm1d(2)
    average = SampleAverage(model, 8, use_buffers=True)
    average.update_parameters(model)
    model.running_mean += 2.0
    model.num_batches_tracked += 5
    average.count_samples(8)
    average.update_parameters(model)
    assert average.averaged.module.running_mean.tolist() == [1.0, 1.0]
    assert int(average.averaged.module.num_batches_tracked) == 5


def test_the_stepper_says_how_many_samples_each_step_had():
    model = nn.Linear(6, 3)
    average = SampleAverage(model, 16)
    stepper = rb.Stepper(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        cross_entropy,
        rb.BatchPlan(global_batch_size=8, micro_batch_size=8),
        average=average,
    )
    seen = []
    for size in (8, 16, 4):
        stepper((torch.randn(size, 6), torch.arange(size) % 3))
        seen.append(model.weight.detach().clone())
    expected = seen[0]
    for weight, size in zip(seen[1:], (16, 4), strict=True):
        expected = expected + (1 - 2 ** (-size / 16)) * (weight - expected)
    assert torch.allclose(average.averaged.module.weight, expected)


@pytest.mark.parametrize("half_life", [0.0, -1.0, float("inf"), float("nan")])
def test_a_half_life_that_is_none_is_refused(half_life):
    with pytest.raises(UsageError, match="half_life_samples must be a positive number of samples; got"):
        SampleAverage(nn.Linear(1, 1), half_life)
