"""Gradient noise of a running training: the simple noise scale of the run, of its latest part and of each layer, with intervals.

Symbols: G = |true gradient|**2, S = tr Sigma (trace of one sample's gradient covariance), B = S / G in samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.fits.intervals import FloatArray, student_quantile
from rightbatch.fits.noise_scale import NoiseMoments, fieller
from rightbatch.records.estimates import Estimate, NoiseScale, NoiseSnapshot, Status
from rightbatch.records.measurements import NoiseStream
from rightbatch.units import format_number

FEWEST_BLOCKS = 8
"""An interval rests on at least so many blocks; fewer give none worth the name."""
_MOST_BLOCKS = 32
"""Blocks are merged down to so many before their correlation is looked at: longer blocks are less correlated."""
_STEPS_BEHIND_WEIGHT = 16
"""The weight of a step in the run's average rests on so many steps: on fewer, its noise would bias the average."""


@dataclass(frozen=True)
class StepWeights:
    """What is known of one optimizer step besides norms: micro-batch k of m_k samples entered the sum with weight w_k.

    Attributes:
        total: Sum of w_k.
        squares: Sum of w_k**2.
        squares_per_sample: Sum of w_k**2 / m_k.
    """

    total: float
    squares: float
    squares_per_sample: float


def step_moments(
    sq_norm_sums: FloatArray, sq_norms_of_sum: FloatArray, weights: StepWeights, *, dataset_size: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Unbiased S and G of one optimizer step, from the gradients h_k = w_k g_k of its micro-batches.

    With Q = sum |h_k|**2 and X = |sum h_k|**2, samples drawn without replacement from D, and C = G - S / D the expected product of
    two micro-batches' mean gradients,

        E Q = C sum w**2 + S sum w**2 / m,   E X = C (sum w)**2 + S sum w**2 / m,

    are two equations for S and C. With equal weights and sizes they give the formulas of McCandlish et al.

    Args:
        sq_norm_sums: Q, one number a layer.
        sq_norms_of_sum: X, one number a layer.
        weights: Of at least two micro-batches.
        dataset_size: D; none for data that are not repeated.

    Returns:
        S and G, one number a layer each.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1; finite population: Cochran, Sampling Techniques (1977), section 2.6.
    """
    product = (sq_norms_of_sum - sq_norm_sums) / (weights.total**2 - weights.squares)
    trace = (sq_norm_sums - product * weights.squares) / weights.squares_per_sample
    return trace, product if dataset_size is None else product + trace / dataset_size


def fit_noise_stream(stream: NoiseStream) -> NoiseScale:
    """Simple noise scale of a run: the average along it that the trade-off law asks for, and the noise scale of each part.

    As in ``fit_noise_scale``: B = sum w_t S_t / sum w_t G_t with w_t = 1 / (b G_t + S_t), b the run's batch size, a ratio of sums.
    Covariances come from the spread between blocks of steps, merged in pairs while neighbours are positively correlated and sixteen are
    left, so that blocks are longer than the autocorrelation. Drift along the run counts as spread: the interval is on the safe side
    for the average of the run so far, and right for the long-run average of a stationary one.

    Returns:
        Fieller's interval with the statuses of ``fieller``; ``INDETERMINATE`` with a value but no interval below eight blocks;
        ``NO_GRADIENT``, ``NON_FINITE`` when there was nothing else. The snapshots are parts of at least eight blocks; the last is the
        most recent.

    Source:
        McCandlish et al. 2018, appendix D.1; batch means: Flegal and Jones, Annals of Statistics 38, 2010; Fieller 1954.
    """
    blocks = _Blocks.of(stream)
    n = sum(block.samples for block in stream.blocks)
    estimate = _without_steps(stream) if blocks is None else _ratio(blocks.weighted(), n, merge=True)
    snapshots = () if blocks is None else tuple(_snapshot(stream, part) for part in _parts(len(stream.blocks)))
    return NoiseScale(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n=n,
        status=estimate.status,
        snapshots=snapshots,
        pilot_samples=stream.samples_seen,
        remarks=tuple(_remarks(stream, estimate)),
    )


def fit_layers(stream: NoiseStream) -> dict[str, Estimate]:
    """Simple noise scale of each layer's gradient over the run, with the weights of the whole gradient.

    Returns:
        Layer name to estimate, in the order of the model; the statuses are those of ``fit_noise_stream``.
    """
    n = sum(block.samples for block in stream.blocks)
    whole = _Blocks.of(stream)
    if whole is None:
        return dict.fromkeys(stream.layers, _without_steps(stream))
    weights = whole.step_weights()
    layers = enumerate(stream.layers)
    return {name: _ratio(_Blocks.of_layers(stream, slice(at, at + 1)).times(weights), n, merge=True) for at, name in layers}


@dataclass(frozen=True)
class _Blocks:
    """Sums over blocks of steps: one row a block."""

    trace: FloatArray
    sq_norm: FloatArray
    steps: FloatArray
    batch_size: float

    @classmethod
    def of(cls, stream: NoiseStream) -> "_Blocks | None":
        return cls.of_layers(stream, slice(None)) if stream.blocks else None

    @classmethod
    def of_layers(cls, stream: NoiseStream, layers: slice) -> "_Blocks":
        steps = np.array([block.steps for block in stream.blocks], dtype=np.float64)
        return cls(
            trace=np.array([sum(block.trace_sums[layers]) for block in stream.blocks]),
            sq_norm=np.array([sum(block.sq_norm_sums[layers]) for block in stream.blocks]),
            steps=steps,
            batch_size=sum(block.samples for block in stream.blocks) / float(steps.sum()),
        )

    def step_weights(self) -> FloatArray:
        """Weight of each block's steps, 1 / (b max(G, 0) + S), from means over at least 16 steps; equal ones where there is no noise."""
        together = max(1, int(np.ceil(_STEPS_BEHIND_WEIGHT / self.steps[0])))
        starts = np.arange(0, max(len(self.steps) - together + 1, 1), together)
        trace, sq_norm, steps = (np.add.reduceat(a, starts) for a in (self.trace, self.sq_norm, self.steps))
        cost = (self.batch_size * np.maximum(sq_norm, 0.0) + np.maximum(trace, 0.0)) / steps
        if not (cost > 0).all():
            return np.ones(len(self.steps))
        return np.repeat(1 / cost, np.diff(np.append(starts, len(self.steps))))

    def times(self, weights: FloatArray) -> "_Blocks":
        return _Blocks(self.trace * weights, self.sq_norm * weights, self.steps, self.batch_size)

    def weighted(self) -> "_Blocks":
        return self.times(self.step_weights())

    def merged(self) -> "_Blocks":
        """Neighbours added in pairs."""
        starts = np.arange(0, len(self.steps), 2)
        trace, sq_norm, steps = (np.add.reduceat(a, starts) for a in (self.trace, self.sq_norm, self.steps))
        return _Blocks(trace, sq_norm, steps, self.batch_size)

    def part(self, where: slice) -> "_Blocks":
        return _Blocks(self.trace[where], self.sq_norm[where], self.steps[where], self.batch_size)

    def deviations(self) -> tuple[FloatArray, FloatArray]:
        """Each block's S and G less its share, by steps, of all blocks'."""
        share = self.steps / self.steps.sum()
        return self.trace - share * self.trace.sum(), self.sq_norm - share * self.sq_norm.sum()

    def neighbours_correlation(self) -> float:
        """Lag-one autocorrelation of S - B G between blocks."""
        trace, sq_norm = self.deviations()
        ratio = self.trace.sum() / self.sq_norm.sum() if self.sq_norm.sum() > 0 else 0.0
        residual = trace - ratio * sq_norm
        spread = float(residual @ residual)
        return float(residual[1:] @ residual[:-1]) / spread if spread > 0 else 0.0

    def moments(self) -> NoiseMoments:
        """Sums and the covariances of sums that the spread between blocks implies."""
        trace, sq_norm = self.deviations()
        count = len(self.steps)
        scale = count / (count - 1)
        return NoiseMoments(
            trace=float(self.trace.sum()),
            sq_norm=float(self.sq_norm.sum()),
            var_trace=scale * float(trace @ trace),
            cov=scale * float(trace @ sq_norm),
            var_sq_norm=scale * float(sq_norm @ sq_norm),
            dof=count - 1.0,
        )


def _ratio(blocks: _Blocks, n: int, *, merge: bool) -> Estimate:
    """S / G over all blocks with its interval, of blocks as long as their correlation asks for."""
    trace, sq_norm = float(blocks.trace.sum()), float(blocks.sq_norm.sum())
    if not blocks.trace.any() and not blocks.sq_norm.any():
        return Estimate(value=None, low=None, high=None, n=n, status=Status.NO_GRADIENT)
    if len(blocks.steps) < FEWEST_BLOCKS:
        return Estimate(value=trace / sq_norm if sq_norm > 0 else None, low=None, high=None, n=n, status=Status.INDETERMINATE)
    while merge and len(blocks.steps) >= 2 * FEWEST_BLOCKS:
        if len(blocks.steps) <= _MOST_BLOCKS and blocks.neighbours_correlation() <= 0:
            break
        blocks = blocks.merged()
    return fieller(blocks.moments(), n)


def _parts(count: int) -> list[slice]:
    """Eight blocks or more each; all blocks together where there are fewer."""
    starts = [*range(0, count - FEWEST_BLOCKS + 1, FEWEST_BLOCKS)] or [0]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


def _snapshot(stream: NoiseStream, part: slice) -> NoiseSnapshot:
    sums = _Blocks.of_layers(stream.model_copy(update={"blocks": stream.blocks[part]}), slice(None))
    blocks = stream.blocks[part]
    samples, micro_batches = sum(b.samples for b in blocks), sum(b.micro_batches for b in blocks)
    means = sums.times(np.full(len(blocks), 1 / sums.steps.sum()))
    return NoiseSnapshot(
        samples_seen=blocks[-1].samples_seen,
        noise_scale=_ratio(sums, samples, merge=False),
        grad_sq_norm=_mean(means.sq_norm, means.deviations()[1], samples),
        grad_noise_trace=_mean(means.trace, means.deviations()[0], samples),
        micro_batch_size=max(1, round(samples / micro_batches)),
        micro_batch_count=micro_batches,
    )


def _mean(parts: FloatArray, deviations: FloatArray, n: int) -> Estimate:
    """A mean with its Student interval; without an interval from too few blocks."""
    value, count = float(parts.sum()), len(parts)
    if count < FEWEST_BLOCKS:
        return Estimate(value=value, low=None, high=None, n=n, status=Status.INDETERMINATE)
    half_width = student_quantile(count - 1) * float(np.sqrt(count / (count - 1) * (deviations @ deviations)))
    return Estimate(value=value, low=value - half_width, high=value + half_width, n=n)


def _without_steps(stream: NoiseStream) -> Estimate:
    status = Status.NON_FINITE if stream.non_finite_steps else Status.INDETERMINATE
    return Estimate(value=None, low=None, high=None, n=0, status=status)


def _remarks(stream: NoiseStream, estimate: Estimate) -> Sequence[str]:
    steps = sum(block.steps for block in stream.blocks)
    remarks = []
    if estimate.status is Status.AT_LEAST and estimate.low is not None:
        remarks.append(f"The noise scale is at least {format_number(estimate.low)}: {steps} measured steps do not bound it from above.")
    if estimate.status is Status.INDETERMINATE and steps:
        remarks.append(f"{steps} measured steps do not tell signal from noise: at least {max(4 * steps, FEWEST_BLOCKS)} are needed.")
    if estimate.status is Status.NO_GRADIENT:
        remarks.append("Every gradient is zero: check that the loss depends on the parameters.")
    if stream.single_steps:
        remarks.append(
            f"{stream.single_steps} measured steps had one micro-batch only, which says nothing about noise: accumulate two or more, or "
            "take the step's parts from NoiseMonitor.parts."
        )
    if stream.non_finite_steps:
        remarks.append(f"{stream.non_finite_steps} measured steps were left out because a gradient was not finite.")
    if stream.dropped_steps:
        remarks.append(f"{stream.dropped_steps} measured steps were left out because gradients were cleared without an optimizer step.")
    if stream.inconsistent_steps:
        remarks.append(
            f"{stream.inconsistent_steps} measured steps were left out because gradients held more than their micro-batches': clear "
            "gradients before the first one of a step, and change them only after the last one."
        )
    if stream.batch_norm and stream.blocks:
        size = round(sum(b.samples for b in stream.blocks) / sum(b.micro_batches for b in stream.blocks))
        remarks.append(f"Batch normalisation couples samples: the noise scale is for normalisation over {size} samples at a time.")
    return remarks
