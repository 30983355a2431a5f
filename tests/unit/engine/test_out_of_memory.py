"""Out of memory is told from every other failure, by type, by message, and through causes."""

import re

import pytest
import torch

from rightbatch.engine.out_of_memory import MESSAGES, is_out_of_memory

AS_THEY_SAY_IT = {
    "CPU": (
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 5242880 bytes. "
        "Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 5242880 bytes. "
        "Error code 12 (Impossible d'allouer de la mémoire)",
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate 3600000000 bytes.",
        "unable to mmap 8192 bytes from file </torch_12_3_4>: Cannot allocate memory (12)",
        "Could not allocate memory for Tensor SizesAndStrides!",
        "could not create a primitive",
        "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: could not create a primitive\n",
        "could not create a memory object",
        "MKL FFT error: Intel oneMKL DFTI ERROR: Not enough memory to allocate",
        "MKL error: SPARSE_STATUS_ALLOC_FAILED when calling `mkl_sparse_s_create_csr(...)`",
        "std::bad_alloc",
    ),
    "Windows": (
        "Couldn't open shared file mapping: <torch_12_3_4>, error code: <1455>",
        "Couldn't map view of shared file <torch_12_3_4>, error code: <8>",
        "[WinError 1455] The paging file is too small for this operation to complete. Error loading shm.dll or one of its dependencies.",
        "[WinError 8] Not enough memory resources are available to process this command",
        "[WinError 14] Not enough memory resources are available to complete this operation",
    ),
    "CUDA": (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.77 GiB of which 12.88 MiB is free.",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`.",
        "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation after trying 7 plans.",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "Triton Error [CUDA]: out of memory",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 2 'out of memory'",
        "Last error:\nCuda failure 'out of memory'",
    ),
    "HIP": (
        "HIP out of memory. Tried to allocate 432.00 MiB. GPU 0 has a total capacity of 15.92 GiB of which 7.12 GiB is free.",
        "HIP error: out of memory\nHIP kernel errors might be asynchronously reported at some other API call",
        "HIP driver error: out of memory",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "hipsolver error: HIPSOLVER_STATUS_ALLOC_FAILED, when calling `hipsolverDnCreate(handle)`",
        "CUDA error: HIPSPARSE_STATUS_ALLOC_FAILED when calling `hipsparseCreate(handle)`",
        "cuFFT error: HIPFFT_ALLOC_FAILED",
        "miopenStatusAllocFailed",
        "Triton Error [HIP]: out of memory",
    ),
    "XPU": (
        "XPU out of memory. Tried to allocate 59.61 GiB. GPU 0 has a total capacity of 28.55 GiB of which 12.01 GiB is free.",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)",
        "UR backend failed. UR backend returns:40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    ),
    "MPS": (
        "MPS backend out of memory (MPS allocated: 17.21 GiB, other allocations: 1.02 GiB, max allowed: 20.13 GiB). "
        "Tried to allocate 2.25 GiB on private pool.",
        "Invalid buffer size: 19.38 GiB",
        "Invalid buffer size: 9.75 GB",
        "Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    ),
}
"""Messages as torch 2.6 to 2.13 and its libraries word them: from the strings of the installed libtorch and libc10, from the allocators'
sources, and for what no source holds from reports of users."""

OTHERWISE = (
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "Expected to have finished reduction in the prior iteration before starting a new one.",
    "",
    # CPU
    "alloc_cpu() seems to have been called with negative number: -8",
    "could not create a primitive descriptor for the matmul primitive. Run workload with environment variable ONEDNN_VERBOSE=all",
    "could not create a memory descriptor from blob",
    "could not execute a primitive",
    "MKL FFT error: Intel oneMKL DFTI ERROR: Inconsistent configuration parameters",
    "Could not initialize NNPACK! Reason: Unsupported hardware.",
    "unable to open shared memory object </torch_12_3_4> in read-write mode: Too many open files (24)",
    "unable to allocate shared memory(shm) for file </torch_12_3_4>: No space left on device (28)",
    "DataLoader worker (pid 7) is killed by signal: Killed.",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory.",
    # Windows
    "Couldn't open shared file mapping: <torch_12_3_4>, error code: <2>",
    "could not get file size: <weights.bin>; error code: <80>",
    "[WinError 126] The specified module could not be found.",
    # CUDA
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: too many resources requested for launch",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuFFT error: CUFFT_INTERNAL_ERROR",
    "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or `num_stages` may help.",
    "Triton Error [CUDA]: device kernel image is invalid",
    "Last error:\nCuda failure 'peer access is not supported between these two devices'",
    # HIP
    "HIP error: invalid device function",
    "CUDA error: HIPBLAS_STATUS_INTERNAL_ERROR when calling `hipblasSgemm(...)`",
    "miopenStatusUnknownError",
    # XPU
    "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    "Native API failed. Native API returns: 4 (UR_RESULT_ERROR_INVALID_VALUE)",
    # MPS
    "Placeholder buffer size is not large enough to contain the Tensor storage of size 9",
    "Invalid buffer size: must be positive",
    "The operator 'aten::linalg_qr' is not currently implemented for the MPS device.",
    "MPS backend was selected in PyTorch without support",
)


@pytest.mark.parametrize(("device", "message"), [(device, said) for device, messages in AS_THEY_SAY_IT.items() for said in messages])
def test_what_an_allocator_says_means_out_of_memory(device, message):
    assert is_out_of_memory(RuntimeError(message))
    assert is_out_of_memory(OSError(message))


@pytest.mark.parametrize("message", OTHERWISE)
def test_what_only_sounds_like_it_does_not(message):
    assert not is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(OSError(message))


@pytest.mark.parametrize("device", MESSAGES)
def test_every_pattern_of_the_table_is_needed_by_a_message_of_its_device(device):
    everything = [message for messages in AS_THEY_SAY_IT.values() for message in messages]
    for pattern in MESSAGES[device]:
        rest = [other for patterns in MESSAGES.values() for other in patterns if other != pattern]
        alone = [said for said in everything if re.search(pattern, said, re.MULTILINE)]
        assert any(not any(re.search(other, said, re.MULTILINE) for other in rest) for said in alone), pattern


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(""), MemoryError(), OSError(12, "Nicht genügend Hauptspeicher verfügbar")])
def test_the_type_or_number_alone_is_enough(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("root", [MemoryError(), RuntimeError("CUDA out of memory."), OSError(12, "")])
def test_an_error_raised_from_one_counts(root):
    middle, outer = ValueError("step failed"), KeyError("wrapped again")
    middle.__cause__, outer.__cause__ = root, middle
    assert is_out_of_memory(outer)


@pytest.mark.parametrize(
    "error",
    [
        OSError(2, "No such file or directory"),
        OSError(28, "No space left on device"),
        ValueError("CUDA out of memory"),
        KeyError("memory"),
        IndexError("index 3 is out of bounds"),
    ],
    ids=repr,
)
def test_other_types_of_failure_do_not(error):
    assert not is_out_of_memory(error)


def test_an_error_raised_from_itself_ends_the_search():
    error = ValueError("odd")
    error.__cause__ = error
    assert not is_out_of_memory(error)
