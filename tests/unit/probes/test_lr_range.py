"""The range test recovers the best rate of a noisy quadratic, keeps its budget, and leaves the workload as it found it."""

import hashlib
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from fakes import DIMENSION, FakeDevice, planted_samples, planted_workload
from rightbatch.engine.isolation import Completed, InProcessHost
from rightbatch.engine.rig import Rig
from rightbatch.fits.lr_range import contenders, first_rates, fit_lr_range, next_rate
from rightbatch.probes import lr_range
from rightbatch.records.estimates import Status

NOISE, BATCH = 40.0, 32
FLAT, DISTANCE = 0.01, 30.0
"""Curvature of the first coordinate, and how far its optimum is; all others have curvature 1 and begin at their optimum."""


def valley(output, _target):
    """A noisy quadratic that is learned slowly along its flat coordinate, and whose steep ones diverge above a rate of 2."""
    curvature = torch.ones(output.shape[1])
    curvature[0] = FLAT
    return (curvature * output.square()).sum(1) / 2


def rig_on(device, *, train_size=4000, lr=1e-3, **changes):
    samples = planted_samples(NOISE, train_size, 3)
    samples[:, 0] += DISTANCE - 1
    workload = replace(planted_workload(device, samples, lr=lr), **{"loss": valley, **changes})
    rig = Rig(workload=workload, device=torch.device("cpu"), meters=device.meters())
    assert not rig.loss_is_sum
    return rig


def measure(rig, *, budget_s=6.0, batch_size=BATCH):
    return lr_range.measure(
        rig, batch_size=batch_size, first_rates=first_rates, next_rate=next_rate, contenders=contenders, budget_s=budget_s
    )


@cache
def standard():
    """The measurement that several tests look at."""
    return measure(rig_on(FakeDevice()))


def planted_loss(lr, *, steps, start):
    """Mean excess loss over the last third of a run: what is left of the valley, and what the noise adds in the steep coordinates."""
    k = np.arange(steps)[-max(8, steps // 3) :]
    noise = NOISE * (DIMENSION - 1) / DIMENSION / BATCH
    return float(np.mean((1 - FLAT * lr) ** (2 * k) * start + lr / (2 - lr) * noise * (1 - (1 - lr) ** (2 * k)) / 2))


def test_planted_best_rate_of_a_noisy_quadratic_is_recovered():
    measured = standard()
    answer = fit_lr_range(measured)

    steps = measured.rounds[0].runs[0].samples // BATCH
    start = FLAT * DISTANCE**2 / 2 * (1 - FLAT * min(run.lr for run in measured.rounds[0].runs)) ** (2 * (steps // 4))
    grid = 1.9 * 2 ** -np.arange(0, 10, 0.05)
    best = min(grid, key=lambda lr: planted_loss(lr, steps=steps, start=start))
    assert 0.1 < best < 1.5
    assert answer.status is Status.OK
    assert answer.low <= best <= answer.high
    assert 1 / 2 <= answer.value / best <= 2
    assert planted_loss(answer.value, steps=steps, start=start) < planted_loss(best, steps=steps, start=start) + 0.05 * start


def test_sweep_finds_the_edge_of_the_quadratic_near_two():
    measured = standard()
    edge = next(point.lr for point in measured.sweep if point.diverged)

    assert measured.sweep[-1].diverged
    assert all(not point.diverged for point in measured.sweep[:-1])
    assert 2.0 < edge < 2.0 * 10**0.75
    assert fit_lr_range(measured).divergence_edge > 1.9


def test_runs_of_a_round_take_equal_samples_and_start_from_one_checkpoint():
    measured = standard()

    for each in measured.rounds:
        survived = [run for run in each.runs if not run.diverged]
        assert len({run.samples for run in survived}) == 1
        assert {len(run.tail_losses) for run in survived} == {len(each.still_losses)}
    slowest = min(measured.rounds[0].runs, key=lambda run: run.lr)
    assert np.corrcoef(slowest.tail_losses, measured.rounds[0].still_losses)[0, 1] > 0.9
    assert measured.pilot_samples == survived[0].samples // BATCH // 4 * BATCH


def test_rounds_differ_in_their_data():
    first, second, *_ = standard().rounds
    assert first.still_losses != second.still_losses


@pytest.mark.parametrize("budget_s", [4.0, 8.0, 12.0])
def test_budget_is_kept(budget_s):
    device = FakeDevice(fixed_time_s=5e-3)
    rig = rig_on(device)
    start = device.now
    measured = measure(rig, budget_s=budget_s)
    assert device.now - start <= budget_s + 0.2
    assert measured.rounds


def test_no_budget_at_all_costs_a_few_steps_and_is_said():
    device = FakeDevice()
    measured = measure(rig_on(device), budget_s=0.0)

    assert len(measured.sweep) == 1
    assert fit_lr_range(measured).status is Status.INDETERMINATE


def test_budget_too_small_for_the_runs_is_said():
    measured = measure(rig_on(FakeDevice(fixed_time_s=0.5)), budget_s=30.0)
    answer = fit_lr_range(measured)

    assert (measured.stopped_by, measured.rounds) == ("budget", ())
    assert answer.status is Status.INDETERMINATE
    assert "larger --budget" in answer.remarks[0]


def test_loss_that_no_rate_lowers_is_indeterminate():
    rig = rig_on(FakeDevice(), loss=lambda output, _: 0.0 * output.sum(1) + 1.0)
    answer = fit_lr_range(measure(rig))

    assert (answer.status, answer.value) == (Status.INDETERMINATE, None)
    assert "No rate lowered the loss" in answer.remarks[0]


def test_loss_that_is_not_finite_is_a_failure():
    rig = rig_on(FakeDevice(), loss=lambda output, _: output.sum(1) * math.nan)
    measured = measure(rig)

    assert (measured.stopped_by, measured.sweep) == ("failure", ())
    assert fit_lr_range(measured).status is Status.INDETERMINATE
    assert "NaN or infinite" in fit_lr_range(measured).remarks[0]


def test_rates_of_parameter_groups_keep_their_ratio():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(tuple(group["lr"] for group in self.param_groups))
            return super().step(closure)

    def build(params):
        extra = nn.Parameter(torch.zeros(1))
        return Watched([{"params": list(params), "lr": 0.01}, {"params": [extra], "lr": 0.1}])

    measure(rig_on(FakeDevice(), optimizer=build))
    assert len(seen) > 100
    assert all(second == pytest.approx(10 * first) for first, second in seen)


def test_workload_and_process_are_left_as_found():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 24))

        def forward(self, x):
            return self.layers(x) - x

    def digest():
        state = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        return hashlib.sha256(state + torch.get_rng_state().numpy().tobytes() + str(np.random.get_state()).encode()).hexdigest()  # noqa: NPY002

    torch.manual_seed(0)
    model = Net()
    rig = rig_on(FakeDevice(), model=model)
    before = digest()
    clock = iter(np.arange(0, 1e6, 0.02))
    rig.meters = replace(rig.meters, clock=type("Ticking", (), {"now_s": lambda self: float(next(clock))})())
    outcome = InProcessHost(lambda: rig, lambda line: None).call(
        lr_range.measure, batch_size=BATCH, first_rates=first_rates, next_rate=next_rate, contenders=contenders, budget_s=3.0
    )

    assert isinstance(outcome, Completed)
    assert outcome.value.rounds
    assert digest() == before
    assert model.training


def test_equal_seeds_give_equal_measurements():
    assert measure(rig_on(FakeDevice())) == standard()
