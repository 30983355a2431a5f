"""A micro-batch's loss and its weight: from whatever a user's loss or step returns to what can be added up exactly.

The loss of a window of micro-batches k is ``sum_k w_k l_k / sum_k w_k`` with mean losses l_k over weights w_k, or ``sum_k L_k / sum_k w_k``
with losses L_k that are sums already. Weights are samples unless the objective says otherwise; see ``docs/theory/accumulation.md``.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rightbatch.errors import WorkloadError
from rightbatch.workload.ingredients import Batch, sample_count, tensors_of
from rightbatch.workload.objective import Objective

Weight = Tensor | float
"""A number of the host, or a scalar of the device where reading it would make the host wait."""

_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PartLoss:
    """The loss of one micro-batch.

    Attributes:
        value: A mean over the weight, or a sum; shape (), in float32 or better.
        weight: What it is a mean over, or is to be divided by.
        is_mean: Which of the two it is.
    """

    value: Tensor
    weight: Weight
    is_mean: bool

    def share(self, total: Weight) -> Tensor:
        """Return what the micro-batch adds to a mean over the total weight, shape ().

        A part without weight adds nothing, although its own mean is undefined.
        """
        if isinstance(self.weight, Tensor):
            weight = self.weight.to(self.value.device, non_blocking=True)
            value = torch.where(weight > 0, self.value, torch.zeros_like(self.value))
            return value * _ratio(weight if self.is_mean else 1.0, total, value)
        if self.weight == 0:
            return self.value.nan_to_num(0.0, 0.0, 0.0) * 0.0
        if self.is_mean and not isinstance(total, Tensor) and self.weight == total:
            return self.value  # alone in its window; a sum is divided at every size, so that steps of all sizes do the same
        return self.value * _ratio(self.weight if self.is_mean else 1.0, total, self.value)


def _ratio(weight: Weight, total: Weight, like: Tensor) -> Weight:
    """Weight / total as a number, or as a scalar of the loss's type; 0 where the total is 0."""
    if not isinstance(total, Tensor) and not isinstance(weight, Tensor):
        return weight / total if total else 0.0
    whole = total.to(like.device, non_blocking=True) if isinstance(total, Tensor) else torch.full_like(like, total)
    ratio = weight / whole.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
    return torch.where(whole > 0, ratio, torch.zeros_like(ratio)).to(like.dtype)


def loss_sum(objective: Objective, model: nn.Module, batch: Batch) -> tuple[Tensor, Weight]:
    """Run the model forward and return the sum of the losses, shape (), and the weight to divide it by.

    Raises:
        WorkloadError: The batch or the loss is not of a shape that the workload's contract allows.
    """
    part = part_loss(objective, model, batch)
    return part.share(1.0), part.weight


def part_weight(objective: Objective, batch: Batch) -> Weight | None:
    """Return a micro-batch's weight as far as it is known before the forward pass; none where a step says it later.

    Args:
        objective: Says what the loss is a mean over.
        batch: On any device: a target in host memory is counted there, without waiting for the device.
    """
    if objective.step is not None:
        return None
    if objective.loss_weight is None:
        return float(sample_count(batch))
    _, target = _taken_apart(batch)
    if any(tensor.device.type == "meta" for tensor in tensors_of(target)):
        return float(sample_count(batch))  # without data there is nothing to count, and only the shapes matter
    weight = objective.loss_weight(target)
    return weight if isinstance(weight, Tensor) and weight.device.type != "cpu" else float(weight)


def unrecorded_weight(objective: Objective, batch: Batch) -> Weight | None:
    """Return a micro-batch's weight, unseen by who records the step: a training counts on the host, before the batch is on the device."""
    with _disable_current_modes():
        return part_weight(objective, batch)


def part_loss(objective: Objective, model: nn.Module, batch: Batch, weight: Weight | None = None) -> PartLoss:
    """Run the model forward on a micro-batch.

    Args:
        objective: The loss or the step.
        model: In training or evaluation mode.
        batch: On the model's device.
        weight: The batch's weight where it is known already.

    Raises:
        WorkloadError: The batch or the loss is not of a shape that the workload's contract allows.
    """
    with autocast(objective, next(model.parameters()).device):
        if objective.step is not None:
            return _counted(objective.step(model, batch), batch)
        inputs, target = _taken_apart(batch)
        assert objective.loss is not None, "an objective has a loss or a step"  # noqa: S101
        loss = objective.loss(model(*inputs), target)
        if weight is None:
            weight = unrecorded_weight(objective, batch)
        assert weight is not None, "a loss's weight is known without a step"  # noqa: S101
        return _weighted(objective, loss, batch, weight)


def _taken_apart(batch: Batch) -> tuple[list[Batch], Batch]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise WorkloadError(
            f"loss= needs batches (input, ..., target); got {type(batch).__name__}; for other batches give "
            "step=lambda model, batch: ... that returns per-sample losses, or a mean loss and its sample count."
        )
    *inputs, target = batch
    return inputs, target


def _counted(returned: object, batch: Batch) -> PartLoss:
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Tensor) and returned[0].ndim == 0:
        loss, count = returned
        if isinstance(count, Tensor) and count.device.type != "cpu":
            return PartLoss(_in_range(loss), count, is_mean=True)
        if count < 0:
            raise WorkloadError(f"a step must return a mean loss and a count of at least 0; got {count}; return what the mean is over.")
        return PartLoss(_in_range(loss), float(count), is_mean=True)
    samples = sample_count(batch)
    loss = _tensor(returned)
    if loss.ndim == 0:
        return PartLoss(_in_range(loss), float(samples), is_mean=True)
    return PartLoss(_per_sample_sum(loss, samples), float(samples), is_mean=False)


def _weighted(objective: Objective, returned: object, batch: Batch, weight: Weight) -> PartLoss:
    loss = _tensor(returned)
    if loss.ndim == 0:
        return PartLoss(_in_range(loss), weight, is_mean=not objective.loss_is_sum)
    if objective.loss_weight is not None:  # the weight says what losses of any shape are divided by
        return PartLoss(_in_range(loss).sum(), weight, is_mean=False)
    return PartLoss(_per_sample_sum(loss, sample_count(batch)), weight, is_mean=False)


def _tensor(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise WorkloadError(f"a loss must be a tensor; got {type(loss).__name__}; return a mean loss or per-sample losses.")
    return loss


def _per_sample_sum(loss: Tensor, samples: int) -> Tensor:
    if loss.numel() != samples:
        raise WorkloadError(
            f"per-sample losses must have one number a sample; got shape {tuple(loss.shape)} for {samples} samples; "
            "average over the other dimensions, or over everything."
        )
    return _in_range(loss).sum()


def _in_range(loss: Tensor) -> Tensor:
    """The loss in a type in which sums over a batch neither overflow nor lose digits."""
    return loss.float() if loss.dtype in _HALF else loss


@contextlib.contextmanager
def autocast(objective: Objective, device: torch.device) -> Iterator[None]:
    """Compute in the objective's precision."""
    dtype = _AUTOCAST_DTYPE.get(objective.precision)
    if dtype is None:
        yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield
