"""The rig: one workload on one device with its meters. Probes get a rig, and build fresh models on it."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parameter import is_lazy
from torch.utils.data import default_collate

from rightbatch.engine.losses import loss_sum
from rightbatch.engine.meters import Meters, meters_for
from rightbatch.engine.out_of_memory import is_out_of_memory
from rightbatch.engine.step import Trainee, needs_closure
from rightbatch.errors import UsageError, WorkloadError
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.workload.ingredients import Batch, Precision, Workload, map_tensors
from rightbatch.workload.objective import Objective

_POOL_SIZE = 256
_DESCRIBED_SAMPLES = 4
_STEPS_COMPARED = 5
"""Of ten draws from one distribution five are all below the other five in 0.8 % of cases."""
STAND_IN_LR = 1e-3
"""Of the Adam that stands in where the workload names no optimizer: a rate at which most networks learn something."""
_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)  # noqa: SLF001  # the common base of all batch normalisations


@dataclass(kw_only=True)
class Rig:
    """One workload on one device.

    Args:
        workload: What is trained.
        device: Where.
        meters: How it is measured.
        seed: Seed of everything random that a probe does.
        say: Receives one line of progress.
    """

    workload: Workload
    device: torch.device
    meters: Meters
    seed: int = 0
    say: Callable[[str], None] = lambda _: None
    _pool: list[object] = field(default_factory=list)
    _loss_is_sum: bool | None = None

    @property
    def train_size(self) -> int:
        """Number of training samples."""
        return len(self.workload.train)

    def new_trainee(self, *, compiled: bool = True) -> Trainee:
        """Build a fresh model and optimizer on the device; the same seed gives the same weights each time."""
        workload, loss_is_sum = self.workload, self.loss_is_sum
        seed_everything(self.seed)
        model = self.new_model()
        if workload.precision == "fp64":
            model = model.double()
        model = model.to(self.device)
        if workload.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        model.train()
        if any(map(is_lazy, model.parameters())):
            raise WorkloadError(
                "parameters must have their shapes before training; the model has lazy layers, which get them from a first batch; "
                "run one through it where it is built."
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise WorkloadError("training needs a parameter that requires a gradient; the model has none; is it frozen?")
        optimizer = self._new_optimizer(trained)
        scaler = GradScaler(self.device.type) if workload.precision == "fp16" else None
        average = None if workload.average is None else workload.average(model)
        if average is not None and not callable(getattr(average, "update_parameters", None)):
            raise WorkloadError(
                f"average must build a module with update_parameters(model), as torch.optim.swa_utils.AveragedModel; "
                f"it returned {type(average).__name__}."
            )
        if workload.compile and compiled:
            model.compile()
        return Trainee(
            model=model,
            optimizer=optimizer,
            objective=Objective.of(workload, loss_is_sum=loss_is_sum),
            scaler=scaler,
            clip_norm=workload.clip_norm,
            average=average,
        )

    def _new_optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        build = self.workload.optimizer
        optimizer = torch.optim.Adam(trained, lr=STAND_IN_LR) if build is None else build(trained)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise WorkloadError(f"optimizer must build a torch.optim.Optimizer; it returned {type(optimizer).__name__}.")
        if needs_closure(optimizer):
            raise WorkloadError(
                f"an optimizer must step with the gradients of one batch; {type(optimizer).__name__} computes its own, in a closure; "
                "build another, such as torch.optim.SGD."
            )
        return optimizer

    def new_model(self) -> nn.Module:
        """Build the model as the workload gives it, on the host."""
        given = self.workload.model
        model = copy.deepcopy(given) if isinstance(given, nn.Module) else given()
        if not isinstance(model, nn.Module):
            raise WorkloadError(f"the function given as model must return a torch.nn.Module; it returned {type(model).__name__}.")
        return model

    @property
    def loss_is_sum(self) -> bool:
        """Whether the workload's loss is a sum over the batch; settled by ``describe``, or here where a child was started again."""
        if self._loss_is_sum is None:
            self._loss_is_sum = False
            if self.workload.step is None:
                reduction, _ = self._loss_behaviour(self.new_trainee(compiled=False), _DESCRIBED_SAMPLES)
                self._loss_is_sum = reduction == "sum"
        return self._loss_is_sum

    def place(self, batch: Batch) -> Batch:
        """Move a batch to the device, in the workload's precision and memory format."""

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            dtype = torch.float64 if self.workload.precision == "fp64" and tensor.is_floating_point() else tensor.dtype
            if self.workload.channels_last and tensor.ndim == 4:
                return tensor.to(self.device, dtype, memory_format=torch.channels_last)
            return tensor.to(self.device, dtype)

        return map_tensors(placed, batch)

    def collate(self, samples: list[object]) -> Batch:
        """Make a batch of samples, on the host."""
        if self.workload.collate_fn is not None:
            return self.workload.collate_fn(samples)
        try:
            return default_collate(samples)
        except (RuntimeError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            raise WorkloadError(
                f"samples must stack to a batch; got {str(error).splitlines()[0]}; make tensors of one shape of them, or give collate_fn=, "
                "which makes a batch of a list of samples."
            ) from error

    def typical_batch(self, size: int) -> Batch:
        """Return a batch of any size on the device: up to 256 real samples over and over.

        Good for time and memory, useless for gradients.
        """
        if not self._pool:
            count = min(_POOL_SIZE, self.train_size)
            indices = np.random.default_rng(self.seed).choice(self.train_size, size=count, replace=False)
            self._pool = [self.workload.train[int(index)] for index in indices]
        return self.place(self.collate([self._pool[index % len(self._pool)] for index in range(size)]))

    def redrawn(self) -> "Rig":
        """Return the same rig with other random numbers, whose typical batches hold the same samples from the last to the first."""
        return replace(self, seed=self.seed + 1, _pool=self._pool[::-1], _loss_is_sum=self.loss_is_sum)

    def real_batch(self, indices: Sequence[int]) -> Batch:
        """Return a batch of these very samples on the device."""
        return self.place(self.collate([self.workload.train[int(index)] for index in indices]))

    def describe(self, sample_count: int = _DESCRIBED_SAMPLES) -> WorkloadSummary:
        """Run the model forward on a few samples and say what the workload is.

        Args:
            sample_count: Samples to run; below two, a loss that sums or couples samples cannot be told from a mean.

        Raises:
            WorkloadError: The model, loss or optimizer does not do what a workload's must.
        """
        self._loss_is_sum = False
        trainee = self.new_trainee(compiled=False)
        reduction, coupled = self._loss_behaviour(trainee, sample_count)
        self._loss_is_sum = reduction == "sum"
        defaults = trainee.optimizer.defaults
        betas = defaults.get("betas")
        given = self.workload.optimizer is not None
        lr = float(trainee.optimizer.param_groups[0]["lr"])
        if lr <= 0:
            raise WorkloadError(
                f"the optimizer's learning rate must be positive to be scaled; got {lr:g}; give the one that training reaches."
            )
        return WorkloadSummary(
            name=self.workload.name or type(trainee.model).__name__,
            train_size=self.train_size,
            valid_size=None if self.workload.valid is None else len(self.workload.valid),
            parameter_count=sum(parameter.numel() for parameter in trainee.model.parameters()),
            trainable_parameter_count=sum(parameter.numel() for parameter in trainee.parameters),
            batch_norm=any(isinstance(module, _BATCH_NORM) for module in trainee.model.modules()),
            couples_samples=self.workload.couples_samples or coupled,
            loss_reduction=reduction,
            optimizer=type(trainee.optimizer).__name__,
            optimizer_given=given,
            momentum=defaults.get("momentum"),
            betas=None if betas is None else (float(betas[0]), float(betas[1])),
            weight_decay=defaults.get("weight_decay"),
            lr=lr if given else None,
            further_lrs=_further_rates(trainee.optimizer) if given else (),
            loss_parameter_count=_trainable(self.workload.loss),
            lr_batch_size=self.workload.lr_batch_size,
            clip_norm=self.workload.clip_norm,
            num_workers=self.workload.num_workers,
            precision=self.workload.precision,
            channels_last=self.workload.channels_last,
            compiled=self.workload.compile,
        )

    def _loss_behaviour(self, trainee: Trainee, sample_count: int) -> tuple[str, bool]:
        """Say how the loss reduces a batch and whether it couples samples, from two halves of a batch and the whole, in eval mode."""
        trainee.model.eval()
        count = min(sample_count, self.train_size) // 2 * 2 or 1
        if self.workload.step is not None:
            return "counted", count > 1 and self._step_couples(trainee, range(count))
        reduction, coupled = self._compare_halves(trainee, range(count))
        if reduction == "sum" and 2 * count <= self.train_size:  # a contrastive loss grows as log b, and log 4 = 2 log 2 passes for a sum
            return self._compare_halves(trainee, range(2 * count))
        return reduction, coupled

    def _compare_halves(self, trainee: Trainee, indices: range) -> tuple[str, bool]:
        whole = self.real_batch(indices)
        with torch.no_grad():
            output_loss = self._raw_loss(trainee, whole)
            if output_loss.ndim > 0:
                loss_sum(trainee.objective, trainee.model, whole)
                return "per_sample", False
            if len(indices) < 2:
                return "mean", False
            half = len(indices) // 2
            parts = [float(self._raw_loss(trainee, self.real_batch(part))) for part in (indices[:half], indices[half:])]
        value, total = float(output_loss), sum(parts)
        tolerance = 0.02 * max(abs(part) for part in parts)
        if abs(value - total) <= tolerance < abs(value - total / 2):
            return "sum", False
        return "mean", bool(np.isfinite(value)) and abs(value - total / 2) > max(tolerance, 0.05 * abs(value))

    def _step_couples(self, trainee: Trainee, indices: range) -> bool:
        """Whether a step's mean loss of a batch is not that of its halves, each tried often: a step that draws random numbers overlaps."""
        half = len(indices) // 2

        def mean_loss(*parts: range) -> float:
            losses = [loss_sum(trainee.objective, trainee.model, self.real_batch(part)) for part in parts]
            return sum(loss.item() for loss, _ in losses) / (sum(float(weight) for _, weight in losses) or 1.0)

        wholes = [mean_loss(indices) for _ in range(_STEPS_COMPARED)]
        halves = [mean_loss(indices[:half], indices[half:]) for _ in range(_STEPS_COMPARED)]
        apart = max(min(halves) - max(wholes), min(wholes) - max(halves))
        return bool(np.isfinite(apart)) and apart > 0.05 * abs(wholes[0])

    @staticmethod
    def _raw_loss(trainee: Trainee, batch: Batch) -> torch.Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            loss_sum(trainee.objective, trainee.model, batch)
        *inputs, target = batch
        assert trainee.objective.loss is not None, "only called without a step"  # noqa: S101
        loss = trainee.objective.loss(trainee.model(*inputs), target)
        if not isinstance(loss, torch.Tensor):
            raise WorkloadError(f"loss must return a tensor; got {type(loss).__name__}; return the loss itself, without .item().")
        return loss


def _further_rates(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Rates of the parameter groups that differ from the first one's, in order, each once."""
    first, *others = (float(group["lr"]) for group in optimizer.param_groups)
    return tuple(rate for rate in dict.fromkeys(others) if rate != first)


def _trainable(loss: object) -> int:
    """Trainable parameters that a loss holds itself."""
    parameters = loss.parameters() if isinstance(loss, torch.nn.Module) else ()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # users' transforms draw from the legacy generator
    torch.manual_seed(seed)


def shuffled_epochs(size: int, seed: int) -> Iterator[int]:
    """Yield the indices of a dataset in random order, epoch after epoch, without end.

    Args:
        size: Samples in the dataset.
        seed: Seed of the order.
    """
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(size).tolist()


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device must be usable here; got {name!r} ({str(error).splitlines()[0]}); try --device cpu.") from error
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def build_rig(load: Callable[[], Workload], *, device: str, precision: Precision | None, threads: int | None, seed: int) -> Rig:
    """Load a workload and place it on a device, with the device's own meters.

    Args:
        load: Returns the workload; runs the user's code.
        device: Name of the device, or ``auto``.
        precision: Replaces the workload's own; ``None`` keeps it.
        threads: Threads torch computes with; ``None`` keeps torch's default.
        seed: Seed of everything random.

    Raises:
        UsageError: There is no such device here.
        WorkloadError: The workload is not one.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    place = resolve_device(device)
    seed_everything(seed)
    workload = load()
    chosen = workload if precision is None else replace(workload, precision=precision)
    return Rig(workload=chosen, device=place, meters=meters_for(place), seed=seed)
