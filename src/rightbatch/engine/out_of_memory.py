"""Out of memory is a value: telling it apart from every other failure."""

import errno
import re
from collections.abc import Mapping

import torch

MESSAGES: Mapping[str, tuple[str, ...]] = {
    "CPU": (
        r"DefaultCPUAllocator: can't allocate memory",  # Linux and macOS
        r"DefaultCPUAllocator: not enough memory",  # Windows, Android
        r"Cannot allocate memory",  # strerror(ENOMEM), wherever a mapping fails
        r"Could not allocate memory for Tensor",
        r"could not create a primitive$",  # oneDNN, whose errors carry no status; a longer message means "not supported"
        r"could not create a memory object$",
        r"DFTI ERROR: Not enough memory",  # oneMKL
        r"\bSPARSE_STATUS_ALLOC_FAILED",
        r"std::bad_alloc",
    ),
    "Windows": (
        r"error code: <(8|14|1455)>",  # not enough memory, out of memory, the paging file is too small
        r"\[WinError (8|14|1455)\]",
    ),
    "CUDA": (
        r"CUDA out of memory",
        r"CUDA (driver )?error: out of memory",
        r"CU(BLAS|SOLVER|SPARSE)_STATUS_ALLOC_FAILED",
        r"CUFFT_ALLOC_FAILED",
        r"CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED)",  # before and since cuDNN 9
        r"unable to find an engine to execute this computation",  # cuDNN's trials, which drop the out-of-memory errors they meet
        r"Unable to find a valid cuDNN algorithm to run convolution",
        r"Triton Error \[(CUDA|HIP)\]: out of memory",
        r"Cuda failure (2 )?'out of memory'",  # NCCL
    ),
    "HIP": (
        r"HIP out of memory",
        r"HIP (driver )?error: out of memory",
        r"HIP(BLAS|SOLVER|SPARSE)_STATUS_ALLOC_FAILED",
        r"HIPFFT_ALLOC_FAILED",
        r"miopenStatusAllocFailed",
    ),
    "XPU": (
        r"XPU out of memory",
        r"UR_RESULT_ERROR_OUT_OF_(HOST|DEVICE)_MEMORY",
        r"UR_RESULT_ERROR_OUT_OF_RESOURCES",  # what Level Zero says when memory of the device runs out within a kernel's launch
    ),
    "MPS": (
        r"MPS backend out of memory",
        r"Invalid buffer size: [\d.]+ (bytes|[KMGT]i?B)",  # more than Metal gives in one piece
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory",
    ),
}
"""By device, patterns of what allocators and libraries say where they raise a plain ``RuntimeError`` or ``OSError``.

Left out, because other failures say the same: ``CUBLAS_STATUS_NOT_INITIALIZED``, ``CUDNN_STATUS_NOT_SUPPORTED``. Left out, because a
smaller batch is no remedy: registers, shared memory of a kernel, and a full ``/dev/shm``.
"""

_ANY_MESSAGE = re.compile("|".join(pattern for patterns in MESSAGES.values() for pattern in patterns), re.MULTILINE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one it was raised from, means that memory ran out: by type first, then by message."""
    cause: BaseException | None = error
    seen: set[int] = set()  # an error can be raised from itself
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, (RuntimeError, OSError)) and _ANY_MESSAGE.search(str(cause)):
            return True
        cause = cause.__cause__
    return False
