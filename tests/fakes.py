"""Devices that are not there: one of known laws, and one with so many bytes.

The first obeys planted laws: memory a + c * b with a capacity, step time t0 + b / tau, and gradients of known mean and covariance.
The probes run unchanged on it: real torch, real gradients, but its own clock and its own memory.
"""

import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from rightbatch.engine.meters import Meters
from rightbatch.engine.rig import Rig
from rightbatch.records.measurements import Contention, MemoryLimit
from rightbatch.workload.ingredients import Workload, tensors_of

DIMENSION = 24


@dataclass
class FakeDevice:
    """Time and memory that obey planted laws.

    Attributes:
        fixed_bytes: a of the memory law.
        bytes_per_sample: c of the memory law.
        capacity_bytes: A step that needs more runs out of memory.
        fixed_time_s: t0 of the step time law.
        samples_per_s: tau of the step time law.
        load_time_s: Seconds that reading one sample takes.
        jitter: Relative standard deviation of a step's time.
        busy_reasons: What the machine says about other users.
    """

    fixed_bytes: int = 4000
    bytes_per_sample: int = 600
    capacity_bytes: int = 2**40
    fixed_time_s: float = 2e-3
    samples_per_s: float = 20_000.0
    load_time_s: float = 0.0
    jitter: float = 0.0
    busy_reasons: tuple[str, ...] = ()
    out_of_memory_errors: int = 0
    largest_run: int = 0
    now: float = 0.0
    peak: int = 0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    description = "planted device"

    def run_forward(self, size: int) -> None:
        """Pay for a step of so many samples."""
        needed = self.fixed_bytes + self.bytes_per_sample * size
        if needed > self.capacity_bytes:
            self.out_of_memory_errors += 1
            raise torch.OutOfMemoryError(f"planted device: tried to hold {needed} of {self.capacity_bytes} bytes")
        self.peak = max(self.peak, needed)
        self.largest_run = max(self.largest_run, size)
        noise = 1.0 + self.jitter * float(torch.randn((), generator=self.generator))
        self.now += (self.fixed_time_s + size / self.samples_per_s) * max(noise, 0.1)

    def now_s(self) -> float:
        return self.now

    def start(self) -> None:
        self.peak = 0

    def peak_bytes(self) -> int:
        return self.peak

    def limit(self, requested_bytes: int | None) -> MemoryLimit:
        bytes_ = self.capacity_bytes if requested_bytes is None else min(requested_bytes, self.capacity_bytes)
        return MemoryLimit(limit_bytes=bytes_, source="device")

    def contention(self) -> Contention:
        self.now += 0.3
        return Contention(load_average_1m=0.0, cpu_count=2, other_processes_cpu=0.0, reasons=self.busy_reasons)

    def meters(self) -> Meters:
        return Meters(clock=self, memory=self, energy=None, contention=self.contention)


class ByteBudget(TorchDispatchMode):
    """A device with so many bytes: an operation whose results do not fit beside what was made before, and is still held, fails.

    Attributes:
        limit_bytes: The budget.
        peak_bytes: Most bytes that were held at once.
        errors: How often memory ran out.
    """

    def __init__(self, limit_bytes: int = 2**62) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.peak_bytes = self.errors = self._total = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                self._live[key] = storage.nbytes()
                self._total += storage.nbytes()
                weakref.finalize(storage, self._free, key).atexit = False
        if self._total > self.limit_bytes:
            self.errors += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to hold {self._total} of {self.limit_bytes} bytes")
        self.peak_bytes = max(self.peak_bytes, self._total)
        return result

    def _free(self, key: int) -> None:
        self._total -= self._live.pop(key)


class PlantedNet(nn.Module):
    """w with loss |w - x|**2 / 2: the gradient of a sample is w - x, so its mean and covariance are the data's."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIMENSION))
        self.fake_device = device

    def forward(self, x: Tensor) -> Tensor:
        self.fake_device.run_forward(len(x))
        return self.weight - x


class PlantedData:
    """Samples with a known mean and covariance; reading one costs time."""

    def __init__(self, device: FakeDevice, samples: Tensor) -> None:
        self.device = device
        self._inputs = samples.unbind()  # once: the probes read a sample some hundred times
        self._targets = samples[:, 0].unbind()

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.device.now += self.device.load_time_s
        return self._inputs[index], self._targets[index]


def planted_samples(noise_scale: float, size: int, seed: int) -> Tensor:
    """Samples whose gradient at w = 0 has |G|**2 = 1 and tr Sigma = noise_scale exactly, over the whole set."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, DIMENSION, generator=generator, dtype=torch.float64)
    x -= x.mean(0)
    x *= (noise_scale / (x.square().sum() / (size - 1))).sqrt()
    x[:, 0] += 1.0
    return x.float()


def half_square(output: Tensor, _target: Tensor) -> Tensor:
    return output.square().sum(1) / 2


def planted_workload(device: FakeDevice, samples: Tensor, *, lr: float | None = None, lr_batch_size: int | None = None) -> Workload:
    return Workload(
        model=lambda: PlantedNet(device),
        train=PlantedData(device, samples),
        loss=half_square,
        optimizer=None if lr is None else lambda params: torch.optim.SGD(params, lr=lr),
        lr_batch_size=lr_batch_size,
        num_workers=0,
        name="planted",
    )


def planted_rig(device: FakeDevice, workload: Workload) -> Callable[[], Rig]:
    return lambda: Rig(workload=workload, device=torch.device("cpu"), meters=device.meters())


@dataclass(frozen=True)
class GivenSource:
    """A workload in memory, as a source that can be run again."""

    workload: Workload
    spec: str = "planted.py:workload"
    arguments: tuple[str, ...] = ()
    name: str = "planted"
    unchanged: bool = True

    def load(self) -> Workload:
        return self.workload

    def code_files(self) -> tuple[tuple[str, str], ...]:
        return ()

    def code_is_unchanged(self, files: tuple[tuple[str, str], ...]) -> bool:
        return self.unchanged


class Augmented(Dataset[Tensor]):
    """Samples of four numbers: their index, and a draw of Python's, of NumPy's and of torch's global generator."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        draws = random.randrange(10**9), np.random.randint(10**9), torch.randint(10**9, ()).item()  # noqa: NPY002, S311
        return torch.tensor([index, *draws])
