"""Out of memory is a value: telling it apart from every other failure."""

import torch

MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "HIP out of memory",
    "XPU out of memory",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",
    "std::bad_alloc",
)
"""Beginnings of what allocators say where they raise a plain ``RuntimeError``."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one it was raised from, means that memory ran out: by type first, then by message."""
    cause: BaseException | None = error
    seen: set[int] = set()  # an error can be raised from itself
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(cause, (RuntimeError, OSError)) and any(message in str(cause) for message in MESSAGES):
            return True
        cause = cause.__cause__
    return False
