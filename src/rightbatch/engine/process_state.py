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
    """Generators, precision and backend switches, threads."""

    python_rng: object
    numpy_rng: Any
    torch_rng: torch.Tensor
    cuda_rng: list[torch.Tensor]
    threads: int
    dtype: torch.dtype
    deterministic: bool
    deterministic_warn_only: bool
    matmul_precision: str
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
        deterministic=torch.are_deterministic_algorithms_enabled(),
        deterministic_warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        matmul_precision=torch.get_float32_matmul_precision(),
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
    torch.use_deterministic_algorithms(state.deterministic, warn_only=state.deterministic_warn_only)
    torch.set_float32_matmul_precision(state.matmul_precision)
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = state.cudnn
