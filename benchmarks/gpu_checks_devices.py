"""The memory counters that the GPU checks read: those of a CUDA device, or a count of what a step allocates on the CPU."""

import gc
import weakref
from typing import Protocol, runtime_checkable

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rightbatch.fits.caching_allocator import Replay, replay

_NEVER = -1


@runtime_checkable
class Counters(Protocol):
    """What a caching allocator counts, and the two things that it can be told."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def max_memory_allocated(self) -> int:
        """Return the peak of bytes in use since ``reset_peak``."""

    def max_memory_reserved(self) -> int:
        """Return the peak of bytes reserved since ``reset_peak``."""

    def reset_peak(self) -> None:
        """Take what is in use now as the peaks."""

    def empty_cache(self) -> None:
        """Collect garbage and give cached memory back."""

    def capacity(self) -> int:
        """Return the device's bytes."""

    def retries(self) -> int:
        """Return how often the allocator has freed its cache and tried again, since the process began."""

    def allow(self, capacity_bytes: int | None) -> None:
        """Let the allocator reserve no more than so many bytes; ``None`` lifts the bound."""


class CudaCounters:
    """The counters of torch's own allocator on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def max_memory_allocated(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def max_memory_reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def empty_cache(self) -> None:
        gc.collect()
        self.synchronize()
        torch.cuda.empty_cache()

    def capacity(self) -> int:
        return torch.cuda.get_device_properties(self._device).total_memory

    def retries(self) -> int:
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))

    def allow(self, capacity_bytes: int | None) -> None:
        fraction = 1.0 if capacity_bytes is None else min(1.0, capacity_bytes / self.capacity())
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)


class CountedHost:
    """A CPU that counts as a CUDA allocator would: every storage made after ``reset_peak`` is logged, and the log is replayed.

    It stands in for a device in a rehearsal. It sees real allocations at the very size, so it checks that a trace at small sizes tells
    what a large one does; of the allocator it knows only the rules that the replay knows, so it says nothing about a real one.
    """

    def __init__(self) -> None:
        self._count: _Count | None = None
        self._capacity_bytes: int | None = None
        self._retries = 0

    def synchronize(self) -> None:
        """Do nothing: the CPU computes as it is told."""

    def max_memory_allocated(self) -> int:
        return self._replayed(None).peak_allocated_bytes

    def max_memory_reserved(self) -> int:
        return self._replayed(self._capacity_bytes).peak_reserved_bytes

    def reset_peak(self) -> None:
        self._stop()
        self._count = _Count()
        self._count.__enter__()

    def empty_cache(self) -> None:
        gc.collect()
        self._stop()

    def capacity(self) -> int:
        return psutil.virtual_memory().total

    def retries(self) -> int:
        return self._retries + self._replayed(self._capacity_bytes).retries

    def allow(self, capacity_bytes: int | None) -> None:
        self._capacity_bytes = capacity_bytes

    def _replayed(self, capacity_bytes: int | None) -> Replay:
        log = self._count or _Count()
        return replay(log.sizes_bytes, log.deaths, capacity_bytes=capacity_bytes)

    def _stop(self) -> None:
        if self._count is None:
            return
        self._retries = self.retries()
        self._count.__exit__(None, None, None)
        self._count = None


class _Count(TorchDispatchMode):
    """Logs the size and the death of every storage that an operation returns for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes_bytes: list[int] = []
        self.deaths: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001  # the storage's identity
        if key in self._known:
            return
        self._known.add(key)
        self.sizes_bytes.append(storage.nbytes())
        self.deaths.append(_NEVER)
        weakref.finalize(storage, self._bury, len(self.deaths) - 1, key).atexit = False

    def _bury(self, index: int, key: int) -> None:
        self._known.discard(key)
        self.deaths[index] = len(self.deaths)
