"""Snapshots equal what per-sample gradients give, and every problem is named."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cases import images, plain_cnn, rig_of, sgd, vectors
from fakes import FakeDevice, planted_rig, planted_samples, planted_workload
from oracles import oracle_gradients
from rightbatch.probes import gradient_noise
from rightbatch.records.measurements import NoiseProblem
from rightbatch.workload.ingredients import Workload


def measure(rig, *, micro_batch_size=4, pilot_batch_size=8, is_decided=lambda norms: True, budget_s=60.0, pilot_lr=None):
    return gradient_noise.measure(
        rig,
        micro_batch_size=micro_batch_size,
        pilot_batch_size=pilot_batch_size,
        batch_norm=False,
        is_decided=is_decided,
        budget_s=budget_s,
        pilot_lr=pilot_lr,
    )


def tiny(**changes):
    ingredients = {
        "model": lambda: nn.Linear(6, 3),
        "train": vectors(64),
        "loss": cross_entropy,
        "optimizer": sgd,
        "precision": "fp64",
    } | changes
    return rig_of(Workload(**ingredients))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_first_snapshot_equals_per_sample_gradients_exactly(reduction):
    """Of a CNN without BatchNorm in float64; all samples are used, so the mean gradient is that of the whole dataset."""
    rig = rig_of(
        Workload(
            model=plain_cnn,
            train=images(48),
            loss=lambda output, target: cross_entropy(output, target, reduction=reduction),
            optimizer=sgd,
            precision="fp64",
        )
    )
    snapshot = measure(rig, micro_batch_size=1, is_decided=lambda norms: False).snapshots[0]
    model = rig.new_trainee().model
    rows = oracle_gradients.per_sample_gradients(model, cross_entropy, [(x.double(), y) for x, y in rig.workload.train])
    assert sum(snapshot.block_counts) == 48
    assert sum(snapshot.block_sq_norm_sums) == pytest.approx(float((rows**2).sum()), rel=1e-10)
    assert sum(map(sum, snapshot.block_gram)) == pytest.approx(float(rows.sum(0).square().sum()), rel=1e-10)
    losses = cross_entropy(model(torch.stack([x.double() for x, _ in images(48)])), torch.tensor([y for _, y in images(48)]))
    assert snapshot.mean_loss == pytest.approx(losses.item(), rel=1e-10)


def test_micro_batches_of_a_snapshot_are_distinct_samples_in_a_seeded_order():
    rig = tiny()
    assert not rig.loss_is_sum
    drawn = []
    real_batch = rig.real_batch
    rig.real_batch = lambda indices: drawn.append(tuple(indices)) or real_batch(indices)
    snapshot = measure(rig, is_decided=lambda norms: False).snapshots[0]
    first = drawn[: sum(snapshot.block_counts)]
    assert sorted(index for batch in first for index in batch) == list(range(64))
    again = tiny()
    assert measure(again, is_decided=lambda norms: False).snapshots[0] == snapshot


def test_snapshots_are_taken_at_the_start_and_along_the_pilot():
    measured = measure(tiny())
    assert measured.problem is None
    assert [snapshot.samples_seen for snapshot in measured.snapshots] == [0, 32, 88, 256]
    assert measured.pilot_samples == 256
    assert measured.pilot_lr == pytest.approx(0.1)


def test_the_pilot_trains_at_the_rate_that_is_given():
    own, same, faster = (measure(tiny(), pilot_lr=lr) for lr in (None, 0.1, 0.4))
    assert (own.pilot_lr, faster.pilot_lr) == (0.1, 0.4)
    assert same == own
    assert faster.snapshots[0] == own.snapshots[0]
    assert faster.snapshots[1].mean_loss < own.snapshots[1].mean_loss


@pytest.mark.parametrize(("batch_norm", "micro_batch_size", "half"), [(True, 4, 2), (False, 4, None), (True, 2, None)])
def test_where_normalisation_couples_samples_half_the_size_is_measured_at_the_last_parameters(batch_norm, micro_batch_size, half):
    measured = gradient_noise.measure(
        tiny(), micro_batch_size=micro_batch_size, pilot_batch_size=8, batch_norm=batch_norm, is_decided=lambda norms: True, budget_s=60.0
    )
    assert (measured.half_size is None) == (half is None)
    if measured.half_size is not None:
        assert measured.half_size.micro_batch_size == half
        assert measured.half_size.samples_seen == measured.snapshots[-1].samples_seen


def test_a_snapshot_changes_no_parameter():
    rig = tiny()
    trainee = rig.new_trainee()
    before = [p.detach().clone() for p in trainee.parameters]
    gradient_noise.snapshot(rig, trainee, 4, 0, lambda norms: True, 60.0)
    assert all(torch.equal(p, b) for p, b in zip(trainee.parameters, before, strict=True))
    assert all(p.grad is None for p in trainee.parameters)


def test_a_snapshot_stops_at_the_first_doubling_that_is_decided():
    asked = []

    def is_decided(norms):
        asked.append(sum(norms.block_counts))
        return asked[-1] >= 32

    rig = tiny(train=vectors(400))
    norms, problem = gradient_noise.snapshot(rig, rig.new_trainee(), 4, 0, is_decided, 60.0)
    assert (asked, sum(norms.block_counts), problem) == ([16, 32], 32, None)


def test_a_spent_budget_still_takes_eight_micro_batches_a_snapshot():
    device = FakeDevice(fixed_time_s=1.0)
    rig = planted_rig(device, planted_workload(device, planted_samples(10.0, 400, 0), lr=1e-3))()
    measured = measure(rig, is_decided=lambda norms: False, budget_s=0.5)
    assert [sum(snapshot.block_counts) for snapshot in measured.snapshots] == [8]
    assert measured.pilot_samples == 0


def test_the_planted_noise_is_in_the_norms():
    device = FakeDevice()
    rig = planted_rig(device, planted_workload(device, planted_samples(50.0, 1000, 1), lr=1e-9))()
    norms, _ = gradient_noise.snapshot(rig, rig.new_trainee(), 10, 0, lambda norms: False, 60.0)
    count = sum(norms.block_counts)
    mean_sq = sum(norms.block_sq_norm_sums) / count
    sq_mean = sum(map(sum, norms.block_gram)) / count**2
    assert count == 100
    assert sq_mean == pytest.approx(1.0, rel=1e-3)
    assert 10 * (mean_sq - sq_mean) * count / (count - 1) == pytest.approx(50.0, rel=0.25)


def nan_loss(output, target):
    return cross_entropy(output, target) * float("nan")


def zero_loss(output, target):
    return (output * 0).sum(1)


class InfiniteGradient(torch.autograd.Function):
    """Finite forward, infinite backward: sqrt at zero."""

    @staticmethod
    def forward(ctx, x):
        return x.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return torch.full((4, 3), float("inf"), dtype=grad.dtype)


@pytest.mark.parametrize(
    ("changes", "problem", "remark"),
    [
        ({"loss": nan_loss}, NoiseProblem.NON_FINITE_LOSS, "NaN or infinite"),
        ({"loss": lambda o, t: InfiniteGradient.apply(o)}, NoiseProblem.NON_FINITE_LOSS, "or its gradient"),
        ({"loss": lambda o, t: InfiniteGradient.apply(o), "train": vectors(12)}, NoiseProblem.NON_FINITE_LOSS, "or its gradient"),
        ({"loss": zero_loss}, NoiseProblem.ZERO_GRADIENT, "Every gradient was zero"),
        ({"train": vectors(7)}, NoiseProblem.DATASET_TOO_SMALL, "too few samples"),
    ],
    ids=["NaN loss", "infinite gradient", "infinite gradient, few samples", "zero gradient", "small dataset"],
)
def test_each_problem_is_named_and_ends_the_probe(changes, problem, remark):
    measured = measure(tiny(**changes))
    assert measured.problem is problem
    assert remark in measured.remark
    assert measured.snapshots == ()
    assert measured.pilot_samples == 0


def test_a_pilot_that_diverges_keeps_the_snapshots_before_it():
    rig = tiny(loss=lambda o, t: o.square().sum(1), optimizer=lambda params: torch.optim.SGD(params, lr=1e120), train=vectors(64))
    measured = measure(rig)
    assert measured.problem is NoiseProblem.NON_FINITE_LOSS
    assert [snapshot.samples_seen for snapshot in measured.snapshots] == [0]


def test_micro_batches_whose_gradient_is_not_finite_are_skipped_and_counted():
    class SometimesInfinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, is_bad):
            ctx.is_bad = is_bad
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return (grad * float("inf") if ctx.is_bad else grad), None

    def sometimes(output, target):
        return cross_entropy(SometimesInfinite.apply(output, int(target[0]) == 1), target)

    rig = tiny(loss=sometimes)
    rig._loss_is_sum = False
    norms, problem = gradient_noise.snapshot(rig, rig.new_trainee(), 4, 0, lambda n: False, 60.0)
    assert problem is None
    assert norms.skipped_micro_batches > 0
    assert sum(norms.block_counts) + norms.skipped_micro_batches == 16


def test_half_precision_divides_the_scale_out_of_the_norms():
    def first(precision):
        rig = rig_of(Workload(model=lambda: nn.Linear(6, 3), train=vectors(64), loss=cross_entropy, optimizer=sgd, precision=precision))
        return measure(rig, is_decided=lambda norms: False).snapshots[0]

    half, single = first("fp16"), first("fp32")
    assert half.skipped_micro_batches == 0
    assert sum(half.block_sq_norm_sums) == pytest.approx(sum(single.block_sq_norm_sums), rel=0.02)
    assert sum(map(sum, half.block_gram)) == pytest.approx(sum(map(sum, single.block_gram)), rel=0.02)


def test_partly_optimised_parameters_do_not_pile_up_gradients():
    whole = measure(tiny()).snapshots[0]
    partly = measure(tiny(optimizer=lambda params: torch.optim.SGD(list(params)[:1], lr=0.1))).snapshots[0]
    assert partly.block_sq_norm_sums == whole.block_sq_norm_sums


def test_half_precision_that_overflows_lowers_its_scale_until_gradients_are_finite():
    def first(precision):
        rig = rig_of(
            Workload(
                model=lambda: nn.Linear(6, 3),
                train=vectors(64),
                loss=lambda output, target: 40 * cross_entropy(output, target),
                optimizer=sgd,
                precision=precision,
            )
        )
        return measure(rig, is_decided=lambda norms: False).snapshots[0]

    half, single = first("fp16"), first("fp32")
    assert 0 < half.skipped_micro_batches < 8
    mean_of = lambda norms: sum(norms.block_sq_norm_sums) / sum(norms.block_counts)  # noqa: E731
    assert mean_of(half) == pytest.approx(mean_of(single), rel=0.5)
