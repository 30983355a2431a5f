"""How much memory training may use on the host: the smallest of every limit that could end the process. Never imports torch."""

import resource
from pathlib import Path

import psutil

from rightbatch.records.measurements import MemoryLimit
from rightbatch.units import MIB

_HEADROOM_FRACTION = 0.1
_LEAST_HEADROOM_BYTES = 256 * MIB
_UNLIMITED = 2**60
_OWN_LIMITS = ("RLIMIT_AS", "RLIMIT_DATA")


def cpu_memory_limit(requested_bytes: int | None = None) -> MemoryLimit:
    """Return the bytes that this process may still add: the least of the request and of every limit in force.

    A tenth of what is free, and 256 MiB at least, stays free as headroom for others; nothing of a limit on this process alone, and a
    smaller ``requested_bytes`` is taken as it is.

    Args:
        requested_bytes: The user's own limit for what training adds, in bytes.
    """
    source, free = _binding_limit()
    is_own = source in _OWN_LIMITS
    headroom = 0 if is_own else min(free, max(int(free * _HEADROOM_FRACTION), _LEAST_HEADROOM_BYTES))
    if requested_bytes is not None and requested_bytes <= free - headroom:
        return MemoryLimit(limit_bytes=requested_bytes, source="--limit", once_a_process=is_own)
    return MemoryLimit(limit_bytes=free - headroom, source=source, headroom_bytes=headroom, once_a_process=is_own)


def address_space_binds() -> bool:
    """Whether the tightest limit is one on this process's address space or private memory, which counts bytes that are not resident too."""
    return _binding_limit()[0] in _OWN_LIMITS


def _binding_limit() -> tuple[str, int]:
    return min(free_memory_bytes().items(), key=lambda item: item[1])


def free_memory_bytes(*, proc: Path = Path("/proc"), cgroup_root: Path = Path("/sys/fs/cgroup")) -> dict[str, int]:
    """Return the bytes still free under each limit, by the name of the limit.

    Args:
        proc: Where the kernel's process files are.
        cgroup_root: Where the control groups are mounted.
    """
    free = {"MemAvailable": psutil.virtual_memory().available}
    memory = psutil.Process().memory_info()
    data_bytes = getattr(memory, "data", memory.rss)  # only Linux counts private writable memory apart
    for name, kind, used in (("RLIMIT_AS", resource.RLIMIT_AS, memory.vms), ("RLIMIT_DATA", resource.RLIMIT_DATA, data_bytes)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            free[name] = max(0, soft - used)
    free.update(_cgroup_free_bytes(proc, cgroup_root))
    return free


def _cgroup_free_bytes(proc: Path, root: Path) -> dict[str, int]:
    """Return free bytes for every level of the process's control group, version 1 and 2."""
    free: dict[str, int] = {}
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            base, limit_file, usage_file = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, usage_file = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        relative = Path(path.lstrip("/"))
        for level in (relative, *relative.parents):
            folder = base / level
            limit = _read_int(folder / limit_file)
            if limit is not None and limit < _UNLIMITED:
                used = (_read_int(folder / usage_file) or 0) - _reclaimable_bytes(folder)
                name = f"cgroup /{level if str(level) != '.' else ''}"
                free[name] = min(max(0, limit - max(0, used)), free.get(name, _UNLIMITED))
    return free


def _reclaimable_bytes(folder: Path) -> int:
    """Page cache that the kernel drops before it ends a process; version 1 counts the levels below under a name of its own."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counters = dict(line.split()[:2] for line in lines if line.startswith(("inactive_file ", "total_inactive_file ")))
    return int(counters.get("total_inactive_file", counters.get("inactive_file", 0)))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
