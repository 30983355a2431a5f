"""Out of memory is a value: telling it apart from every other failure."""

import torch

from rightbatch.engine.memory_limits import address_space_binds

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

UNEXPLAINED = ("could not create a primitive",)
"""What oneDNN says whatever the reason: within a limit on address space it could not map memory, elsewhere it is another failure."""


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
        if isinstance(cause, RuntimeError) and str(cause) in UNEXPLAINED and address_space_binds():
            return True
        cause = cause.__cause__
    return False
