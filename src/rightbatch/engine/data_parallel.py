"""The ranks of a training step: what DistributedDataParallel adds up, when, and what must not be asked of it twice."""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rightbatch.engine.late_values import LateValues
from rightbatch.engine.losses import Weight
from rightbatch.engine.ranks import RankError, Store
from rightbatch.errors import NothingFitsError, UsageError

_FAILURE = "rightbatch/step_failure"
_READ_AFTER = 2
"""Steps after which the host reads what was summed: by then the device has long computed it."""


def layers_around(model: nn.Module) -> Iterator[nn.Module]:
    """The module, then what it wraps, down to what the user wrote; DistributedDataParallel and torch.compile wrap."""
    yield model
    inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        yield from layers_around(inner)


def find_wrapper(model: nn.Module, *, needed_by: str) -> DistributedDataParallel | None:
    """Return the wrapper that averages gradients over ranks; none on a single rank.

    Args:
        model: The model, wrapped or not.
        needed_by: Who asks, for the message.

    Raises:
        UsageError: Several ranks run, and the model is not wrapped, so that it is not known how gradients are added up.
    """
    for layer in layers_around(model):
        if isinstance(layer, DistributedDataParallel):
            return layer if layer.process_group.size() > 1 else None
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UsageError(
            f"under {torch.distributed.get_world_size()} ranks {needed_by} needs the model wrapped in DistributedDataParallel; got "
            f"{type(model).__name__}; give the wrapped model. Sharded models are not supported."
        )
    return None


def _meeting() -> Store:
    """The store at which the processes met."""
    from torch.distributed.distributed_c10d import _get_default_store

    store: Store = _get_default_store()
    return store


@dataclass(frozen=True)
class ExchangedSums:
    """Sums over the ranks of one window, on their way.

    Attributes:
        vector: Weight of the window and number of ranks that made their micro-batches smaller, in float64 on the device.
        work: The reduction.
    """

    vector: Tensor
    work: torch.distributed.Work

    def weight(self) -> Weight:
        """The window's weight over all ranks: a scalar of the device; on the CPU, which must wait anyway, a number."""
        self.work.wait()  # on CUDA the device waits, not the host
        return self.vector[0].item() if self.vector.device.type == "cpu" else self.vector[0]


class DataParallel:
    """A model wrapped for several ranks, seen from one of them.

    Args:
        wrapper: The model's wrapper.

    Raises:
        UsageError: The wrapper cannot accumulate.
    """

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        if wrapper.static_graph:
            raise UsageError(
                "gradients are accumulated in no_sync, which static_graph=True does not allow in torch itself; got a model wrapped so; "
                "wrap it without."
            )
        self._wrapper = wrapper
        self._sent: deque[ExchangedSums] = deque()
        self._late = LateValues()
        self._device = next(wrapper.parameters()).device
        self.counted_per_sample: Weight = 1.0
        """What a step counted for each sample in the last window, over all ranks; 1 before."""
        self.has_shrunk = False
        """Whether this rank made its micro-batches smaller since it last told the others."""

    @property
    def ranks(self) -> int:
        """Number of processes that train together."""
        return int(self._wrapper.process_group.size())

    @property
    def inner(self) -> nn.Module:
        """The model inside the wrapper: run forward by itself it neither exchanges anything nor is expected to."""
        inner: nn.Module = self._wrapper.module
        return inner

    @property
    def finds_unused(self) -> bool:
        """Whether each reduction leaves out the parameters that the forward pass did not use."""
        return bool(self._wrapper.find_unused_parameters)

    @property
    def couples_ranks(self) -> bool:
        """Whether forward passes exchange statistics, so that no rank can run one more of them than the others."""
        return any(isinstance(module, nn.SyncBatchNorm) for module in self._wrapper.modules())

    def begin_window(self, weight: Weight) -> ExchangedSums:
        """Do what the ranks do together once in a window, before anything that may have to be repeated.

        The wrapper settles its buckets once, and copies buffers from rank 0 after each reduction, both before a forward pass; here they are
        done before, and its own passes in this window leave them out.

        Args:
            weight: This rank's weight of the window.
        """
        if torch.is_grad_enabled():
            self._wrapper.reducer._rebuild_buckets()  # noqa: SLF001  # so do its first passes; a second try would be one too many
        if self._wrapper.will_sync_module_buffers():  # type: ignore[no-untyped-call]
            self._wrapper._sync_buffers()  # type: ignore[no-untyped-call]  # noqa: SLF001  # what its forward pass calls
        self._wrapper.require_forward_param_sync = False
        sums = self._sum([weight, 1.0 if self.has_shrunk else 0.0])
        self.has_shrunk = False
        self._sent.append(sums)
        return sums

    def anyone_shrank(self) -> bool:
        """Whether a rank had made its micro-batches smaller as of two windows ago; all ranks get the same answer at the same window."""
        if len(self._sent) <= _READ_AFTER:
            return False
        sums = self._sent.popleft()
        sums.work.wait()
        self._late.put(sums.vector)
        return any(shrunk > 0 for _, shrunk in self._late.take(wait=True))

    def smallest(self, value: int) -> int:
        """Return the smallest of all ranks' values; the host waits for it."""
        vector = torch.tensor([value], device=self._device)
        torch.distributed.all_reduce(vector, torch.distributed.ReduceOp.MIN, group=self._wrapper.process_group)
        return int(vector.item())

    @contextlib.contextmanager
    def failure_shared(self) -> Iterator[None]:
        """Within, tell the other ranks that not even one sample fits here, and say so where an exchange breaks off because of that.

        The others wait in an exchange for this rank until its process ends.

        Raises:
            RankError: Another rank gave up.
        """
        try:
            yield
        except (NothingFitsError, MemoryError, torch.OutOfMemoryError) as error:
            with contextlib.suppress(RuntimeError):
                _meeting().set(_FAILURE, f"rank {torch.distributed.get_rank()}: {error}")
            raise
        except RuntimeError as error:
            told = None
            with contextlib.suppress(RuntimeError):  # the rank that held the store may have gone
                told = _meeting().get(_FAILURE).decode() if _meeting().check([_FAILURE]) else None
            if told is None:
                raise
            raise RankError(f"all ranks must take the same steps; one gave up, {told}") from error

    def mean_weight(self, weight: Weight, assumed: Weight) -> Weight:
        """Return the mean of the ranks' weights, after a window that took another for it.

        Args:
            weight: This rank's.
            assumed: What all ranks took for the mean; the next windows assume as much for each sample as this one turned out to have.
        """
        mean = self._sum([weight]).weight() / self.ranks
        if isinstance(mean, Tensor) or isinstance(assumed, Tensor):
            before = torch.as_tensor(self.counted_per_sample, device=self._device)
            likely = before * (mean / assumed)
            self.counted_per_sample = torch.where(likely > 0, likely, before)
        elif mean > 0 and assumed > 0:
            self.counted_per_sample = self.counted_per_sample * mean / assumed
        return mean

    def _sum(self, values: Sequence[Weight]) -> ExchangedSums:
        numbers = torch.tensor([0.0 if isinstance(value, Tensor) else value for value in values], dtype=torch.float64)
        vector = (numbers.pin_memory() if self._device.type == "cuda" else numbers).to(self._device, non_blocking=True)
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                vector[index] = value
        work = torch.distributed.all_reduce(vector, group=self._wrapper.process_group, async_op=True)
        assert work is not None, "this process belongs to its own group"  # noqa: S101
        return ExchangedSums(vector, work)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Within, forward and backward passes exchange nothing."""
        context: contextlib.AbstractContextManager[None] = self._wrapper.no_sync()
        return context

    @property
    def is_armed(self) -> bool:
        """Whether a forward pass of this window has told the wrapper to reduce the gradients that arrive next."""
        return bool(self._wrapper.require_forward_param_sync)

    def finish_backward(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Reduce an armed window without a graph: let each parameter's gradient arrive, so that the wrapper completes its reduction.

        Args:
            gradients: What is to be added to ``.grad``, of each parameter whose gradient has not arrived yet.
        """
        if gradients:
            torch.autograd.backward([parameter for parameter, _ in gradients], [gradient for _, gradient in gradients])
