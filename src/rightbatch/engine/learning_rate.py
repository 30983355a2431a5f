"""The learning rate of an optimizer as a workload built it."""

import torch
from torch import Tensor

_RATES = ("lr", "initial_lr")


def set_lr(optimizer: torch.optim.Optimizer, lr: float | None) -> None:
    """Bring the first parameter group to a learning rate, and the others by the same factor.

    Args:
        optimizer: As the workload built it.
        lr: Rate of the first group; none keeps the workload's.
    """
    if lr is None:
        return
    first = optimizer.param_groups[0]
    scale_lr(optimizer, lr / float(first["lr"]))
    first.update({key: lr for key in _RATES if key in first and not isinstance(first[key], Tensor)})  # exactly


def scale_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the learning rate of every parameter group, and where schedules start from."""
    for group in optimizer.param_groups:
        for key in _RATES:
            if isinstance(group.get(key), Tensor):
                group[key].mul_(factor)
            elif key in group:
                group[key] *= factor
