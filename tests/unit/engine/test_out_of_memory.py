"""Out of memory is told from every other failure, by type, by message, and through causes."""

import pytest
import torch

from rightbatch.engine import out_of_memory
from rightbatch.engine.out_of_memory import MESSAGES, UNEXPLAINED, is_out_of_memory

AS_ALLOCATORS_SAY_IT = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.77 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "XPU out of memory. Tried to allocate 2.00 GiB",
    "MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1.00 GB)",
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    "[enforce fail at alloc_cpu.cpp:66] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    "unable to mmap 8192 bytes from file </torch_1>: Cannot allocate memory (12)",
    "std::bad_alloc",
)


@pytest.mark.parametrize("message", AS_ALLOCATORS_SAY_IT)
def test_what_an_allocator_says_means_out_of_memory(message):
    assert is_out_of_memory(RuntimeError(message))


def test_every_message_of_the_table_is_tried_here():
    assert [entry for entry in MESSAGES if not any(entry in message for message in AS_ALLOCATORS_SAY_IT)] == []


@pytest.mark.parametrize("binds", [True, False])
@pytest.mark.parametrize("message", UNEXPLAINED)
def test_what_has_many_reasons_means_out_of_memory_only_where_address_space_is_limited(monkeypatch, message, binds):
    monkeypatch.setattr(out_of_memory, "address_space_binds", lambda: binds)
    assert is_out_of_memory(RuntimeError(message)) is binds
    assert not is_out_of_memory(RuntimeError(f"{message} descriptor for a convolution forward propagation primitive"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(""), MemoryError(), OSError(12, "Cannot allocate memory")])
def test_the_type_alone_is_enough(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("root", [MemoryError(), RuntimeError("CUDA out of memory.")])
def test_an_error_raised_from_one_counts(root):
    middle, outer = ValueError("step failed"), KeyError("wrapped again")
    middle.__cause__, outer.__cause__ = root, middle
    assert is_out_of_memory(outer)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        RuntimeError(""),
        OSError(2, "No such file or directory"),
        ValueError("CUDA out of memory"),
        KeyError("memory"),
        IndexError("index 3 is out of bounds"),
    ],
    ids=repr,
)
def test_other_failures_do_not(error):
    assert not is_out_of_memory(error)


def test_an_error_raised_from_itself_ends_the_search():
    error = ValueError("odd")
    error.__cause__ = error
    assert not is_out_of_memory(error)
