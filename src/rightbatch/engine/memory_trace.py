"""Allocations of a training step at a few small sizes, matched into live bytes at any size.

Every storage's birth and death is logged while the user's own step runs. The size of each allocation is a polynomial of the micro-batch
size b (nearly always affine), so the sum of the live ones is one too, at each moment; their maximum over the moments is the peak. It is
convex and only piecewise affine, which is why a straight line through small sizes misses it.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from rightbatch.records.measurements import LiveMoment
from rightbatch.workload.ingredients import tensors_of

_NEVER = 2**62


@dataclass(slots=True)
class Allocation:
    """One storage: when it came, when it went, how large it was.

    Attributes:
        size_bytes: Bytes of the storage.
        module: Qualified name of the module that ran; empty outside any module.
        operation: Name of the operation that made it.
        death: Number of allocations that had been made when it was freed; ``2**62`` when it was not.
    """

    size_bytes: int
    module: str
    operation: str
    death: int = _NEVER


@dataclass(slots=True)
class AllocationLog:
    """Allocations in the order in which they were made."""

    batch_size: int
    allocations: list[Allocation] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Logs every storage that an operation returns for the first time."""

    def __init__(self, log: AllocationLog, modules: ModuleTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log
        self._modules = modules
        self._known: set[int] = set()
        self._open = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            self.note(tensor, str(func.overloadpacket))
        return result

    def note(self, tensor: Tensor, operation: str) -> None:
        """Log the tensor's storage unless it is known."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001  # the storage's identity; the Python object is only a handle
        if key in self._known:
            return
        self._known.add(key)
        name = max(self._modules.parents - {"Global"}, key=len, default="")
        allocation = Allocation(storage.nbytes(), name.partition(".")[2], operation)
        self._log.allocations.append(allocation)
        weakref.finalize(storage, self._bury, allocation, key).atexit = False

    def _bury(self, allocation: Allocation, key: int) -> None:
        self._known.discard(key)
        if self._open:
            allocation.death = len(self._log.allocations)

    def close(self) -> None:
        """Stop dating deaths: what lives now outlives the steps."""
        self._open = False


def record(batch_size: int, held: Sequence[Tensor], run: Callable[[], None]) -> AllocationLog:
    """Log the allocations of ``run``.

    Args:
        batch_size: Micro-batch size of the run, in samples.
        held: Tensors that exist before the run and count as live: parameters, buffers, the batch.
        run: Takes the training steps.

    Returns:
        The log; the held tensors come first.
    """
    log = AllocationLog(batch_size)
    with ModuleTracker() as modules:
        recorder = _Recorder(log, modules)
        for tensor in held:
            recorder.note(tensor, "held")
        with recorder:
            run()
        recorder.close()
    return log


class UnmatchedLogsError(Exception):
    """The logs of different sizes do not describe the same allocations."""


def match(logs: Sequence[AllocationLog]) -> tuple[LiveMoment, ...]:
    """Join logs of three or four sizes into the moments that can be the peak.

    The first two sizes give each allocation's affine law and the third checks it. Where one is not affine, the third gives a
    quadratic law and the fourth checks that. A storage lives as long as it did in any of the logs: order within a step may differ.

    Args:
        logs: One log a size, in ascending order of size.

    Returns:
        Undominated moments: their maximum at b is the peak at b, for every b >= 1.

    Raises:
        UnmatchedLogsError: The logs differ in their operations, or an allocation follows no polynomial that the last log confirms.
    """
    columns = [log.allocations for log in logs]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise UnmatchedLogsError(f"the number of allocations changes with the size ({', '.join(str(len(column)) for column in columns)})")
    sizes = [log.batch_size for log in logs]
    laws = []
    for index, row in enumerate(zip(*columns, strict=True)):
        if len({allocation.operation for allocation in row}) != 1:
            raise UnmatchedLogsError(f"operation {index} is {row[0].operation} at one size and {row[-1].operation} at another")
        laws.append(_polynomial(sizes, [allocation.size_bytes for allocation in row], row[0]))
    deaths = [max(column[index].death for column in columns) for index in range(len(laws))]
    return _undominated(_moments(laws, deaths, columns[0]))


Polynomial = tuple[int, int, int]


def _polynomial(sizes: Sequence[int], values: Sequence[int], allocation: Allocation) -> Polynomial:
    """Return (fixed, per sample, per sample squared) through all points, by divided differences in integers."""
    (b0, b1), (v0, v1) = sizes[:2], values[:2]
    slope, remainder = divmod(v1 - v0, b1 - b0)
    affine = (v0 - slope * b0, slope, 0)
    if not remainder and all(_value(affine, b) == v for b, v in zip(sizes, values, strict=True)):
        return affine
    b2, v2 = sizes[2], values[2]
    numerator = (v2 - v0) * (b1 - b0) - (v1 - v0) * (b2 - b0)
    curvature, remainder = divmod(numerator, (b1 - b0) * (b2 - b0) * (b2 - b1))
    slope = (v1 - v0) // (b1 - b0) - curvature * (b0 + b1)
    quadratic = (v0 - slope * b0 - curvature * b0 * b0, slope, curvature)
    if remainder or len(sizes) < 4 or any(_value(quadratic, b) != v for b, v in zip(sizes, values, strict=True)):
        pairs = ", ".join(f"{v} bytes at {b}" for b, v in zip(sizes, values, strict=True))
        raise UnmatchedLogsError(f"{allocation.operation} in {allocation.module or 'the step'} follows no polynomial of the size ({pairs})")
    return quadratic


def _value(law: Polynomial, batch_size: int) -> int:
    return law[0] + law[1] * batch_size + law[2] * batch_size * batch_size


def _moments(laws: Sequence[Polynomial], deaths: Sequence[int], allocations: Sequence[Allocation]) -> list[LiveMoment]:
    """Return the sum of the live laws just after each allocation."""
    dying: dict[int, list[Polynomial]] = {}
    live = [0, 0, 0]
    moments = []
    for index, (law, death, allocation) in enumerate(zip(laws, deaths, allocations, strict=True)):
        for dead in dying.pop(index, ()):
            live = [total - part for total, part in zip(live, dead, strict=True)]
        live = [total + part for total, part in zip(live, law, strict=True)]
        if death < _NEVER:
            dying.setdefault(death, []).append(law)
        moments.append(
            LiveMoment(
                fixed_bytes=live[0],
                per_sample_bytes=live[1],
                per_sample_squared_bytes=live[2],
                module=allocation.module,
                operation=allocation.operation,
            )
        )
    return moments


def _undominated(moments: list[LiveMoment]) -> tuple[LiveMoment, ...]:
    """Drop every moment that another one matches or exceeds in all three coefficients, hence at every size."""
    kept: list[LiveMoment] = []
    order = sorted(moments, key=lambda m: (m.per_sample_squared_bytes, m.per_sample_bytes, m.fixed_bytes), reverse=True)
    for moment in order:
        if not any(
            other.fixed_bytes >= moment.fixed_bytes
            and other.per_sample_bytes >= moment.per_sample_bytes
            and other.per_sample_squared_bytes >= moment.per_sample_squared_bytes
            for other in kept
        ):
            kept.append(moment)
    return tuple(kept)
