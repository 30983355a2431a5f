"""Norms of micro-batch gradients at frozen parameters: raw sums, nothing concluded."""

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from rightbatch.records.record import Record


class GradientNorms(Record):
    """Sums over K micro-batch gradients g_k at frozen parameters, kept by blocks of consecutive micro-batches.

    Block j holds ``block_counts[j]`` micro-batches; s_j is the sum of their mean gradients. ``block_gram[i][j]`` is s_i . s_j and
    ``block_sq_norm_sums[j]`` is the sum of |g_k|**2 over the block, so every leave-one-block-out statistic follows without the gradients.
    Where micro-batch k holds m_k samples instead of ``micro_batch_size``, both sums weigh it with m_k / ``micro_batch_size``.
    """

    samples_seen: NonNegativeInt
    """Training samples consumed before these parameters were reached; 0 at initialisation."""
    micro_batch_size: PositiveInt
    dataset_size: PositiveInt
    block_counts: tuple[PositiveInt, ...]
    block_sq_norm_sums: tuple[NonNegativeFloat, ...]
    block_gram: tuple[tuple[float, ...], ...]
    block_sample_counts: tuple[PositiveInt, ...] = ()
    """Samples in each block; empty when every micro-batch holds ``micro_batch_size``."""
    mean_loss: float | None = None
    skipped_micro_batches: NonNegativeInt = 0
    """Micro-batches left out because their gradient was not finite."""
