"""The learning rate of an optimizer as a workload built it."""

import torch
from torch import Tensor


def set_lr(optimizer: torch.optim.Optimizer, lr: float | None) -> None:
    """Bring the first parameter group to a learning rate, and the others by the same factor.

    Args:
        optimizer: As the workload built it.
        lr: Rate of the first group; none keeps the workload's.
    """
    if lr is None:
        return
    groups = optimizer.param_groups
    factor = lr / float(groups[0]["lr"])
    for group in groups:
        for key in ("lr", "initial_lr"):
            if isinstance(group.get(key), Tensor):
                group[key].mul_(factor)
            elif key in group:
                group[key] = lr if group is groups[0] else group[key] * factor
