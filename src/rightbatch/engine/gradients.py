"""Norms and dot products of micro-batch gradients, in memory that does not grow with their number."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

_MOST_BLOCKS = 64
_FEWEST_BLOCKS = 8


def flat_gradient(parameters: tuple[nn.Parameter, ...]) -> Float[Tensor, " param"]:
    """Return the gradients of the parameters as one vector; a parameter without a gradient counts as zero."""
    gradients = [torch.zeros_like(p, requires_grad=False) if p.grad is None else p.grad.detach().to_dense() for p in parameters]
    return torch.cat([as_real(gradient).flatten() for gradient in gradients])


def as_real(gradient: Tensor) -> Tensor:
    """Return a complex gradient as twice as many real numbers, with the same norm and dot products; a real one as it is."""
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def block_limit(parameter_bytes: int, budget_bytes: int) -> int:
    """Return how many gradient-sized sums fit in a budget: an even number between 8 and 64."""
    return max(_FEWEST_BLOCKS, min(_MOST_BLOCKS, budget_bytes // max(parameter_bytes, 1)) // 2 * 2)


class GradientBlocks:
    """Sums of micro-batch gradients over blocks of consecutive micro-batches.

    Blocks start at one micro-batch. When ``most_blocks`` are full, neighbours are merged, so between ``most_blocks / 2`` and
    ``most_blocks`` sums are held however many gradients come, and their Gram matrix still gives every leave-one-block-out statistic.

    Args:
        most_blocks: Largest number of blocks held; even.
        device: Where the sums are kept; ``None`` keeps them beside the gradients.
    """

    def __init__(self, most_blocks: int = _MOST_BLOCKS, device: torch.device | None = None) -> None:
        if most_blocks < 2 or most_blocks % 2:
            raise ValueError(f"most_blocks must be even and at least 2; got {most_blocks}.")
        self._most_blocks = most_blocks
        self._device = device
        self._block_length = 1
        self._sums: list[Tensor] = []
        self._sq_norm_sums: list[float] = []
        self._counts: list[int] = []

    @property
    def micro_batch_count(self) -> int:
        """Number of gradients added."""
        return sum(self._counts)

    def add(self, gradient: Float[Tensor, " param"], *, weight: float = 1.0) -> bool:
        """Add one micro-batch's mean gradient; return whether it was finite (else nothing was added).

        Args:
            gradient: Mean over the micro-batch's samples.
            weight: Its number of samples over the usual one.
        """
        sq_norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2)
        if not sq_norm < float("inf"):
            return False
        if self._counts and self._counts[-1] < self._block_length:
            self._sums[-1].add_(gradient.to(self._sums[-1].device), alpha=weight)
            self._sq_norm_sums[-1] += weight * sq_norm
            self._counts[-1] += 1
            return True
        if len(self._sums) == self._most_blocks:
            self._merge_neighbours()
        self._sums.append(gradient.detach().to(self._device or gradient.device, copy=True).mul_(weight))
        self._sq_norm_sums.append(weight * sq_norm)
        self._counts.append(1)
        return True

    def _merge_neighbours(self) -> None:
        self._sums = [first.add_(second) for first, second in zip(self._sums[::2], self._sums[1::2], strict=True)]
        self._sq_norm_sums = [a + b for a, b in zip(self._sq_norm_sums[::2], self._sq_norm_sums[1::2], strict=True)]
        self._counts = [a + b for a, b in zip(self._counts[::2], self._counts[1::2], strict=True)]
        self._block_length *= 2

    def counts(self) -> tuple[int, ...]:
        """Micro-batches in each block."""
        return tuple(self._counts)

    def sq_norm_sums(self) -> tuple[float, ...]:
        """Weighted sum of |g_k|**2 over each block."""
        return tuple(self._sq_norm_sums)

    def gram(self) -> tuple[tuple[float, ...], ...]:
        """Dot products of the weighted block sums, accumulated in float64."""
        size = len(self._sums)
        rows = [[0.0] * size for _ in range(size)]
        for i, first in enumerate(self._sums):
            wide = first.double()
            for j in range(i + 1):
                rows[i][j] = rows[j][i] = float(torch.dot(wide, self._sums[j].double()))
        return tuple(tuple(row) for row in rows)
