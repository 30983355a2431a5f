"""The processes that train together: what they agree on between steps, without making a GPU wait.

Gradients travel through DistributedDataParallel. All else goes through a gloo group on the host: flags that each step adds up in the
background and reads a step later, so that all ranks act on them after the same step.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rightbatch.engine.ranks import is_one_of_many

T = TypeVar("T")


@dataclass(frozen=True)
class Wishes:
    """What is to be done after a step.

    Attributes:
        stop: Whether to save and end.
        save: Whether to write a checkpoint.
        log: Whether to write a line of the log.
    """

    stop: bool = False
    save: bool = False
    log: bool = False


class Peers(Protocol):
    """The processes that train together; all of them call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process; 0 writes and prints."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as the ranks train it."""
        ...

    def agree(self, wishes: Wishes) -> Wishes:
        """Return what any rank wished, as of the last step but one on several ranks."""
        ...

    def share(self, produce: Callable[[], T]) -> T:
        """Return on every rank what rank 0, the only one that calls it, produced; raise what it raised."""
        ...

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        ...

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the ranks."""
        ...

    def close(self) -> None:
        """Leave what was joined."""
        ...


class Alone:
    """A process on its own."""

    rank = 0
    world_size = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model."""
        return model

    def agree(self, wishes: Wishes) -> Wishes:
        """Return the wishes."""
        return wishes

    def share(self, produce: Callable[[], T]) -> T:
        """Return what is produced."""
        return produce()

    def gather(self, value: T) -> list[T]:
        """Return the value alone."""
        return [value]

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return the values."""
        return list(values)

    def close(self) -> None:
        """Leave nobody."""


class Together:
    """Ranks of ``torch.distributed``.

    Args:
        joined_here: Whether this call initialised ``torch.distributed``, so that it is ours to leave.
    """

    def __init__(self, *, joined_here: bool) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._joined_here = joined_here
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model in DistributedDataParallel."""
        return DistributedDataParallel(model)

    def agree(self, wishes: Wishes) -> Wishes:
        """Send this step's wishes off, and return those of the step before, of all ranks."""
        before = self._settled()
        vector = torch.tensor([wishes.stop, wishes.save, wishes.log], dtype=torch.int32)
        work = dist.all_reduce(vector, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "this process belongs to the group"  # noqa: S101
        self._pending = (vector, work)
        return before

    def share(self, produce: Callable[[], T]) -> T:
        """Return on every rank what rank 0 produced; raise what it raised."""
        told: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.rank == 0:
            try:
                told = [(produce(), None)]
            except Exception as error:  # noqa: BLE001  # raised below, on all ranks alike
                told = [(None, error)]
        dist.broadcast_object_list(told, group=self._group, src=0)
        value, raised = told[0]
        if raised is not None:
            raise raised
        return value  # type: ignore[return-value]  # rank 0 produced it

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the ranks, in float64."""
        vector = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(vector, group=self._group)
        return vector.tolist()

    def close(self) -> None:
        """Wait for what was sent off; leave ``torch.distributed`` if it was joined here."""
        self._settled()
        if self._joined_here:
            dist.destroy_process_group()

    def _settled(self) -> Wishes:
        if self._pending is None:
            return Wishes()
        vector, work = self._pending
        work.wait()
        self._pending = None
        return Wishes(*(bool(value) for value in vector.tolist()))


def peers_from_environment(device: torch.device) -> Peers:
    """Join the ranks that ``torchrun``, or another launcher that sets the same variables, started; alone without one.

    Args:
        device: Where this rank trains: NCCL carries the gradients of CUDA devices, gloo all others.
    """
    if dist.is_available() and dist.is_initialized():
        return Together(joined_here=False) if dist.get_world_size() > 1 else Alone()
    if not is_one_of_many():
        return Alone()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    return Together(joined_here=True)
