"""Everything process-wide that a probe may change, and putting it back."""

import contextlib
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def preserved_process_state() -> Iterator[None]:
    """Put back everything process-wide that a probe may change: generators, gradient mode, precision and backend switches, threads."""
    state = process_state()
    with warnings.catch_warnings(), torch.set_grad_enabled(True):
        try:
            yield
        finally:
            restore_process_state(state)


@dataclass(frozen=True)
class ProcessState:
    """Generators, precision and backend switches, threads, default type and device."""

    python_rng: object
    numpy_rng: Any
    torch_rng: torch.Tensor
    cuda_rng: list[torch.Tensor]
    threads: int
    dtype: torch.dtype
    device: torch.device
    deterministic: bool
    deterministic_warn_only: bool
    matmul_precision: str | None
    fp32_precisions: tuple[str, ...]
    cudnn: tuple[bool, bool, bool]


def process_state() -> ProcessState:
    """Return everything process-wide that a probe may change."""
    cudnn = torch.backends.cudnn
    return ProcessState(
        python_rng=random.getstate(),
        numpy_rng=np.random.get_state(),  # noqa: NPY002
        torch_rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        threads=torch.get_num_threads(),
        dtype=torch.get_default_dtype(),
        device=torch.get_default_device(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        deterministic_warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        matmul_precision=_matmul_precision(),
        fp32_precisions=tuple(owner.fp32_precision for owner in _fp32_owners()),
        cudnn=(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
    )


def restore_process_state(state: ProcessState) -> None:
    """Put everything back."""
    random.setstate(state.python_rng)  # type: ignore[arg-type]
    np.random.set_state(state.numpy_rng)  # noqa: NPY002
    torch.set_rng_state(state.torch_rng)
    if state.cuda_rng:
        torch.cuda.set_rng_state_all(state.cuda_rng)
    if torch.get_num_threads() != state.threads:
        torch.set_num_threads(state.threads)
    torch.set_default_dtype(state.dtype)
    if torch.get_default_device() != state.device:
        torch.set_default_device(None if state.device.type == "cpu" else state.device)  # one that was set makes every call slower
    torch.use_deterministic_algorithms(state.deterministic, warn_only=state.deterministic_warn_only)
    if state.matmul_precision not in (None, _matmul_precision()):
        torch.set_float32_matmul_precision(state.matmul_precision)
    for owner, precision in zip(_fp32_owners(), state.fp32_precisions, strict=True):
        if owner.fp32_precision != precision:  # else what is inherited would be written down as if it were set
            owner.fp32_precision = precision
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = state.cudnn


def float32_precision_words() -> str:
    """Name the precision in which matrices of float32 are multiplied."""
    backends: Any = torch.backends  # its stub lacks what is newer than torch 2.8
    return _matmul_precision() or f"{backends.cuda.matmul.fp32_precision} on CUDA, {backends.mkldnn.matmul.fp32_precision} in oneDNN"


def _matmul_precision() -> str | None:
    """The precision of matrix multiplications in torch's older words; none where its newer switches say what these cannot."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _fp32_owners() -> tuple[Any, ...]:
    """What has a float32 precision of its own, each after what it inherits one from; nothing before torch 2.9."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return ()
    cudnn, onednn = backends.cudnn, backends.mkldnn
    return (backends, cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn, onednn, onednn.matmul, onednn.conv, onednn.rnn)
