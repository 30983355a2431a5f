"""Micro-batches give exactly the full batch's gradient and step, however unequal they are."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from cases import adam, images, plain_cnn, rig_of, sgd, trainee_of, vectors
from rightbatch.engine.gradients import flat_gradient
from rightbatch.engine.step import backward_mean, train_step
from rightbatch.errors import WorkloadError
from rightbatch.workload.ingredients import Workload

TOLERANCE = 1e-10


def per_sample(output, target):
    return cross_entropy(output, target, reduction="none")


def per_sample_column(output, target):
    return per_sample(output, target).unsqueeze(1)


def summed(output, target):
    return cross_entropy(output, target, reduction="sum")


def counted(model, batch):
    inputs, target = batch
    return cross_entropy(model(inputs), target), len(target)


LOSSES = {
    "mean": {"loss": cross_entropy},
    "per sample": {"loss": per_sample},
    "per sample, as a column": {"loss": per_sample_column},
    "sum": {"loss": summed},
    "counted by a step": {"step": counted},
}


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def workload_of(kind, *, optimizer=sgd, clip_norm=None, precision="fp64"):
    return Workload(model=net, train=vectors(64), optimizer=optimizer, clip_norm=clip_norm, precision=precision, **LOSSES[kind])


def split(workload, counts):
    """The first samples of the workload, in batches of these sizes, and in one."""
    rig = rig_of(workload)
    edges = [sum(counts[:index]) for index in range(len(counts) + 1)]
    micro = [rig.real_batch(range(start, stop)) for start, stop in pairwise(edges)]
    return micro, rig.real_batch(range(edges[-1]))


def gradient_of(trainee, batches):
    trainee.model.zero_grad(set_to_none=True)
    result = backward_mean(trainee, batches)
    return flat_gradient(trainee.parameters).clone(), result


def oracle_gradient(batch):
    """The gradient of the mean loss over the full batch, straight from autograd."""
    inputs, target = batch
    torch.manual_seed(0)
    model = net().double()
    loss = cross_entropy(model(inputs), target)
    loss.backward()
    return flat_gradient(tuple(model.parameters())), loss.detach()


def distance(a, b):
    return float((a - b).norm() / b.norm())


ragged = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(counts=ragged)
def test_the_gradient_of_ragged_micro_batches_is_the_full_batchs(kind, counts):
    workload = workload_of(kind)
    micro, full = split(workload, counts)
    gradient, result = gradient_of(trainee_of(workload, loss_is_sum=kind == "sum"), micro)
    expected, loss = oracle_gradient(full)
    assert distance(gradient, expected) < TOLERANCE
    assert float(result.mean_loss) == pytest.approx(float(loss), rel=TOLERANCE)
    assert result.samples == sum(counts)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_steps_on_ragged_micro_batches_give_the_full_batchs_weights(kind, optimizer, clip_norm):
    workload = workload_of(kind, optimizer=optimizer, clip_norm=clip_norm)
    micro, full = split(workload, [5, 1, 8, 2])
    weights = []
    for batches in (micro, [full]):
        trainee = trainee_of(workload, loss_is_sum=kind == "sum")
        for _ in range(3):
            train_step(trainee, batches)
        weights.append(torch.cat([p.detach().flatten() for p in trainee.parameters]))
    assert distance(weights[0], weights[1]) < TOLERANCE
    start = torch.cat([p.detach().flatten() for p in trainee_of(workload).parameters])
    assert distance(weights[0], start) > 1e-4


@pytest.mark.parametrize("precision", ["fp64", "fp16"])
def test_clipping_bounds_the_unscaled_norm_of_the_window_not_of_its_parts(precision):
    workload = workload_of("mean", optimizer=lambda params: torch.optim.SGD(params, lr=1.0), clip_norm=0.05, precision=precision)
    micro, _ = split(workload, [5, 1, 8, 2])
    trainee = trainee_of(workload)
    before = [p.detach().clone() for p in trainee.parameters]
    train_step(trainee, micro)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(trainee.parameters, before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.05, rel=1e-4)


def test_the_mean_of_means_is_another_gradient_when_counts_differ():
    """The tests above can fail: averaging the micro-batches' own means is off by far more than the tolerance."""
    workload = workload_of("mean")
    micro, full = split(workload, [9, 1, 4])
    trainee = trainee_of(workload)
    naive = torch.stack([gradient_of(trainee, [batch])[0] for batch in micro]).mean(0)
    assert distance(naive, oracle_gradient(full)[0]) > 1e-3


def test_a_sum_taken_for_a_mean_is_another_gradient():
    workload = workload_of("sum")
    micro, full = split(workload, [9, 1, 4])
    gradient, _ = gradient_of(trainee_of(workload, loss_is_sum=False), micro)
    assert distance(gradient, oracle_gradient(full)[0]) > 1


def test_a_step_counts_what_its_mean_is_over_rather_than_rows():
    """Masked tokens: a mean over the valid entries of each micro-batch, weighted by how many they are."""

    def masked(model, batch):
        inputs, target = batch
        losses = per_sample(model(inputs), target)
        valid = target != 0
        return losses[valid].mean(), int(valid.sum())

    workload = Workload(model=net, train=vectors(64), step=masked, precision="fp64")
    micro, full = split(workload, [4, 7, 2])
    gradient, result = gradient_of(trainee_of(workload), micro)
    whole, _ = gradient_of(trainee_of(workload), [full])
    assert distance(gradient, whole) < TOLERANCE
    assert result.weight == int((full[1] != 0).sum())
    assert result.samples == 13


@pytest.mark.parametrize(("precision", "closeness"), [("fp16", 0.02), ("bf16", 0.1)])
def test_reduced_precision_stays_close_to_full_precision(precision, closeness):
    changes = {}
    for chosen in ("fp32", precision):
        workload = Workload(model=plain_cnn, train=images(32), loss=cross_entropy, optimizer=sgd, precision=chosen)
        micro, _ = split(workload, [5, 8, 3])
        trainee = trainee_of(workload)
        before = torch.cat([p.detach().flatten() for p in trainee.parameters])
        result = train_step(trainee, micro)
        assert torch.isfinite(result.mean_loss)
        changes[chosen] = torch.cat([p.detach().flatten() for p in trainee.parameters]) - before
    assert 0 < distance(changes[precision], changes["fp32"]) < closeness


def test_an_infinity_in_one_micro_batch_discards_the_window_and_lowers_the_scale():
    workload = Workload(model=net, train=vectors(64), loss=lambda o, t: per_sample(o, t) * 1e38, optimizer=sgd, precision="fp16")
    micro, _ = split(workload, [4, 4])
    trainee = trainee_of(workload)
    before = [p.detach().clone() for p in trainee.parameters]
    scale = trainee.scaler.get_scale()
    train_step(trainee, micro)
    assert all(torch.equal(p, b) for p, b in zip(trainee.parameters, before, strict=True))
    assert trainee.scaler.get_scale() < scale


def test_parameters_that_the_optimizer_was_not_given_keep_no_gradient_from_step_to_step():
    workload = replace(workload_of("mean"), optimizer=lambda params: torch.optim.SGD(list(params)[:1], lr=0.0))
    _, full = split(workload, [8])
    trainee = trainee_of(workload)
    train_step(trainee, [full])
    once = flat_gradient(trainee.parameters).clone()
    train_step(trainee, [full])
    assert torch.equal(flat_gradient(trainee.parameters), once)


def failing_loss(loss):
    return {"loss": lambda output, target: loss(output)}


def failing_step(step):
    return {"step": lambda model, batch: step(model(batch[0]))}


@pytest.mark.parametrize(
    ("ingredients", "message"),
    [
        (failing_loss(lambda o: o), r"must have one number a sample; got shape \(4, 3\) for 4 samples; average"),
        (failing_loss(lambda o: o.mean(0)), r"must have one number a sample; got shape \(3,\) for 4 samples; average"),
        (failing_loss(lambda o: 1.5), "loss must be a tensor; got float; return a mean loss or per-sample losses"),
        (failing_loss(lambda o: None), "loss must be a tensor; got NoneType; return"),
        (failing_loss(lambda o: {"loss": o.mean()}), "loss must be a tensor; got dict; return"),
        (failing_loss(lambda o: o.mean().detach()), "must have a gradient; got one that depends on no trained parameter; leave out"),
        (failing_step(lambda o: (o, 4)), "loss must be a tensor; got tuple; return"),
        (failing_step(lambda o: (o.mean(), -1)), "a count of at least 0; got -1; return what the mean is over"),
    ],
)
def test_an_odd_loss_is_refused_with_what_was_got_and_what_to_do(ingredients, message):
    workload = Workload(model=net, train=vectors(8), **ingredients)
    with pytest.raises(WorkloadError, match=message):
        backward_mean(trainee_of(workload), [rig_of(workload).real_batch(range(4))])


@pytest.mark.parametrize(
    ("samples", "got"), [([{"x": torch.zeros(6), "y": 0}] * 8, "dict"), ([torch.zeros(6)] * 8, "Tensor"), ([(torch.zeros(6),)] * 8, "list")]
)
def test_batches_that_a_loss_cannot_take_apart_ask_for_a_step(samples, got):
    workload = Workload(model=net, train=samples, loss=cross_entropy)
    with pytest.raises(WorkloadError, match=rf"needs batches \(input, \.\.\., target\); got {got}; for other batches give step="):
        backward_mean(trainee_of(workload), [rig_of(workload).real_batch(range(4))])


def test_a_step_takes_a_batch_that_is_a_dict():
    samples = [{"x": x, "y": y} for x, y in vectors(16)]
    workload = Workload(model=net, train=samples, step=lambda m, b: per_sample(m(b["x"]), b["y"]), precision="fp64")
    micro, _ = split(workload, [3, 5])
    gradient, _ = gradient_of(trainee_of(workload), micro)
    expected, _ = oracle_gradient(split(workload_of("mean"), [8])[1])
    assert distance(gradient, expected) < TOLERANCE
