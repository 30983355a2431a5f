"""An optimizer's learning rate."""

import pytest
import torch

from rightbatch.engine.learning_rate import load_optimizer, scale_lr, set_lr


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


def test_a_rate_of_zero_gives_all_groups_the_rate() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.01}], lr=0.0)

    set_lr(optimizer, 0.3)

    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_groups_that_share_a_tensor_are_scaled_once() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in parameters], lr=torch.tensor(0.25))

    scale_lr(optimizer, 2.0)

    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5, 0.5]


def test_a_state_from_another_device_leaves_rates_in_their_tensors() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.25))
    saved = optimizer.state_dict()["param_groups"][0]["lr"].clone()
    on_device = optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")  # stands in for a GPU

    load_optimizer(optimizer, optimizer.state_dict() | {"param_groups": [{**optimizer.state_dict()["param_groups"][0], "lr": saved}]})

    assert optimizer.param_groups[0]["lr"] is on_device


@pytest.mark.parametrize("saved_lr", [0.5, torch.tensor(0.5)])
def test_a_state_sets_the_rate(saved_lr: float | torch.Tensor) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    saved = torch.optim.SGD([parameter], lr=saved_lr).state_dict()
    optimizer = torch.optim.SGD([parameter], lr=torch.tensor(0.25))

    load_optimizer(optimizer, saved)

    assert float(optimizer.param_groups[0]["lr"]) == 0.5
