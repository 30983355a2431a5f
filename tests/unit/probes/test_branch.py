"""Branches start from the same weights and see the same samples in the same order; only size and rate differ."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset

from cases import rig_of, sgd, vectors
from rightbatch.probes import branch
from rightbatch.probes.branch import EVALUATIONS
from rightbatch.records.measurements import NoiseProblem
from rightbatch.records.training import BranchPlan, ProbeOutcome
from rightbatch.workload.ingredients import Workload


def plan(micro=8, accumulation=1, factor=1.0, samples=64):
    return BranchPlan(micro_batch_size=micro, accumulation_steps=accumulation, lr_factor=factor, most_samples=samples)


@dataclass
class Script:
    """Trains a fixed list of branches; the target is a loss that none reaches unless it is told."""

    plans: tuple[BranchPlan, ...]
    target: float = -math.inf
    seen: list = field(default_factory=list)

    def next_branch(self, measured):
        return self.plans[len(measured.probes)] if len(measured.probes) < len(self.plans) else None

    def is_beyond(self, losses, target_loss):
        return losses[-1][1] <= target_loss

    def conclude(self, probe, measured):
        self.seen.append(probe)
        return probe.result, self.target


def rig(**changes):
    ingredients = {
        "model": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3)),
        "train": vectors(64),
        "loss": cross_entropy,
        "optimizer": sgd,
        "precision": "fp64",
    } | changes
    return rig_of(Workload(**ingredients))


def measure(*plans, on=None, budget_s=60.0, target=-math.inf, checkpoint=None):
    return measured_by(Script(plans, target), on or rig(), checkpoint=checkpoint or plan(samples=16), budget_s=budget_s)


def measured_by(design, on, *, checkpoint=None, budget_s=60.0):
    return branch.measure(
        on,
        checkpoint=checkpoint or plan(samples=16),
        design=design,
        budget_s=budget_s,
        noise_micro_batch_size=2,
        is_decided=lambda norms: False,
    )


def test_the_same_branch_twice_gives_the_same_losses():
    measured = measure(plan(), plan(factor=3.0), plan())

    first, other, again = (probe.losses for probe in measured.probes)
    assert first == again
    assert first != other
    assert [at for at, _ in first] == [at for at, _ in other]


def test_accumulated_micro_batches_train_as_the_large_batch_does():
    on = rig(model=lambda: nn.Linear(6, 3))

    measured = measure(plan(16), plan(4, 4), on=on)

    whole, split = (probe.losses for probe in measured.probes)
    assert [loss for _, loss in split] == pytest.approx([loss for _, loss in whole], rel=1e-12)
    assert measured.probes[1].result.global_batch_size == 16


def test_what_is_evaluated_is_the_mean_of_the_weights_along_an_interval_and_training_goes_on_from_the_last():
    class Ones(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    on = rig(
        model=lambda: nn.Linear(1, 1, bias=False),
        train=Ones(),
        loss=mse_loss,  # its gradient is 2 w, so that this rate makes every step w -> -0.9 w
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.95),
    )

    measured = measure(plan(micro=16, samples=EVALUATIONS * 128), on=on, checkpoint=plan(micro=16, samples=16))

    losses = [loss for _, loss in measured.probes[0].losses]
    start = on.new_trainee().model.weight.item() * -0.9
    assert losses[0] == pytest.approx((start * sum((-0.9) ** step for step in range(1, 9)) / 8) ** 2, rel=1e-12)
    assert [after / before for before, after in pairwise(losses)] == pytest.approx([0.9**16] * (EVALUATIONS - 1), rel=1e-9)


@pytest.mark.parametrize(("checkpoint_samples", "evaluated"), [(16, 512), (16_000, 1000), (64_000, 2048)])
def test_a_longer_branch_is_evaluated_on_more_samples(monkeypatch, checkpoint_samples, evaluated):
    monkeypatch.setattr(branch, "_train", lambda rig, trainee, plan, order, samples, **_: samples)

    measured = measure(on=rig(train=vectors(4096)), checkpoint=plan(samples=checkpoint_samples))

    assert measured.evaluated_samples == evaluated


def test_a_branch_remembers_its_rate_over_the_rules():
    measured = measure(plan(factor=1.4).model_copy(update={"lr_over_rule": 1.4}))

    assert measured.probes[0].result.lr_over_rule == 1.4
    assert measured.probes[0].result.lr == pytest.approx(1.4 * measure(plan()).probes[0].result.lr)


def test_complex_weights_are_averaged_too():
    model = nn.Linear(1, 1, bias=False, dtype=torch.complex64)
    mean = branch._MeanWeights(model)
    for value in (1 + 2j, 3 - 4j):
        nn.init.constant_(model.weight, value)
        mean.take(1)

    with mean.in_place():
        assert model.weight.item() == 2 - 1j
    assert model.weight.item() == 3 - 4j


def test_gradient_noise_is_measured_at_the_checkpoint_and_changes_no_branch(monkeypatch):
    measured = measure(plan())
    monkeypatch.setattr(branch, "snapshot", lambda *arguments: (None, NoiseProblem.DATASET_TOO_SMALL))
    without = measure(plan())

    norms = measured.checkpoint_norms
    assert (norms.samples_seen, norms.micro_batch_size, sum(norms.block_counts)) == (measured.checkpoint_samples, 2, 32)
    assert without.checkpoint_norms is None
    assert measured.probes == without.probes


def test_learning_rate_of_a_branch_is_the_workloads_own_times_its_factor():
    own = rig().new_trainee().optimizer.param_groups[0]["lr"]

    measured = measure(plan(factor=2.0), plan(factor=0.5), checkpoint=plan(factor=4.0, samples=8))

    assert [probe.result.lr for probe in measured.probes] == pytest.approx([2 * own, 0.5 * own])


def test_rates_held_as_tensors_stay_where_they_are():
    built = []

    def adam(parameters):
        rate = torch.tensor(0.125)
        built.append((torch.optim.Adam(parameters, lr=rate), rate))
        return built[-1][0]

    measured = measure(plan(factor=2.0), on=rig(optimizer=adam), checkpoint=plan(factor=4.0, samples=8))

    assert [probe.result.lr for probe in measured.probes] == [0.25]
    assert all(optimizer.param_groups[0]["lr"] is rate for optimizer, rate in built)


def test_a_branch_ends_when_it_is_beyond_the_target():
    measured = measure(plan(samples=64), plan(samples=64), target=math.inf)

    assert measured.probes[0].losses[-1][0] == 64  # the first one sets the target, so it is trained to its end
    assert len(measured.probes[1].losses) == 1


def test_a_branch_that_diverges_is_failed_and_its_losses_are_finite():
    measured = measure(plan(factor=1e308))

    assert measured.probes[0].result.outcome is ProbeOutcome.FAILED
    assert all(math.isfinite(loss) for _, loss in measured.probes[0].losses)


def test_the_first_branch_is_as_long_as_the_budget_affords_and_none_is_begun_after_it():
    measured = measure(plan(), plan(), budget_s=0.0)

    assert len(measured.probes) == 1
    assert measured.checkpoint_samples == measured.probes[0].losses[-1][0] == 8  # a step of each


def test_a_branch_that_the_clock_cuts_short_is_left_out():
    on, clock = rig(), _Clock()
    on.meters = type(on.meters)(clock=clock, memory=on.meters.memory, energy=None, contention=on.meters.contention)

    class Late(Script):
        def next_branch(self, measured):
            clock.calls_left = 1 if measured.probes else math.inf
            return super().next_branch(measured)

    measured = measured_by(Late((plan(), plan())), on, budget_s=1.0)

    assert len(measured.probes) == 1
    assert "a larger --budget checks more sizes" in measured.remark


@dataclass
class _Clock:
    calls_left: float = math.inf

    def now_s(self):
        self.calls_left -= 1
        return 0.0 if self.calls_left >= 0 else 100.0


def test_losses_are_taken_on_the_validation_set_where_there_is_one_and_in_evaluation_mode():
    measured = measure(plan(samples=8), on=rig(valid=vectors(24)))

    assert measured.evaluated_samples == 24
    assert measure(plan(samples=8)).evaluated_samples == 64


def test_without_a_target_the_reason_is_said_and_kept():
    class Undecided(Script):
        def conclude(self, probe, measured):
            return probe.result, None

    measured = measured_by(Undecided((plan(),)), rig())

    assert measured.target_loss is None
    assert "give a larger --budget" in measured.remark
