"""The stepper: one optimizer step on a global batch, accumulated exactly, in micro-batches that fit."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rightbatch.engine.data_parallel import DataParallel, find_wrapper
from rightbatch.engine.losses import Weight
from rightbatch.engine.retry import PatientBackward
from rightbatch.engine.step import Trainee, Window, apply_update, expected_weight, needs_closure, window_weights
from rightbatch.errors import UsageError
from rightbatch.records.estimates import NoiseScale
from rightbatch.records.plan import BatchPlan
from rightbatch.training.batch_schedule import SettingSource
from rightbatch.training.coupling import Coupling
from rightbatch.training.monitor import NoiseMonitor
from rightbatch.training.sample_average import SampleAverage
from rightbatch.workload.ingredients import Batch, StepLoss, map_tensors, sample_count
from rightbatch.workload.objective import Objective, is_torch_sum, mean_weight
from rightbatch.workload.splitting import split_batch

_STATE_VERSION = 1


@runtime_checkable
class Scheduler(Protocol):
    """What is needed of a ``torch.optim.lr_scheduler``."""

    def step(self) -> None:
        """Set the rates of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take a state over."""


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one optimizer step came to. Reading a number of the device waits for it.

    Attributes:
        mean_loss: Mean loss over all samples of this rank, shape (), on the device; not a number where nothing counts.
        samples: Samples of the step over all ranks.
        lr: Learning rate of the first group in this step.
        micro_batch_size: Samples that a micro-batch held at most.
        accumulation_steps: Micro-batches of this rank.
        monitor: The monitor, on a step that it measured.
        read_norm: Returns ``grad_norm``.
    """

    mean_loss: Tensor
    samples: int
    lr: float | Tensor
    micro_batch_size: int
    accumulation_steps: int
    read_norm: Callable[[], Tensor]
    monitor: NoiseMonitor | None = None

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the gradient before clipping, shape (), on the device; where nothing is clipped it is computed when it is read.

        Raises:
            UsageError: Nothing is clipped, and the next step has begun.
        """
        return self.read_norm()

    @property
    def loss(self) -> float:
        """The mean loss as a number; waits for the device."""
        return float(self.mean_loss)

    @property
    def noise_scale(self) -> NoiseScale | None:
        """The noise scale of the run so far where this step measured it, else none; waits for the device."""
        return None if self.monitor is None else self.monitor.noise_scale


class Stepper:
    """Takes optimizer steps on global batches of any size, in micro-batches that fit in memory, with the gradient of the full batch.

    ::

        stepper = rb.Stepper(model, optimizer, F.cross_entropy, plan)
        for batch in loader:
            outcome = stepper(batch)

    A batch is cut into micro-batches of at most ``plan.micro_batch_size`` samples; each is moved to the model's device when it is due. The
    losses are divided by the weight of the whole batch, over all ranks, so that ragged micro-batches, ignored targets and class weights
    give the full batch's gradient. The host waits for nothing that is not read. Put the model into training mode before.

    *What a mean is over*: samples; for ``cross_entropy`` and ``nll_loss``, as functions, partials or modules, the targets that are not
    ignored, with their class weights; whatever ``loss_weight(target)`` returns; or the count that ``step`` returns. A batch in which
    nothing counts has gradient zero and no loss (``nan``); momentum and weight decay act as in every step.

    *BatchNorm* normalises each micro-batch by itself and updates its running statistics once for each: its loss is the plan's micro-batch
    size's, not the full batch's. Dropout draws new masks for each micro-batch.

    *Losses that couple samples*, such as contrastive ones, are not a mean over samples: accumulated they are another objective, and
    with ``couples_samples`` a batch that would have to be cut is refused.

    *Mixed precision* follows ``plan.precision``. Gradients are unscaled before clipping; an infinity in any micro-batch discards the step.

    *Ranks*: give the model wrapped in DistributedDataParallel and each rank's own share of the batch. Gradients travel once, with the last
    micro-batch, and their mean is over all samples of all ranks, however unequal the shares.

    *Out of memory* in a forward or backward pass: the step is repeated from its start with smaller micro-batches, which stay (see
    ``state_dict``), and a warning is logged. Gradients, buffers and random number generators of the failed attempt are put back; other
    micro-batches draw other dropout masks. Of several ranks only the one that failed repeats, and all take over its size two steps later.

    Args:
        model: The model on its device, wrapped for several ranks where there are any.
        optimizer: Its optimizer. Between steps its settings are those that it was given, or that ``scheduler`` set.
        loss: ``loss(model(*inputs), target)`` for batches ``(*inputs, target)``: mean, sum or per-sample losses.
        plan: Sizes and precision; a ``rb.BatchPlan``, such as ``rb.find`` returns.
        schedule: Couples the rate and its company to the batch size; none keeps them.
        scheduler: Any scheduler of ``torch.optim.lr_scheduler``, stepped whenever ``plan.global_batch_size`` more samples were seen:
            written for one size, it holds for all.
        step: Replaces ``loss`` (give None for it): ``step(model, batch)`` returns per-sample losses, or a mean loss and its count.
        loss_weight: What the loss is a mean over, from a target; see above.
        loss_is_sum: Whether the loss is the sum over the batch; known of torch's own losses.
        couples_samples: Whether the loss is more than a mean over samples.
        clip_norm: Largest norm of the gradient; None does not clip.
        scaler: The GradScaler; under ``fp16`` one is made if none is given.
        average: A moving average of the weights of the model, not wrapped for ranks, such as ``torch.optim.swa_utils.AveragedModel``,
            updated after every step; one that forgets as fast at every batch size is ``rightbatch.training.sample_average.SampleAverage``.
        noise_every: Measure the gradient noise on every so many steps; None never.
        dataset_size: Training samples that are drawn without replacement, for the noise; None where they never come again.

    Raises:
        UsageError: Ranks train together and the model is not wrapped, or the arguments contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any, Any], Tensor] | None,
        plan: BatchPlan,
        *,
        schedule: SettingSource | None = None,
        scheduler: Scheduler | None = None,
        step: Callable[[nn.Module, Batch], StepLoss] | None = None,
        loss_weight: Callable[[Any], Tensor | float] | None = None,
        loss_is_sum: bool = False,
        couples_samples: bool = False,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
        average: nn.Module | None = None,
        noise_every: int | None = None,
        dataset_size: int | None = None,
    ) -> None:
        _check(loss, step, loss_weight, optimizer, scheduler, average)
        wrapper = find_wrapper(model, needed_by="the stepper")
        objective = Objective(
            loss=loss,
            step=step,
            loss_weight=loss_weight or mean_weight(loss),
            loss_is_sum=loss_is_sum or is_torch_sum(loss),
            precision=plan.precision,
        )
        device = next(model.parameters()).device
        if scaler is None and plan.precision == "fp16":
            scaler = GradScaler(device.type)
        self._trainee = Trainee(
            model=model,
            optimizer=optimizer,
            objective=objective,
            scaler=scaler,
            clip_norm=clip_norm,
            average=average,
            parallel=None if wrapper is None else DataParallel(wrapper),
        )
        self._plan = plan
        self._couples_samples = couples_samples
        self._coupling = Coupling(optimizer, schedule, scheduler, plan.global_batch_size)
        self._placing = _Placing(model, device, in_double=plan.precision == "fp64")
        self._monitor: NoiseMonitor | None = None
        if noise_every is not None:
            if couples_samples and wrapper is None:
                raise UsageError(
                    "the noise of a step shows between its micro-batches, and with a loss that couples samples it has one; got "
                    f"noise_every={noise_every}; leave it out."
                )
            self._monitor = NoiseMonitor(model, optimizer, every=noise_every, scaler=scaler, dataset_size=dataset_size)
        self._backward = PatientBackward(self._trainee, plan.micro_batch_size, self._placing, self._forget)
        self._samples_seen = 0
        self._steps_begun = 0

    @property
    def monitor(self) -> NoiseMonitor | None:
        """The monitor of the gradient noise; none unless ``noise_every`` is given."""
        return self._monitor

    @property
    def samples_seen(self) -> int:
        """Samples trained on so far, over all ranks."""
        return self._samples_seen

    @property
    def micro_batch_size(self) -> int:
        """Samples that a micro-batch holds at most: the plan's, or fewer since memory ran out."""
        return self._backward.micro_batch_size

    def __call__(self, batch: Batch, *, samples: int | None = None) -> StepOutcome:
        """Take one optimizer step.

        Args:
            batch: This rank's samples, on any device.
            samples: Samples of the step over all ranks; None: as many on every rank.

        Raises:
            WorkloadError: The batch or the loss is not of a shape that it must be.
            UsageError: The loss couples samples, and the batch does not fit in one micro-batch.
            NothingFitsError: Not even one sample fits.
            RankError: Not even one sample fits on another rank.
        """
        self._steps_begun += 1
        own_samples = sample_count(batch)
        parallel = self._trainee.parallel
        all_samples = own_samples * (1 if parallel is None else parallel.ranks) if samples is None else samples
        measured = self._monitor if self._monitor is not None and self._monitor.measures_next_step else None
        with contextlib.nullcontext() if parallel is None else parallel.failure_shared():
            window = self._window(batch, own_samples, is_measured=measured is not None)
            result = self._backward.run(batch, window)
        if self._monitor is not None:
            self._monitor.count_samples(self._samples_seen + all_samples)
        if isinstance(self._trainee.average, SampleAverage):
            self._trainee.average.count_samples(all_samples)
        setting = self._coupling.setting_at(self._samples_seen)
        with self._coupling.applied(setting):
            lr = self._trainee.optimizer.param_groups[0]["lr"]
            lr = lr.clone() if isinstance(lr, Tensor) else lr  # the tensor itself goes on to the next step's rate
            norm = apply_update(self._trainee, clip_factor=1.0 if setting is None else setting.clip_factor)
        self._coupling.advance(self._samples_seen, self._samples_seen + all_samples)
        self._samples_seen += all_samples
        return StepOutcome(
            mean_loss=result.mean_loss,
            samples=all_samples,
            read_norm=(lambda: norm) if norm is not None else partial(self._norm_of_step, self._steps_begun),
            lr=lr,
            micro_batch_size=self.micro_batch_size,
            accumulation_steps=-(-own_samples // self.micro_batch_size),
            monitor=measured,
        )

    def _norm_of_step(self, step: int) -> Tensor:
        """Norm of the gradient that a step, counted here, has left."""
        if step != self._steps_begun:
            raise UsageError(
                "where nothing is clipped, the norm of a step's gradient must be read before the next step, which drops it; "
                "read outcome.grad_norm at once."
            )
        gradients = [p.grad for p in self._trainee.parameters if p.grad is not None]
        return nn.utils.get_total_norm([gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients])

    def _window(self, batch: Batch, own_samples: int, *, is_measured: bool) -> Window:
        """Divide the batch, and settle with the other ranks what its losses are divided by."""
        parallel, objective = self._trainee.parallel, self._trainee.objective
        size = self.micro_batch_size
        if is_measured and parallel is None and own_samples <= size:
            size = max(1, (own_samples + 1) // 2)  # the noise of a step shows between two micro-batches
        if self._couples_samples and own_samples > size:
            raise UsageError(
                f"a loss that couples samples must see the whole batch: {own_samples} samples do not fit in a micro-batch of {size}; "
                "give smaller batches, or a plan with a larger micro_batch_size and no accumulation."
            )
        micro_batches = split_batch(batch, size)
        weights = window_weights(objective, micro_batches)
        total = None if weights is None else expected_weight(weights, micro_batches)
        if parallel is not None:
            total = self._shared_total(parallel, total, own_samples)
            if self.micro_batch_size < size:
                micro_batches = split_batch(batch, self.micro_batch_size)
                weights = window_weights(objective, micro_batches)
        return Window(
            micro_batches=micro_batches,
            weights=weights,
            total=total,
            place=self._placing,
            watch=None if self._monitor is None else self._watch,
            before_last=None if parallel is None else self._backward.before_last,
        )

    def _shared_total(self, parallel: DataParallel, own: Weight | None, own_samples: int) -> Weight:
        sums = parallel.begin_window(float(own_samples) if own is None else own)
        if parallel.anyone_shrank():
            self._backward.micro_batch_size = parallel.smallest(self.micro_batch_size)
        total = sums.weight() / parallel.ranks
        return total if own is not None else total * parallel.counted_per_sample

    def _watch(self, samples: int, weight: float) -> contextlib.AbstractContextManager[None]:
        assert self._monitor is not None, "only windows of a monitored training are watched"  # noqa: S101
        return self._monitor.micro_batch(samples, weight=weight)

    def _forget(self) -> None:
        if self._monitor is not None:
            self._monitor.forget_step()

    def state_dict(self) -> dict[str, Any]:
        """Return where the training is, in plain numbers and lists; call it between steps. Model and optimizer are not in it."""
        parts = {"monitor": self._monitor, "scaler": self._trainee.scaler, "scheduler": self._coupling.scheduler}
        return {
            "version": _STATE_VERSION,
            "samples_seen": self._samples_seen,
            "micro_batch_size": self.micro_batch_size,
        } | {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UsageError: The state is of another version, or of a stepper with other parts.
        """
        parts: dict[str, Any] = {"monitor": self._monitor, "scaler": self._trainee.scaler, "scheduler": self._coupling.scheduler}
        present = {name for name, part in parts.items() if part is not None}
        saved = set(parts) & set(state)
        if state.get("version") != _STATE_VERSION or saved != present:
            raise UsageError(
                f"a stepper's state must be of version {_STATE_VERSION} and of the same parts; got version {state.get('version')} with "
                f"{sorted(saved)} for {sorted(present)}; build the stepper as it was when the state was saved."
            )
        self._samples_seen = int(state["samples_seen"])
        self._backward.micro_batch_size = min(int(state["micro_batch_size"]), self._plan.micro_batch_size)
        for name in present:
            parts[name].load_state_dict(state[name])


class _Placing:
    """Moves micro-batches to the model's device, in its precision and memory format."""

    def __init__(self, model: nn.Module, device: torch.device, *, in_double: bool) -> None:
        self._device = device
        self._in_double = in_double
        images = [parameter for parameter in model.parameters() if parameter.ndim == 4]
        self._channels_last = any(image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous() for image in images)

    def __call__(self, batch: Batch) -> Batch:
        return map_tensors(self._placed, batch)

    def _placed(self, tensor: Tensor) -> Tensor:
        dtype = torch.float64 if self._in_double and tensor.is_floating_point() else tensor.dtype
        if self._channels_last and tensor.ndim == 4:
            return tensor.to(self._device, dtype, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(self._device, dtype, non_blocking=True)


def _check(loss: object, step: object, loss_weight: object, optimizer: torch.optim.Optimizer, scheduler: object, average: object) -> None:
    if (loss is None) == (step is None):
        raise UsageError(f"a stepper takes either a loss or a step; got {'neither' if loss is None else 'both'}; give None for the other.")
    if step is not None and loss_weight is not None:
        raise UsageError("loss_weight says what a loss is a mean over; got it beside a step, which returns its count itself; drop it.")
    if needs_closure(optimizer):
        raise UsageError(
            f"a step is taken with the gradients of its batch; got {type(optimizer).__name__}, which computes its own, in a closure; "
            "give another optimizer."
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UsageError("a scheduler is stepped by samples; got ReduceLROnPlateau, which waits for a metric; step it yourself.")
    if average is not None and not callable(getattr(average, "update_parameters", None)):
        raise UsageError(f"average must have update_parameters(model), as AveragedModel has; got {type(average).__name__}.")
