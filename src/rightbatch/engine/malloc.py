"""The allocator of this process on the host: how it is set, and how it is made to give free memory back. Never imports torch."""

import ctypes
import os
from collections.abc import Callable

_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "LD_PRELOAD")


def malloc_trim() -> Callable[[int], int] | None:
    """Return the function of glibc that hands free memory back to the system; none with another allocator."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return trim


def malloc_words() -> str:
    """Name the allocator and its settings."""
    if malloc_trim() is None:
        return "system malloc"
    settings = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return f"glibc malloc, {', '.join(settings) or 'default settings'}, trimmed before each probe"
