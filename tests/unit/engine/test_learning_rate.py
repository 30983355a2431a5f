"""An optimizer's learning rate."""

import pytest
import torch

from rightbatch.engine.learning_rate import set_lr


def test_all_groups_follow_the_first_rate_in_proportion() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.01}, {"params": [parameters[2]], "lr": torch.tensor(0.2)}]
    optimizer = torch.optim.SGD(groups, lr=0.1, foreach=False)

    set_lr(optimizer, 0.3)

    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.3, 0.03, 0.6])


def test_without_a_rate_the_workloads_stays() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    set_lr(optimizer, None)

    assert optimizer.param_groups[0]["lr"] == 0.1
