"""Clocks and memory meters: the only place that synchronises a device and reads its counters."""

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import psutil
import torch

from rightbatch.engine.address_space import AddressSpaceMeter
from rightbatch.engine.malloc import malloc_trim, malloc_words
from rightbatch.engine.memory_limits import address_space_binds, cpu_memory_limit
from rightbatch.engine.nvml import nvml_energy_meter, other_gpu_processes
from rightbatch.records.measurements import Contention, MemoryLimit

_PEAK_RESET = "5"
_BUSY_CORES = 0.5


@runtime_checkable
class Clock(Protocol):
    """Tells the time once the device has finished what it was given."""

    def now_s(self) -> float:
        """Wait for the device, then return monotonic seconds."""


@runtime_checkable
class MemoryMeter(Protocol):
    """Measures what training adds to the memory of this process."""

    @property
    def description(self) -> str:
        """What is measured, and in which allocator mode."""

    def start(self) -> None:
        """Release what is cached, and take what the process holds now as zero."""

    def peak_bytes(self) -> int:
        """Return the peak since the start, in bytes above what was held then."""

    def limit(self, requested_bytes: int | None) -> MemoryLimit:
        """Return how much training may use now."""


@runtime_checkable
class EnergyMeter(Protocol):
    """Counts the energy that the device has used."""

    def energy_j(self) -> float:
        """Return joules since some fixed moment."""


@dataclass(frozen=True, kw_only=True)
class Meters:
    """Everything that measures one device.

    Attributes:
        clock: Synchronised time.
        memory: Peak memory and limits.
        energy: Joules; none where nothing counts them.
        contention: What else uses the machine.
    """

    clock: Clock
    memory: MemoryMeter
    energy: EnergyMeter | None
    contention: Callable[[], Contention]


def meters_for(device: torch.device) -> Meters:
    """Return the meters of a device."""
    if device.type == "cuda":
        return Meters(
            clock=DeviceClock(lambda: torch.cuda.synchronize(device)),
            memory=CudaMemoryMeter(device),
            energy=nvml_energy_meter(device),
            contention=lambda: measure_contention(device),
        )
    wait = torch.mps.synchronize if device.type == "mps" else None
    memory = AddressSpaceMeter() if address_space_binds() else CpuMemoryMeter()
    return Meters(clock=DeviceClock(wait), memory=memory, energy=None, contention=measure_contention)


class DeviceClock:
    """Monotonic time after the device has caught up.

    Args:
        synchronize: Waits for the device; ``None`` when it computes synchronously.
    """

    def __init__(self, synchronize: Callable[[], None] | None) -> None:
        self._synchronize = synchronize

    def now_s(self) -> float:
        """Wait for the device, then return seconds."""
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


class CpuMemoryMeter:
    """Peak resident set of this process, from the kernel's own high-water mark.

    Where the mark cannot be reset (outside Linux, or in some containers) it is the peak of the whole process, which is right for sizes
    tried in ascending order and too high otherwise; the description says so.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self._baseline_bytes = 0
        self._resettable = self._reset()
        self._trim = malloc_trim()

    @property
    def description(self) -> str:
        """What is measured, and in which allocator mode."""
        return f"cpu, {malloc_words()}; peak resident set {'of each probe' if self._resettable else 'of the whole process'}"

    def start(self) -> None:
        """Collect garbage, hand free memory back to the system, and reset the high-water mark."""
        gc.collect()
        if self._trim is not None:
            self._trim(0)
        self._resettable = self._reset()
        self._baseline_bytes = psutil.Process().memory_info().rss

    def peak_bytes(self) -> int:
        """Return the peak resident set since the start, above what was resident then."""
        return max(0, self._high_water_bytes() - self._baseline_bytes)

    def limit(self, requested_bytes: int | None) -> MemoryLimit:
        """Return the least of every limit on host memory."""
        return cpu_memory_limit(requested_bytes)

    def _reset(self) -> bool:
        try:
            (self._proc / "clear_refs").write_text(_PEAK_RESET)
        except OSError:
            return False
        return True

    def _high_water_bytes(self) -> int:
        try:
            status = (self._proc / "status").read_text()
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


class CudaMemoryMeter:
    """Peak bytes that the caching allocator reserved on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline_bytes = 0

    @property
    def description(self) -> str:
        """What is measured, and in which allocator mode."""
        return f"cuda, caching allocator ({torch.cuda.get_allocator_backend()}); peak reserved bytes"

    def start(self) -> None:
        """Give cached blocks back and reset the peak."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._baseline_bytes = torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        """Return the peak of reserved bytes since the start, above what was reserved then."""
        torch.cuda.synchronize(self._device)
        return max(0, torch.cuda.max_memory_reserved(self._device) - self._baseline_bytes)

    def limit(self, requested_bytes: int | None) -> MemoryLimit:
        """Return what the device has free, other processes' use taken off, or the request if that is less."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        headroom = min(free, total // 100)
        if requested_bytes is not None and requested_bytes <= free - headroom:
            return MemoryLimit(limit_bytes=requested_bytes, source="--limit")
        return MemoryLimit(limit_bytes=free - headroom, source="device", headroom_bytes=headroom)


@contextlib.contextmanager
def capped(device: torch.device, limit_bytes: int) -> Iterator[Callable[[], bool]]:
    """Let the caching allocator of a CUDA device reserve no more than so many bytes on top of what it has; elsewhere change nothing.

    Yields:
        Tells whether the allocator has had to free its cache and try again since: what ran then needs more than the limit.
    """
    if device.type != "cuda":
        yield lambda: False
        return
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    allowed = (torch.cuda.memory_reserved(device) + limit_bytes) / total_bytes
    before = _allocation_retries(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed), device)
    try:
        yield lambda: _allocation_retries(device) > before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _allocation_retries(device: torch.device) -> int:
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def measure_contention(gpu: torch.device | None = None, *, window_s: float = 0.3) -> Contention:
    """Measure what other processes use of the machine.

    Args:
        gpu: CUDA device whose other processes count too.
        window_s: Seconds over which processor use is averaged.
    """
    cpu_count = psutil.cpu_count() or 1
    start, busy_start = time.perf_counter(), _busy_cpu_s()
    own_start = time.process_time()
    time.sleep(window_s)
    elapsed = time.perf_counter() - start
    others = max(0.0, (_busy_cpu_s() - busy_start) - (time.process_time() - own_start)) / elapsed
    reasons = []
    if others > _BUSY_CORES:
        reasons.append(f"Other processes keep {others:.1f} of {cpu_count} processor cores busy.")
    gpu_processes = 0 if gpu is None else other_gpu_processes(gpu)
    if gpu_processes:
        reasons.append(
            f"{gpu_processes} other process{'es' if gpu_processes > 1 else ''} compute{'s' if gpu_processes == 1 else ''} on the GPU."
        )
    return Contention(
        load_average_1m=psutil.getloadavg()[0],
        cpu_count=cpu_count,
        other_processes_cpu=others,
        other_gpu_processes=gpu_processes,
        reasons=tuple(reasons),
    )


def _busy_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))
