"""The meter for processes whose address space or private memory is limited: there bytes count that were asked for, resident or not."""

import gc
from pathlib import Path

from rightbatch.engine.malloc import malloc_trim, malloc_words
from rightbatch.engine.memory_limits import cpu_memory_limit
from rightbatch.records.measurements import MemoryLimit


class AddressSpaceMeter:
    """Peak growth of this process's address space, from the kernel's high-water mark.

    ``RLIMIT_AS`` bounds the address space, ``RLIMIT_DATA`` its private writable part, of which the kernel keeps no high-water mark; what
    training adds to the one is almost all of the other. The mark cannot be reset: only the first attempt of a process is measured
    rightly, later ones at no less than the largest before.

    Args:
        proc: Where the kernel describes this process.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self._baseline_bytes = 0
        self._trim = malloc_trim()

    @property
    def description(self) -> str:
        """What is measured, and in which allocator mode."""
        return f"cpu, {malloc_words()}; peak address space, each attempt in a process of its own"

    def start(self) -> None:
        """Collect garbage, hand free memory back to the system, and take the address space as it is now for zero."""
        gc.collect()
        if self._trim is not None:
            self._trim(0)
        self._baseline_bytes = self._status_bytes("VmSize")

    def peak_bytes(self) -> int:
        """Return the peak of the address space, above what it was at the start."""
        return max(0, self._status_bytes("VmPeak") - self._baseline_bytes)

    def limit(self, requested_bytes: int | None) -> MemoryLimit:
        """Return the least of every limit on host memory."""
        return cpu_memory_limit(requested_bytes)

    def _status_bytes(self, name: str) -> int:
        lines = (self._proc / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
