"""One optimizer step: the exact mean gradient over micro-batches, then the update.

Each micro-batch's loss is divided by the weight of the whole window, over all ranks, before its backward pass, so that the gradient of
unequal micro-batches equals the full batch's. Averaging the means of unequal micro-batches does not.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rightbatch.engine.data_parallel import DataParallel
from rightbatch.engine.losses import PartLoss, Weight, part_loss, part_weight, unrecorded_weight
from rightbatch.errors import WorkloadError
from rightbatch.workload.ingredients import Batch, sample_count
from rightbatch.workload.objective import Objective

_TINY = 1e-12
"""Stands for the weight of a micro-batch without any, which must be positive to be watched."""


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model being trained, with what trains it.

    Attributes:
        model: The model on its device, in training mode.
        optimizer: Updates the model's parameters.
        objective: The loss and its precision.
        scaler: Scales losses when the precision is ``fp16``; none otherwise.
        clip_norm: Largest norm of the gradient; none does not clip.
        average: Moving average of the model's weights; none when none is kept.
        parallel: The ranks that train together; none on a single one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    scaler: GradScaler | None = None
    clip_norm: float | None = None
    average: nn.Module | None = None
    parallel: DataParallel | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Parameters that are trained."""
        return tuple(parameter for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer computes gradients itself, however often it wants, as LBFGS does: then no step can be taken with given ones."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step saw.

    Attributes:
        mean_loss: Mean loss over all micro-batches of this rank, a detached scalar on the device (reading it synchronises); not a number
            where they have no weight.
        samples: Number of samples of this rank.
        weight: What the mean loss is over: the samples, or what the loss or the step counts.
    """

    mean_loss: Tensor
    samples: int
    weight: Weight


Watch = Callable[[int, float], contextlib.AbstractContextManager[None]]
"""Returns what one backward pass runs in, from the samples of its micro-batch and what their mean loss is multiplied with."""


def _as_it_is(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True, kw_only=True)
class Window:
    """The micro-batches of one optimizer step, on one rank.

    Attributes:
        micro_batches: One or more batches, of equal size or not.
        weights: Of each, where they are known before the forward pass.
        total: Weight that the losses are divided by: the window's over all ranks, over the number of ranks; none where a step says it
            later, then what the first micro-batch suggests is taken, and put right at the end.
        place: Moves a micro-batch to the device when it is due.
        watch: Watches each backward pass.
        before_last: Called before the last micro-batch, the one whose backward pass reduces the gradients over the ranks.
    """

    micro_batches: Sequence[Batch]
    weights: Sequence[Weight] | None
    total: Weight | None
    place: Callable[[Batch], Batch] = _as_it_is
    watch: Watch | None = None
    before_last: Callable[[], None] | None = None

    @classmethod
    def of(cls, objective: Objective, micro_batches: Sequence[Batch]) -> "Window":
        """Return the window of micro-batches that are on the device, of a single rank."""
        weights = window_weights(objective, micro_batches, unrecorded_weight)
        return cls(micro_batches=micro_batches, weights=weights, total=None if weights is None else expected_weight(weights, micro_batches))


def window_weights(
    objective: Objective, micro_batches: Sequence[Batch], weight_of: Callable[[Objective, Batch], Weight | None] = part_weight
) -> list[Weight] | None:
    """Return the micro-batches' weights; none where a step says them only after its forward pass."""
    if objective.step is not None:
        return None
    weights = [weight_of(objective, batch) for batch in micro_batches]
    return [weight for weight in weights if weight is not None]


def expected_weight(weights: Sequence[Weight] | None, micro_batches: Sequence[Batch]) -> Weight:
    """Return this rank's weight of the window; where it is not known yet the number of samples, which is most often what it will be."""
    return sum(weights, 0.0) if weights is not None else float(sum(map(sample_count, micro_batches)))


def backward_mean(trainee: Trainee, micro_batches: Sequence[Batch]) -> StepResult:
    """Leave in ``.grad`` the gradient of the mean loss over all samples of the micro-batches.

    With micro-batches of weights w_1 ... w_A and mean losses l_i, the gradient is grad sum w_i l_i / sum w_i. Under ``fp16`` it is still
    multiplied by the scaler's scale.

    Args:
        trainee: The model; its gradients must be cleared.
        micro_batches: One or more batches, of equal size or not, on the device.

    Returns:
        Mean loss, number of samples, and weight.
    """
    window, sums = Window.of(trainee.objective, micro_batches), WindowSums()
    backward_window(trainee, window, sums)
    return conclude_window(trainee, window, sums)


@dataclass
class WindowSums:
    """What the micro-batches of a window have come to so far.

    Attributes:
        total: What the losses are divided by; none until it is known.
        loss: Sum of the losses, divided by the total; none before the first.
        weight: Sum of the weights.
        samples: Number of samples.
    """

    total: Weight | None = None
    loss: Tensor | None = None
    weight: Weight = 0.0
    samples: int = 0

    def share_of(self, part: PartLoss, micro_batches: int, samples: int) -> tuple[Tensor, Weight]:
        """Return a micro-batch's share of the window's mean loss, and the total.

        Args:
            part: The micro-batch's loss.
            micro_batches: How many like it the window has.
            samples: Its samples.
        """
        if self.total is None:
            weight = part.weight
            likely = torch.where(weight > 0, weight, samples) if isinstance(weight, Tensor) else weight or float(samples)
            self.total = likely * micro_batches
        return part.share(self.total), self.total

    def add(self, share: Tensor, weight: Weight, samples: int) -> None:
        """Take in a micro-batch."""
        share = share.detach()
        self.loss = share if self.loss is None else self.loss + share
        self.weight = self.weight + weight
        self.samples += samples


def backward_window(trainee: Trainee, window: Window, sums: WindowSums) -> None:
    """Leave in ``.grad`` the gradient of a window's losses over its total weight, reduced over the ranks.

    Args:
        trainee: The model; its gradients must be cleared.
        window: The micro-batches.
        sums: Takes in each micro-batch whose backward pass is complete.
    """
    last = len(window.micro_batches) - 1
    sums.total = window.total
    for index, micro_batch in enumerate(window.micro_batches):
        if index == last and window.before_last is not None:
            window.before_last()
        batch = window.place(micro_batch)
        known = None if window.weights is None else window.weights[index]
        part_samples = sample_count(batch)
        with trainee.parallel.alone() if trainee.parallel is not None and index < last else contextlib.nullcontext():
            part = part_loss(trainee.objective, trainee.model, batch, known)
            share, total = sums.share_of(part, last + 1, part_samples)
            with contextlib.nullcontext() if window.watch is None else window.watch(part_samples, _relative(part, total, part_samples)):
                _backward(trainee, share, part.weight)
        sums.add(share, part.weight, part_samples)
        del share, part, batch  # else they would be held during the next micro-batch


def conclude_window(trainee: Trainee, window: Window, sums: WindowSums) -> StepResult:
    """Divide by the true weight where it was not known before the window, and return what the window came to."""
    assert sums.loss is not None, "a window has a micro-batch"  # noqa: S101
    assert sums.total is not None, "known since the first of them"  # noqa: S101
    if window.weights is None:
        _correct_total(trainee, sums.weight, sums.total)
    return StepResult(mean_loss=_over_own(sums.loss, sums.total, sums.weight), samples=sums.samples, weight=sums.weight)


def scaled(trainee: Trainee, loss: Tensor) -> Tensor:
    """The loss times the scaler's scale, if there is one."""
    return loss if trainee.scaler is None else trainee.scaler.scale(loss)


def _backward(trainee: Trainee, share: Tensor, weight: Weight) -> None:
    finds_unused = trainee.parallel is not None and trainee.parallel.finds_unused
    if isinstance(weight, Tensor) or weight > 0 or finds_unused:
        if not share.requires_grad:
            raise WorkloadError(
                "a loss must have a gradient; got one that depends on no trained parameter; leave out .detach(), argmax and no_grad."
            )
        scaled(trainee, share).backward()  # type: ignore[no-untyped-call]
    else:  # a mean over nothing is 0 / 0, and so may its derivative be: the gradient is zero
        parameters = trainee.parameters
        torch.autograd.backward(parameters, [torch.zeros_like(parameter) for parameter in parameters])


def _relative(part: PartLoss, total: Weight, samples: int) -> float:
    """What a micro-batch's mean loss is multiplied with, up to a factor that the whole window shares; as far as the host knows."""
    if isinstance(part.weight, Tensor) or isinstance(total, Tensor) or not total:
        return float(samples)
    return max(part.weight / total, _TINY)


def _correct_total(trainee: Trainee, own: Weight, assumed: Weight) -> None:
    """Divide by the true weight of a window whose step said it only after the losses were divided by an assumed one."""
    total = own if trainee.parallel is None else trainee.parallel.mean_weight(own, assumed)
    if not isinstance(total, Tensor) and not isinstance(assumed, Tensor) and total in (assumed, 0):
        return
    gradients = [parameter.grad for parameter in trainee.parameters if parameter.grad is not None]
    factor = assumed / total
    if isinstance(factor, Tensor):
        factor = torch.where(torch.as_tensor(total) > 0, factor, 0.0)
    for gradient in gradients:
        gradient.mul_(factor)


def _over_own(loss: Tensor, total: Weight, own: Weight) -> Tensor:
    """The mean over this rank's weight of a loss that was divided by another total."""
    if not isinstance(total, Tensor) and not isinstance(own, Tensor):
        return loss if own == total and own else loss * (total / own if own else float("nan"))
    return loss * (total / own)


def apply_update(trainee: Trainee, *, clip_factor: float = 1.0) -> Tensor | None:
    """Unscale, clip and apply the gradients that are in ``.grad``, once; then update the moving average of the weights, if there is one.

    Args:
        trainee: What is updated.
        clip_factor: The largest norm is multiplied with it.

    Returns:
        Norm of the gradient before clipping, shape (); none where nothing is clipped.
    """
    scaler, optimizer, norm = trainee.scaler, trainee.optimizer, None
    if trainee.clip_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trainee.parameters, clip_factor * trainee.clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if trainee.average is not None:
        own_model = trainee.model if trainee.parallel is None else trainee.parallel.inner  # in the wrapper parameters have other names
        trainee.average.update_parameters(own_model)  # type: ignore[operator]  # checked when it was built
    return norm


def clear_gradients(trainee: Trainee) -> None:
    """Drop the gradients of the whole model, of parameters that the optimizer was not given too."""
    trainee.model.zero_grad(set_to_none=True)


def train_step(trainee: Trainee, micro_batches: Sequence[Batch]) -> StepResult:
    """Take one optimizer step on the mean loss over all samples of the micro-batches."""
    clear_gradients(trainee)
    result = backward_mean(trainee, micro_batches)
    apply_update(trainee)
    return result
