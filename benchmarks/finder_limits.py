"""What the memory finders are compared within: a simulated device of known ceiling, and real limits of resident and of mapped memory.

Each limit raises ``torch.OutOfMemoryError`` where a step needs more, in words that every finder takes for running out of memory, or lets
the kernel refuse.
"""

import contextlib
import copy
import gc
import resource
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import rightbatch as rb
from rightbatch.engine.malloc import malloc_trim
from rightbatch.engine.meters import CpuMemoryMeter
from rightbatch.engine.out_of_memory import is_out_of_memory
from rightbatch.records.measurements import MemoryLimit
from rightbatch.workload.ingredients import tensors_of

DATASET_SIZE = 1_000_000
"""Samples in the repeated dataset: no finder stops for want of data."""


class Repeated:
    """The samples of a dataset over and over."""

    def __init__(self, samples: Sequence[object]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return DATASET_SIZE

    def __getitem__(self, index: int) -> object:
        return self.samples[index % len(self.samples)]


@dataclass
class Watch:
    """Logs the size of every forward pass in training, and says no to those that do not fit.

    Attributes:
        log: File that takes a line for each pass: it outlives a process that is killed.
        check: Raises where a pass of so many samples does not fit.
    """

    log: Path
    check: Callable[[int, int], None] | None = None
    errors: int = 0
    failed: set[int] = field(default_factory=set)
    current: int = 0

    def watched(self, workload: rb.Workload) -> rb.Workload:
        """The same workload with more samples and a model that is watched."""
        given = workload.model
        build = (lambda: copy.deepcopy(given)) if isinstance(given, nn.Module) else given
        return replace(workload, model=lambda: self._attach(build()), train=Repeated(workload.train))

    def _attach(self, model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        return model

    def _before(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        inputs = tensors_of([args, kwargs])
        self.current = len(inputs[0])
        with self.log.open("a") as file:
            file.write(f"{self.current} {'train' if model.training and torch.is_grad_enabled() else 'eval'}\n")
        if self.check is not None:
            self.check(self.current, sum(tensor.nbytes for tensor in (*inputs, *model.parameters())))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count an error that means out of memory, and let it pass."""
        try:
            yield
        except Exception as error:
            self.count(error)
            raise

    def count(self, error: BaseException) -> None:
        """Count an error if it means out of memory."""
        if is_out_of_memory(error):
            self.errors += 1
            self.failed.add(self.current)


def out_of_memory(wanted: str) -> torch.OutOfMemoryError:
    """The error of a CUDA device, as every finder knows it."""
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to {wanted}")


def limit_size(watch: Watch, ceiling: int) -> None:
    """A simulated device: a pass of more samples than the ceiling is out of memory."""

    def check(size: int, _held_bytes: int) -> None:
        if size > ceiling:
            raise out_of_memory(f"hold {size} samples where {ceiling} fit")

    watch.check = check


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on and live, and their peak: the meter of the simulated device.

    Args:
        scale: Device bytes for each live byte.
        context_bytes: Device bytes held by the first use.
    """

    description = "simulated device, live bytes"

    def __init__(self, *, scale: float, context_bytes: int) -> None:
        super().__init__()
        self._scale, self._context_bytes = scale, context_bytes
        self._live: dict[int, int] = {}
        self._total = self._peak = self._baseline = 0
        self.limit_bytes = 2**62

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            key = storage._cdata  # noqa: SLF001  # the storage's identity
            if key not in self._live:
                self._live[key] = storage.nbytes()
                self._total += storage.nbytes()
                weakref.finalize(storage, self._free, key).atexit = False
        self._peak = max(self._peak, self._total)
        return result

    def _free(self, key: int) -> None:
        self._total -= self._live.pop(key)

    def start(self) -> None:
        gc.collect()
        self._peak = self._baseline = self._total

    def peak_bytes(self) -> int:
        return round(self._scale * (self._peak - self._baseline)) + self._context_bytes

    def limit(self, requested_bytes: int | None) -> MemoryLimit:
        return MemoryLimit(limit_bytes=min(self.limit_bytes, requested_bytes or self.limit_bytes), source="device")


def limit_resident(watch: Watch, budget_bytes: int) -> None:
    """A budget of resident memory: a step whose peak was above it is out of memory afterwards.

    What counts is the peak above what the process held when it came to a size, but for the model and the batch, as in an attempt of ours.
    """
    meter, trim = CpuMemoryMeter(), malloc_trim()
    seen = {"size": 0, "held_bytes": 0}

    def check(size: int, held_bytes: int) -> None:
        if size != seen["size"]:
            if trim is not None:
                trim(0)
            meter.start()
            seen.update(size=size, held_bytes=held_bytes)

    def after_step(*_: object) -> None:
        used_bytes = meter.peak_bytes() + seen["held_bytes"]
        if used_bytes > budget_bytes:
            raise out_of_memory(f"use {used_bytes} of {budget_bytes} resident bytes")

    watch.check = check
    register_optimizer_step_post_hook(after_step)


def limit_address_space(budget_bytes: int) -> None:
    """Let the kernel refuse more address space than this process has and so many bytes on top."""
    allowed = psutil.Process().memory_info().vms + budget_bytes
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
