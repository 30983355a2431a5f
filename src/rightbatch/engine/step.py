"""One optimizer step: the exact mean gradient over micro-batches, then the update.

Sums of per-sample losses are accumulated and divided once by the number of samples in the window, so that the gradient of unequal
micro-batches equals the full batch's. Averaging the means of unequal micro-batches does not.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rightbatch.errors import WorkloadError
from rightbatch.workload.ingredients import Batch, Workload, sample_count

_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model being trained, with what trains it.

    Attributes:
        model: The model on its device, in training mode.
        optimizer: Updates the model's parameters.
        scaler: Scales losses when the precision is ``fp16``; none otherwise.
        workload: Where the loss, the precision and the clipping come from.
        loss_is_sum: Whether the workload's loss is the sum over the batch rather than its mean.
        average: Moving average of the model's weights; none when the workload keeps none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler | None
    workload: Workload
    loss_is_sum: bool = False
    average: nn.Module | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Parameters that are trained."""
        return tuple(parameter for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step saw.

    Attributes:
        mean_loss: Mean loss over the samples of all micro-batches, a detached scalar on the device (reading it synchronises).
        samples: Number of samples.
    """

    mean_loss: Tensor
    samples: int


def loss_sum(trainee: Trainee, batch: Batch) -> tuple[Tensor, int]:
    """Run the model forward and return the sum of the samples' losses, shape (), and the number of samples.

    Raises:
        WorkloadError: The batch or the loss is not of a shape that the workload's contract allows.
    """
    workload = trainee.workload
    with _autocast(workload, trainee.device):
        if workload.step is not None:
            return _summed(workload.step(trainee.model, batch), batch, loss_is_sum=False)
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise WorkloadError(
                f"loss= needs batches (input, ..., target); got {type(batch).__name__}; for other batches give "
                "step=lambda model, batch: ... that returns per-sample losses, or a mean loss and its sample count."
            )
        *inputs, target = batch
        assert workload.loss is not None, "Workload guarantees a loss or a step"  # noqa: S101
        return _summed(workload.loss(trainee.model(*inputs), target), batch, loss_is_sum=trainee.loss_is_sum)


def _summed(loss: object, batch: Batch, *, loss_is_sum: bool) -> tuple[Tensor, int]:
    if isinstance(loss, tuple) and len(loss) == 2 and isinstance(loss[0], Tensor) and loss[0].ndim == 0:
        count = int(loss[1])
        if count < 1:
            raise WorkloadError(
                f"a step must return a mean loss and a sample count of at least 1; got {count}; count what the mean is over."
            )
        return loss[0] * count, count
    if not isinstance(loss, Tensor):
        raise WorkloadError(f"a loss must be a tensor; got {type(loss).__name__}; return a mean loss or per-sample losses.")
    count = sample_count(batch)
    if loss.ndim == 0:
        return (loss if loss_is_sum else loss * count), count
    if loss.numel() == count:
        return loss.sum(), count
    raise WorkloadError(
        f"per-sample losses must have one number a sample; got shape {tuple(loss.shape)} for {count} samples; "
        "average over the other dimensions, or over everything."
    )


def backward_mean(trainee: Trainee, micro_batches: Sequence[Batch]) -> StepResult:
    """Leave in ``.grad`` the gradient of the mean loss over all samples of the micro-batches.

    With micro-batches of n_1 ... n_A samples and per-sample losses l_i, the gradient is (1 / sum n) * grad sum l_i. Under ``fp16`` it is
    still multiplied by the scaler's scale. Backward runs on sums divided by the first micro-batch's count, a constant that keeps
    half-precision losses in range and drops out at the end.

    Args:
        trainee: The model; its gradients must be cleared.
        micro_batches: One or more batches, of equal size or not.

    Returns:
        Mean loss and number of samples.
    """
    reference_count = 0
    total = 0
    total_loss = torch.zeros((), device=trainee.device)
    for batch in micro_batches:
        loss, count = loss_sum(trainee, batch)
        reference_count = reference_count or count
        scaled = loss / reference_count
        (trainee.scaler.scale(scaled) if trainee.scaler is not None else scaled).backward()  # type: ignore[no-untyped-call]
        total_loss = total_loss + loss.detach()
        total += count
        del loss, scaled  # else they would be held during the next micro-batch
    if total != reference_count:
        for parameter in trainee.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(reference_count / total)
    return StepResult(mean_loss=total_loss / total, samples=total)


def apply_update(trainee: Trainee) -> None:
    """Unscale, clip and apply the gradients that are in ``.grad``, once; then update the moving average of the weights, if there is one."""
    scaler, optimizer, clip_norm = trainee.scaler, trainee.optimizer, trainee.workload.clip_norm
    if clip_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trainee.parameters, clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if trainee.average is not None:
        trainee.average.update_parameters(trainee.model)  # type: ignore[operator]  # checked when it was built


def clear_gradients(trainee: Trainee) -> None:
    """Drop the gradients of the whole model, of parameters that the optimizer was not given too."""
    trainee.model.zero_grad(set_to_none=True)


def train_step(trainee: Trainee, micro_batches: Sequence[Batch]) -> StepResult:
    """Take one optimizer step on the mean loss over all samples of the micro-batches."""
    clear_gradients(trainee)
    result = backward_mean(trainee, micro_batches)
    apply_update(trainee)
    return result


@contextlib.contextmanager
def _autocast(workload: Workload, device: torch.device) -> Iterator[None]:
    dtype = _AUTOCAST_DTYPE.get(workload.precision)
    if dtype is None:
        yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield
