"""Memory of common GPUs, for forecasts on devices that are not here.

The totals are what the driver reports to the process and PyTorch prints in its out-of-memory message ("GPU 0 has a total capacity of
14.56 GiB"), which is less than the data sheet says. Source: such messages in public issue threads that name the card; where they differ,
as they do by driver and by error correction, about the smallest. Four are not from such a message: the B200's is from a device query quoted
in a pull request; those of the A10G, the A6000 and the H200 are nvidia-smi's figure less what the message lacks on a like card (0.6 GiB).

What a process holds outside PyTorch's allocator (the CUDA context and the kernels that lazy loading brings in, cuBLAS and cuDNN handles)
is said in such threads to be 0.3 to 0.5 GiB since CUDA 11.7, and depends on the driver, the card and the kernels that a model uses.
PyTorch also gives each cuBLAS handle (one in the forward thread, one in the backward thread) a workspace that lasts: 8.125 MiB, on compute
capability 9.0 and 10.0 32 MiB; newer releases differ. Nothing here was measured by this project.
"""

from dataclasses import dataclass

from rightbatch.errors import UsageError
from rightbatch.units import GIB, MIB, format_bytes, parse_bytes

LEAST_CONTEXT_BYTES = 300 * MIB
LIKELY_CONTEXT_BYTES = 450 * MIB
LARGEST_CONTEXT_BYTES = 700 * MIB
_LEAST_SIZE_BYTES = GIB
_BLAS_HANDLES = 2
_BLAS_WORKSPACE_BYTES = 8_519_680
_LARGE_BLAS_WORKSPACE_BYTES = 32 * MIB
_MAKERS_WORDS = ("nvidia", "tesla", "geforce", "rtx")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU by its memory.

    Attributes:
        name: As the table names it, or as the user wrote the size.
        total_bytes: What the driver reports.
        blas_workspace_bytes: What cuBLAS's handles hold for good.
    """

    name: str
    total_bytes: int
    blas_workspace_bytes: int = _BLAS_HANDLES * _BLAS_WORKSPACE_BYTES

    @property
    def least_available_bytes(self) -> int:
        """What is left for tensors beside the largest context that is likely."""
        return max(self.total_bytes - self.blas_workspace_bytes - LARGEST_CONTEXT_BYTES, 0)

    @property
    def available_bytes(self) -> int:
        """What is left for tensors beside a context of the usual size."""
        return max(self.total_bytes - self.blas_workspace_bytes - LIKELY_CONTEXT_BYTES, 0)

    @property
    def largest_available_bytes(self) -> int:
        """What is left for tensors beside the smallest context that is likely."""
        return max(self.total_bytes - self.blas_workspace_bytes - LEAST_CONTEXT_BYTES, 0)


_TOTAL_GIB = {
    "t4": 14.56,
    "v100-16gb": 15.75,
    "v100-32gb": 31.74,
    "l4": 22.03,
    "a10": 21.99,
    "a10g": 21.99,
    "a30": 23.53,
    "l40": 44.40,
    "l40s": 44.42,
    "rtx3090": 23.59,
    "rtx4090": 23.52,
    "rtx5090": 31.37,
    "a6000": 47.40,
    "rtx6000-ada": 44.43,
    "a100-40gb": 39.50,
    "a100-80gb": 79.25,
    "h100": 79.10,
    "h200": 139.80,
    "b200": 178.35,
}
_WITH_LARGE_BLAS_WORKSPACE = frozenset({"h100", "h200", "b200"})

GPUS = tuple(
    Gpu(
        name=name,
        total_bytes=round(total_gib * GIB),
        blas_workspace_bytes=_BLAS_HANDLES * (_LARGE_BLAS_WORKSPACE_BYTES if name in _WITH_LARGE_BLAS_WORKSPACE else _BLAS_WORKSPACE_BYTES),
    )
    for name, total_gib in _TOTAL_GIB.items()
)


def find_gpu(text: str) -> Gpu:
    """Return the GPU of a name, however it is spaced (``a100-40gb``, ``A100 40GB``, ``RTX 4090``, ``4090``), or of a size (``24GiB``).

    Raises:
        UsageError: It is neither a name of the table nor a size of 1 GiB at least.
    """
    by_key = {_key(gpu.name): gpu for gpu in GPUS}
    if (known := by_key.get(_key(text))) is not None:
        return known
    try:
        total_bytes = parse_bytes(text)
    except ValueError:
        total_bytes = None
    if total_bytes is None:
        raise UsageError(
            f"--gpu needs the name of a GPU or the size of its memory; got {text!r}; "
            f"use a size such as 24GiB or one of {', '.join(gpu.name for gpu in GPUS)}."
        )
    if total_bytes < _LEAST_SIZE_BYTES:
        raise UsageError(f"--gpu needs a memory of 1 GiB at least; got {text!r}, {format_bytes(total_bytes)}; write it like 24GiB.")
    return Gpu(name=text.strip(), total_bytes=total_bytes)


def _key(name: str) -> str:
    key = "".join(character for character in name.lower() if character.isalnum())
    for word in _MAKERS_WORDS:
        key = key.removeprefix(word)
    return key
