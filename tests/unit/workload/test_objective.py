"""What torch's own losses are a mean over follows from the target: a mean times its weight is the sum."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss

from rightbatch.errors import WorkloadError
from rightbatch.workload.ingredients import Workload
from rightbatch.workload.objective import Objective, is_torch_sum, mean_weight

WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


class Halved(nn.CrossEntropyLoss):
    """Computes something of its own."""

    def forward(self, output, target):
        return super().forward(output, target) / 2


class Renamed(nn.CrossEntropyLoss):
    """Computes what its parent does."""


def outputs(shape=(8, 3), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(1)


def indices(shape=(8,), *, ignored=None):
    target = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(1))
    if ignored is not None:
        target.flatten()[::3] = ignored
    return target


@pytest.mark.parametrize("weight", [None, torch.linspace(0.5, 2.0, 200, dtype=torch.float64)])
def test_targets_in_bytes_weigh_as_whole_numbers_do(weight):
    loss = nn.CrossEntropyLoss(weight=weight)
    target = torch.tensor([156, 1, 199, 0], dtype=torch.uint8)  # 156 is -100 in bytes
    assert float(mean_weight(loss)(target)) == float(mean_weight(loss)(target.long())) > 0
    assert float(mean_weight(loss)(target)) == pytest.approx(4.0 if weight is None else float(weight[target.long()].sum()))


def test_weights_that_the_loss_gets_later_count():
    loss = nn.CrossEntropyLoss(weight=WEIGHTS)
    weight = mean_weight(loss)
    loss.weight = 10 * WEIGHTS
    assert float(weight(indices())) == pytest.approx(10 * float(WEIGHTS[indices()].sum()))


@pytest.mark.parametrize("shape", [(8,), (8, 5), (8, 2, 5)])
@pytest.mark.parametrize(
    ("loss", "summed", "ignored"),
    [
        (cross_entropy, functools.partial(cross_entropy, reduction="sum"), -100),
        (nll_loss, functools.partial(nll_loss, reduction="sum"), -100),
        (functools.partial(cross_entropy, ignore_index=1), functools.partial(cross_entropy, ignore_index=1, reduction="sum"), 1),
        (
            functools.partial(cross_entropy, weight=WEIGHTS, label_smoothing=0.2),
            functools.partial(cross_entropy, weight=WEIGHTS, label_smoothing=0.2, reduction="sum"),
            -100,
        ),
        (nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=-1), nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=-1, reduction="sum"), -1),
        (nn.NLLLoss(weight=WEIGHTS), nn.NLLLoss(weight=WEIGHTS, reduction="sum"), -100),
        (Renamed(), nn.CrossEntropyLoss(reduction="sum"), -100),
    ],
)
def test_a_mean_times_its_weight_is_the_sum(loss, summed, ignored, shape):
    output, target = outputs((8, 3, *shape[1:])), indices(shape, ignored=ignored)
    assert float(loss(output, target)) * float(mean_weight(loss)(target)) == pytest.approx(float(summed(output, target)), rel=1e-12)


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5)])
def test_class_probabilities_count_one_each_with_class_weights_too(shape):
    loss = nn.CrossEntropyLoss(weight=WEIGHTS)
    target = torch.softmax(torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1)
    summed = cross_entropy(outputs(shape), target, weight=WEIGHTS, reduction="sum")
    assert float(loss(outputs(shape), target)) * mean_weight(loss)(target) == pytest.approx(float(summed), rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        None,
        mse_loss,
        nn.MSELoss(),
        Halved(),
        lambda output, target: cross_entropy(output, target) / 2,
        nn.CrossEntropyLoss(reduction="sum"),
        functools.partial(cross_entropy, reduction="none"),
        functools.partial(nll_loss, outputs()),
    ],
)
def test_nothing_is_derived_for_other_losses(loss):
    assert mean_weight(loss) is None


def test_weights_that_change_are_counted_as_they_are_now():
    weight = WEIGHTS.clone()
    count = mean_weight(nn.CrossEntropyLoss(weight=weight))
    before = float(count(indices()))
    weight.mul_(2)
    assert float(count(indices())) == pytest.approx(2 * before)


def test_an_objective_takes_the_users_weight_before_the_derived_one():
    def own(target):
        return float(len(target))

    given = {"model": nn.Linear(1, 1), "train": [0], "loss": cross_entropy}
    assert Objective.of(Workload(**given, loss_weight=own), loss_is_sum=False).loss_weight is own
    assert float(Objective.of(Workload(**given), loss_is_sum=False).loss_weight(indices(ignored=-100))) == 5


def test_losses_say_whether_they_are_sums():
    assert is_torch_sum(nn.CrossEntropyLoss(reduction="sum"))
    assert is_torch_sum(functools.partial(cross_entropy, reduction="sum"))
    assert not is_torch_sum(nn.CrossEntropyLoss())
    assert not is_torch_sum(cross_entropy)


def test_a_weight_beside_a_step_is_refused():
    with pytest.raises(WorkloadError, match="got it beside a step, which returns its count itself"):
        Workload(model=nn.Linear(1, 1), train=[0], step=lambda model, batch: (model(batch).mean(), 1), loss_weight=len)
