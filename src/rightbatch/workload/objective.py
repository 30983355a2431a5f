"""The objective: what one optimizer step needs to know of a workload, without its data."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.workload.ingredients import Batch, Precision, StepLoss, Workload


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss, over what it is a mean, and in which precision it is computed.

    Attributes:
        loss: ``loss(model(*inputs), target)``; none where ``step`` replaces it.
        step: ``step(model, batch)``, which returns per-sample losses, or a mean loss and its count.
        loss_weight: ``loss_weight(target)`` returns what the loss is a mean over; none where that is the samples.
        loss_is_sum: Whether the loss is the sum over the batch rather than its mean.
        precision: ``bf16`` and ``fp16`` compute under autocast.
    """

    loss: Callable[[Any, Any], Tensor] | None = None
    step: Callable[[nn.Module, Batch], StepLoss] | None = None
    loss_weight: Callable[[Any], Tensor | float] | None = None
    loss_is_sum: bool = False
    precision: Precision = "fp32"

    @classmethod
    def of(cls, workload: Workload, *, loss_is_sum: bool) -> "Objective":
        """Return the objective of a workload.

        Args:
            workload: Where the loss comes from.
            loss_is_sum: Whether its loss is a sum over the batch.
        """
        return cls(
            loss=workload.loss,
            step=workload.step,
            loss_weight=workload.loss_weight or mean_weight(workload.loss),
            loss_is_sum=loss_is_sum,
            precision=workload.precision,
        )


def mean_weight(loss: Callable[..., Tensor] | None) -> Callable[[Tensor], Tensor | float] | None:
    """Return what one of torch's own losses is a mean over, as a function of the target; none for every other loss.

    ``cross_entropy`` and ``nll_loss`` with ``reduction="mean"`` divide by the sum of ``weight[target]`` over targets that are not
    ``ignore_index`` (-100 unless it is set), with or without label smoothing; targets that are class probabilities count one each.

    Args:
        loss: The function, a ``functools.partial`` of it by keywords, or the module; with reduction other than ``mean``: none.
    """
    # A subclass that computes something else is not one of torch's own.
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) and type(loss).forward in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward):
        module = loss
        return TargetWeight(lambda: (module.weight, module.ignore_index)) if module.reduction == "mean" else None
    named = isinstance(loss, functools.partial) and not loss.args
    given, function = (loss.keywords, loss.func) if named and isinstance(loss, functools.partial) else ({}, loss)
    if function not in (nn.functional.cross_entropy, nn.functional.nll_loss) or given.get("reduction", "mean") != "mean":
        return None
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    return TargetWeight(lambda: (given.get("weight"), given.get("ignore_index", -100)))


def is_torch_sum(loss: object) -> bool:
    """Return whether a loss says of itself that it is a sum, as torch's loss modules and partials of its functions do."""
    return "sum" in (getattr(loss, "reduction", None), getattr(loss, "keywords", {}).get("reduction"))


class TargetWeight:
    """Sum of ``weight[target]`` over the targets that are not ignored.

    Args:
        settings: Returns the weight of each class, none where they weigh alike, and the target that does not count. Asked for each target,
            because a program may give its loss other weights in the course of a training.
    """

    def __init__(self, settings: Callable[[], tuple[Tensor | None, int]]) -> None:
        self._settings = settings
        self._copies: dict[torch.device, tuple[Tensor, int, Tensor]] = {}

    def __call__(self, target: Tensor) -> Tensor | float:
        """Return the weight of a target, shape () on its device.

        Args:
            target: Class indices of any shape, or class probabilities of shape (batch, class, ...) or (class,).
        """
        if target.is_floating_point():
            return target.numel() / target.shape[min(1, target.ndim - 1)]
        weight, ignored = self._settings()
        target = target.long()  # bytes would wrap an index of -100 to 156, and pick weights as a mask
        counts = target != ignored
        if weight is None:
            return counts.sum()
        return torch.where(counts, self._on(target.device, weight)[torch.where(counts, target, 0)], 0.0).sum()

    def _on(self, device: torch.device, weight: Tensor) -> Tensor:
        """The weights on a device, copied there once: each copy from a GPU would make the host wait."""
        if weight.device == device:
            return weight.detach()
        source, version, copy = self._copies.get(device, (None, -1, weight))
        if source is not weight or version != weight._version:  # noqa: SLF001  # torch's documented counter of writes
            copy = weight.detach().to(device)
            self._copies[device] = (weight, weight._version, copy)  # noqa: SLF001
        return copy
