"""The learning rate of an optimizer, and its other settings, as numbers or as tensors that groups may share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_RATES = ("lr", "initial_lr")


def set_lr(optimizer: torch.optim.Optimizer, lr: float | None) -> None:
    """Bring the first parameter group to a learning rate, and the others by the same factor.

    Args:
        optimizer: As the workload built it. Where the first group's rate is 0 there is no factor, and all groups get the rate.
        lr: Rate of the first group; none keeps the workload's.
    """
    if lr is None:
        return
    first = optimizer.param_groups[0]
    own = float(first["lr"])
    if own:
        scale_lr(optimizer, lr / own)
    for group in (first,) if own else optimizer.param_groups:
        for key in _RATES:
            if isinstance(group.get(key), Tensor):
                group[key].fill_(lr)
            elif key in group:
                group[key] = lr  # exactly


def scale_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the learning rate of every parameter group, and where schedules start from."""
    for key in _RATES:
        multiply_setting(optimizer, key, factor)


def multiply_setting(optimizer: torch.optim.Optimizer, key: str, factor: float) -> None:
    """Multiply a setting of every parameter group that has it.

    A tensor is changed in place, because captured and compiled optimizers hold on to it; and once, because groups share the default one.
    """
    changed: set[int] = set()
    for group in optimizer.param_groups:
        value = group.get(key)
        if isinstance(value, Tensor):
            if id(value) not in changed:
                value.mul_(factor)
            changed.add(id(value))
        elif value is not None:
            group[key] = value * factor


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Let an optimizer go on from a state, with the tensors that it holds its settings in.

    ``load_state_dict`` would replace these by copies of the saved ones, on whatever device the state was loaded to.
    """
    held = [{key: value for key, value in group.items() if isinstance(value, Tensor)} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, tensors in zip(optimizer.param_groups, held, strict=True):
        for key, tensor in tensors.items():
            group[key] = tensor.copy_(torch.as_tensor(group[key]))
