"""Measured steps of a run added up to a bounded number of blocks, however long the run."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rightbatch.fits.intervals import FloatArray
from rightbatch.records.measurements import NoiseBlock

MOST_BLOCKS = 64


@dataclass(frozen=True)
class MeasuredStep:
    """One optimizer step.

    Attributes:
        trace: Unbiased tr Sigma, one number a layer.
        sq_norm: Unbiased squared norm of the true gradient, one number a layer.
        micro_batches: Over all ranks.
        samples: Over all ranks.
        samples_seen: Samples of the run so far, this step included.
    """

    trace: FloatArray
    sq_norm: FloatArray
    micro_batches: int
    samples: int
    samples_seen: int


class NoiseBlocks:
    """Sums over blocks of consecutive steps; when 64 blocks are full, neighbours are merged, so 32 to 64 are held."""

    def __init__(self) -> None:
        self._block_length = 1
        self._steps: list[MeasuredStep] = []
        self._counts: list[int] = []

    def add(self, step: MeasuredStep) -> None:
        """Add the next step of the run."""
        if self._counts and self._counts[-1] < self._block_length:
            self._steps[-1] = _sum(self._steps[-1], step)
            self._counts[-1] += 1
            return
        if len(self._steps) == MOST_BLOCKS:
            self._steps = [_sum(a, b) for a, b in zip(self._steps[::2], self._steps[1::2], strict=True)]
            self._counts = [a + b for a, b in zip(self._counts[::2], self._counts[1::2], strict=True)]
            self._block_length *= 2
        self._steps.append(step)
        self._counts.append(1)

    def records(self) -> tuple[NoiseBlock, ...]:
        """Return the sums as records."""
        return tuple(
            NoiseBlock(
                steps=count,
                micro_batches=block.micro_batches,
                samples=block.samples,
                samples_seen=block.samples_seen,
                trace_sums=tuple(block.trace.tolist()),
                sq_norm_sums=tuple(block.sq_norm.tolist()),
            )
            for count, block in zip(self._counts, self._steps, strict=True)
        )

    def state_dict(self) -> dict[str, object]:
        """Return plain numbers and lists."""
        return {
            "block_length": self._block_length,
            "counts": list(self._counts),
            "traces": [block.trace.tolist() for block in self._steps],
            "sq_norms": [block.sq_norm.tolist() for block in self._steps],
            "sizes": [[block.micro_batches, block.samples, block.samples_seen] for block in self._steps],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, object]) -> "NoiseBlocks":
        """Build the blocks that ``state_dict`` described."""
        blocks = cls()
        blocks._block_length = state["block_length"]  # type: ignore[assignment]
        blocks._counts = list(state["counts"])  # type: ignore[call-overload]
        rows = zip(state["traces"], state["sq_norms"], state["sizes"], strict=True)  # type: ignore[call-overload]
        blocks._steps = [MeasuredStep(np.array(trace), np.array(sq_norm), *sizes) for trace, sq_norm, sizes in rows]
        return blocks


def _sum(first: MeasuredStep, second: MeasuredStep) -> MeasuredStep:
    return MeasuredStep(
        trace=first.trace + second.trace,
        sq_norm=first.sq_norm + second.sq_norm,
        micro_batches=first.micro_batches + second.micro_batches,
        samples=first.samples + second.samples,
        samples_seen=max(first.samples_seen, second.samples_seen),
    )
