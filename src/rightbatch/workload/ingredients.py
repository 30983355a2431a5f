"""The workload: everything a training run is made of, given by the user and validated on construction."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from rightbatch.errors import WorkloadError

Precision = Literal["fp32", "bf16", "fp16", "fp64"]

Batch = Any
"""A collated batch: a tensor, or tensors nested in tuples, lists and mappings. The shape is the user's own."""

StepLoss = Tensor | tuple[Tensor, int | Tensor]
"""What a ``step`` returns: losses of the samples, shape (batch,), or a mean loss, shape (), with the count that it is a mean over."""


class SizedDataset(Protocol):
    """A map-style dataset: a length, and samples by index."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one sample."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What to train: model, data, loss, and how the training is done.

    Only ``model``, ``train`` and ``loss`` (or ``step``) are required. Nothing here is ever trained or changed: every measurement
    builds fresh copies.

    Args:
        model: A module, or a function or class that builds one when called without arguments, which is better: it needs no copy.
        train: Map-style training dataset.
        loss: ``loss(model(*inputs), target)`` for batches ``(*inputs, target)``. Mean, sum or per-sample losses are all understood.
        valid: Map-style validation dataset.
        optimizer: Builds the optimizer from parameters, such as ``lambda params: torch.optim.SGD(params, lr=0.1)``. Without one an Adam
            with rate 0.001 stands in, and no learning rate is recommended.
        lr_batch_size: Global batch size at which the optimizer's learning rate was tuned, in samples.
        step: Replaces ``loss`` for other batches: ``step(model, batch)`` returns per-sample losses, or a mean loss and its sample count.
        collate_fn: Makes a batch of a list of samples; the default is ``torch.utils.data.default_collate``.
        metric: ``metric(output, target)``, higher is better.
        num_workers: Data loader workers; ``None`` lets rightbatch choose.
        precision: ``fp32``; ``bf16`` or ``fp16`` for autocast (``fp16`` with a gradient scaler); ``fp64``.
        channels_last: Whether model and 4-dimensional inputs use the channels-last memory format.
        compile: Whether the model is compiled with ``torch.compile``.
        clip_norm: Largest norm of the gradient; ``None`` does not clip.
        average: Builds a moving average of the model's weights from the model, such as ``torch.optim.swa_utils.AveragedModel``; its
            ``update_parameters(model)`` is called after every optimizer step.
        scheduler: Builds a learning rate schedule from the optimizer: any of ``torch.optim.lr_scheduler`` but ``ReduceLROnPlateau``.
            Training steps it once for every ``plan.global_batch_size`` samples, whatever the batch size, so that it holds for all sizes.
        loss_weight: ``loss_weight(target)`` returns what a loss is a mean over where that is not the samples: the number of tokens that
            count, the sum of the weights. It is derived for ``cross_entropy`` and ``nll_loss``, as functions, partials and modules.
            Losses of samples, or their sum, are then divided by it.
        couples_samples: Whether a batch's loss is more than the mean of its samples' losses, as contrastive losses are.
        name: Name shown in reports; the default is the class of the model.

    Raises:
        WorkloadError: An ingredient is missing, of the wrong kind, or contradicts another one.
    """

    model: nn.Module | Callable[[], nn.Module]
    train: SizedDataset
    loss: Callable[[Any, Any], Tensor] | None = None
    valid: SizedDataset | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    lr_batch_size: int | None = None
    step: Callable[[nn.Module, Batch], StepLoss] | None = None
    collate_fn: Callable[[list[Any]], Batch] | None = None
    metric: Callable[[Any, Any], float] | None = None
    num_workers: int | None = None
    precision: Precision = "fp32"
    channels_last: bool = False
    compile: bool = False
    clip_norm: float | None = None
    average: Callable[[nn.Module], nn.Module] | None = None
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    loss_weight: Callable[[Any], Tensor | float] | None = None
    couples_samples: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise WorkloadError(f"model must be a torch.nn.Module or a function that builds one; got {_kind(self.model)}.")
        self._check_objective()
        check_dataset("train", self.train)
        if self.valid is not None:
            check_dataset("valid", self.valid)
        if isinstance(self.optimizer, torch.optim.Optimizer):
            raise WorkloadError(
                f"optimizer must be a function that makes one, as measurements start from fresh weights; got an {_kind(self.optimizer)}; "
                f"give optimizer=lambda params: torch.optim.{_kind(self.optimizer)}(params, ...)."
            )
        for field in ("optimizer", "collate_fn", "metric", "average", "scheduler", "loss_weight"):
            value = getattr(self, field)
            if value is not None and not callable(value):
                raise WorkloadError(f"{field} must be callable; got {_kind(value)}; see help(rightbatch.Workload).")
        if self.scheduler is not None and self.optimizer is None:
            raise WorkloadError("a scheduler changes the rate of the optimizer, so it needs one; got none; give optimizer=.")
        self._check_numbers()

    def _check_objective(self) -> None:
        if self.loss is None and self.step is None:
            raise WorkloadError("a workload needs a loss or a step; got neither; give loss=torch.nn.functional.cross_entropy, for example.")
        if self.loss is not None and self.step is not None:
            raise WorkloadError("a workload takes either loss or step; got both; drop loss, since step computes its own.")
        if self.loss_weight is not None and self.loss is None:
            raise WorkloadError("loss_weight says what loss is a mean over; got it beside a step, which returns its count itself; drop it.")
        if isinstance(self.loss, type):
            name = self.loss.__name__
            raise WorkloadError(f"loss must be a function or a module; got the class {name}; make one of it: loss={name}().")
        for field, value in (("loss", self.loss), ("step", self.step)):
            if value is not None and not callable(value):
                raise WorkloadError(f"{field} must be callable; got {_kind(value)}; see help(rightbatch.Workload).")

    def _check_numbers(self) -> None:
        if self.precision not in get_args(Precision):
            raise WorkloadError(f"precision must be one of {', '.join(get_args(Precision))}; got {self.precision!r}.")
        if self.lr_batch_size is not None and (not _is_integer(self.lr_batch_size) or self.lr_batch_size < 1):
            raise WorkloadError(
                f"lr_batch_size must be a positive integer; got {self.lr_batch_size!r}; give the size the rate was tuned at."
            )
        if self.lr_batch_size is not None and self.optimizer is None:
            raise WorkloadError(
                f"lr_batch_size={self.lr_batch_size} says where a rate was tuned, so it needs the optimizer with that rate; got none."
            )
        if self.num_workers is not None and (not _is_integer(self.num_workers) or self.num_workers < 0):
            raise WorkloadError(f"num_workers must be 0 or more; got {self.num_workers!r}.")
        if self.clip_norm is not None and not (_is_number(self.clip_norm) and self.clip_norm > 0):
            raise WorkloadError(f"clip_norm must be positive; got {self.clip_norm!r}; give None not to clip.")


def check_dataset(field: str, dataset: object) -> None:
    """Check that something is a map-style dataset that holds a sample.

    Args:
        field: What the user calls it, for the message.
        dataset: What was given.

    Raises:
        WorkloadError: It is a stream, a mapping, a loader or empty.
    """
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise WorkloadError(f"{field} must be a dataset; got a DataLoader; give its .dataset, since rightbatch chooses the batches.")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise WorkloadError(
            f"{field} must be a map-style dataset with __len__ and __getitem__; got {_kind(dataset)}; "
            "for a stream, give a list of some thousand of its samples."
        )
    if isinstance(dataset, Mapping):
        raise WorkloadError(f"{field} must be indexed by 0, 1, 2, ...; got a mapping ({_kind(dataset)}); give a list of its values.")
    if len(dataset) == 0:
        raise WorkloadError(f"{field} must hold at least one sample; got an empty {_kind(dataset)}; check its path and its filters.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _kind(value: object) -> str:
    return type(value).__name__


def sample_count(batch: Batch) -> int:
    """Return the number of samples in a batch: the length of its first tensor's first dimension.

    Raises:
        WorkloadError: The batch holds no tensor with a dimension.
    """
    for tensor in tensors_of(batch):
        if tensor.ndim > 0:
            return int(tensor.shape[0])
    raise WorkloadError(f"a batch must hold a tensor whose first dimension is the samples; got {_kind(batch)}; check collate_fn.")


def tensors_of(batch: Batch) -> Sequence[Tensor]:
    """Return every tensor of a nested batch, depth first."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in tensors_of(value)]
    if isinstance(batch, (list, tuple)):
        return [tensor for value in batch for tensor in tensors_of(value)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to every tensor of a nested batch; anything else stays as it is."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        try:
            return type(batch)(mapped)  # type: ignore[call-arg]  # a mapping class such as BatchEncoding takes a dict
        except TypeError:
            return mapped
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch
