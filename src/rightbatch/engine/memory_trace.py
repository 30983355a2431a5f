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
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rightbatch.engine.module_names import ModuleNames
from rightbatch.engine.recurrent_workspace import PAGE_BYTES, is_workspace, paged_parts
from rightbatch.records.measurements import AllocationKind
from rightbatch.workload.ingredients import tensors_of

NEVER = 2**62
"""The death of a storage that outlives the steps."""
_BY_ROW, _BY_COLUMN = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_SPARSE_COMPONENTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROW,
    torch.sparse_bsr: _BY_ROW,
    torch.sparse_csc: _BY_COLUMN,
    torch.sparse_bsc: _BY_COLUMN,
}
"""Methods that return the strided tensors of which a sparse one consists."""


@dataclass(slots=True)
class Allocation:
    """One storage: when it came, when it went, how large it was. A storage whose kernel rounds its parts up is one allocation a part.

    Attributes:
        size_bytes: Bytes of the storage.
        module: Qualified name of the module that ran; empty outside any module.
        operation: Name of the operation that made it.
        death: Number of allocations that had been made when it was freed; ``2**62`` when it was not.
        kind: What it is for.
        in_backward: Whether the backward pass made it.
        rounding_bytes: Multiple that a kernel rounded it up to.
        unrounded_bytes: Its bytes before that; none when they are not known.
    """

    size_bytes: int
    module: str
    operation: str
    death: int = NEVER
    kind: AllocationKind = AllocationKind.TEMPORARY
    in_backward: bool = False
    rounding_bytes: int = 1
    unrounded_bytes: int | None = None


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
        self._known: dict[int, tuple[Allocation, ...]] = {}
        self._open = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            self.note(tensor, str(func.overloadpacket), inputs=args)
        return result

    def note(self, tensor: Tensor, operation: str, kind: AllocationKind = AllocationKind.TEMPORARY, inputs: Sequence[object] = ()) -> None:
        """Log the tensor's storages unless they are known."""
        for storage in storages_of(tensor):
            key = storage._cdata  # noqa: SLF001  # the storage's identity; the Python object is only a handle
            if key in self._known:
                continue
            allocations = tuple(
                Allocation(
                    size_bytes,
                    self._modules.current,
                    operation,
                    kind=kind,
                    in_backward=torch._C._current_graph_task_id() >= 0,  # noqa: SLF001  # set while the autograd engine runs on this thread
                    rounding_bytes=rounding_bytes,
                    unrounded_bytes=unrounded_bytes,
                )
                for size_bytes, rounding_bytes, unrounded_bytes in _parts(storage.nbytes(), tensor, operation, inputs)
            )
            self._known[key] = allocations
            self._log.allocations += allocations
            weakref.finalize(storage, self._bury, allocations, key).atexit = False

    def _bury(self, allocations: tuple[Allocation, ...], key: int) -> None:
        self._known.pop(key, None)
        if self._open:
            for allocation in allocations:
                allocation.death = len(self._log.allocations)

    def mark(self, kind: AllocationKind, tensors: Sequence[Tensor]) -> None:
        """Say what some tensors are for; those whose storage was not logged are passed over."""
        for storage in (storage for tensor in tensors for storage in storages_of(tensor)):
            for allocation in self._known.get(storage._cdata, ()):  # noqa: SLF001
                allocation.kind = kind

    def close(self) -> None:
        """Stop dating deaths: what lives now outlives the steps."""
        self._open = False


def _parts(size_bytes: int, tensor: Tensor, operation: str, inputs: Sequence[object]) -> list[tuple[int, int, int | None]]:
    """Return (bytes, multiple they are rounded up to, bytes before) of each part of a storage; nearly always there is one."""
    if not is_workspace(operation, tensor):
        return [(size_bytes, 1, None)]
    parts = paged_parts(inputs, size_bytes)
    return [(-(-part // PAGE_BYTES) * PAGE_BYTES, PAGE_BYTES, part) for part in parts] or [(size_bytes, PAGE_BYTES, None)]


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return the storages of a tensor: one when it is strided, that of each component when it is sparse, none when it has no storage."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    names = _SPARSE_COMPONENTS.get(tensor.layout, ())
    with _disable_current_modes():
        return [getattr(tensor, name)().untyped_storage() for name in names]


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
