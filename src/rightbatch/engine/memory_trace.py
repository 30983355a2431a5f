"""Every storage's birth and death, logged while the user's own training steps run.

The size of each allocation is a polynomial of the micro-batch size b (nearly always affine), so the sum of the live ones is one too, at
each moment; their maximum over the moments is the peak. It is convex and only piecewise affine, which is why a straight line through
small sizes misses it: see ``allocation_laws``.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rightbatch.engine.module_names import ModuleNames
from rightbatch.records.measurements import AllocationKind
from rightbatch.workload.ingredients import tensors_of

NEVER = 2**62
"""The death of a storage that outlives the steps."""


@dataclass(slots=True)
class Allocation:
    """One storage: when it came, when it went, how large it was.

    Attributes:
        size_bytes: Bytes of the storage.
        module: Qualified name of the module that ran; empty outside any module.
        operation: Name of the operation that made it.
        death: Number of allocations that had been made when it was freed; ``2**62`` when it was not.
        kind: What it is for.
        in_backward: Whether the backward pass made it.
    """

    size_bytes: int
    module: str
    operation: str
    death: int = NEVER
    kind: AllocationKind = AllocationKind.TEMPORARY
    in_backward: bool = False


@dataclass(slots=True)
class AllocationLog:
    """Allocations in the order in which they were made."""

    batch_size: int
    allocations: list[Allocation] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Logs every storage that an operation returns for the first time."""

    def __init__(self, log: AllocationLog, modules: ModuleNames) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log
        self._modules = modules
        self._known: dict[int, Allocation] = {}
        self._open = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            self.note(tensor, str(func.overloadpacket))
        return result

    def note(self, tensor: Tensor, operation: str, kind: AllocationKind = AllocationKind.TEMPORARY) -> None:
        """Log the tensor's storage unless it is known."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001  # the storage's identity; the Python object is only a handle
        if key in self._known:
            return
        in_backward = torch._C._current_graph_task_id() >= 0  # noqa: SLF001  # set while the autograd engine runs on this thread
        allocation = Allocation(storage.nbytes(), self._modules.current, operation, kind=kind, in_backward=in_backward)
        self._known[key] = allocation
        self._log.allocations.append(allocation)
        weakref.finalize(storage, self._bury, allocation, key).atexit = False

    def _bury(self, allocation: Allocation, key: int) -> None:
        self._known.pop(key, None)
        if self._open:
            allocation.death = len(self._log.allocations)

    def mark(self, kind: AllocationKind, tensors: Sequence[Tensor]) -> None:
        """Say what some tensors are for; those whose storage was not logged are passed over."""
        for tensor in tensors:
            allocation = self._known.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None  # noqa: SLF001
            if allocation is not None:
                allocation.kind = kind

    def close(self) -> None:
        """Stop dating deaths: what lives now outlives the steps."""
        self._open = False


Mark = Callable[[AllocationKind, Sequence[Tensor]], None]
"""Tells the recorder what tensors that live now are for."""


def record(
    batch_size: int, model: nn.Module, held: Mapping[AllocationKind, Sequence[Tensor]], run: Callable[[Mark], None]
) -> AllocationLog:
    """Log the allocations of ``run``.

    Args:
        batch_size: Micro-batch size of the run, in samples.
        model: The model that runs; names the modules.
        held: Tensors that exist before the run and count as live: parameters, buffers, the batch.
        run: Takes the training steps, and marks gradients and optimizer state while they live.

    Returns:
        The log; the held tensors come first.
    """
    log = AllocationLog(batch_size)
    with ModuleNames(model) as modules, _no_garbage_collection():
        recorder = _Recorder(log, modules)
        for kind, tensors in held.items():
            for tensor in tensors:
                recorder.note(tensor, "held", kind)
        with recorder:
            run(recorder.mark)
        recorder.close()
    _name_activations(log)
    return log


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Let reference counts alone free storages: a collection in the middle of a step would date deaths by chance."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _name_activations(log: AllocationLog) -> None:
    """Tell activations, which the forward pass makes and a backward pass still finds, from temporaries."""
    next_backward = NEVER
    for index in range(len(log.allocations) - 1, -1, -1):
        allocation = log.allocations[index]
        if allocation.in_backward:
            next_backward = index
        elif allocation.kind is AllocationKind.TEMPORARY and allocation.death > next_backward:
            allocation.kind = AllocationKind.ACTIVATION
