"""Gradient noise: the simple noise scale of one snapshot and of a run, each with a Fieller interval.

Symbols: G = |true gradient|**2, S = tr Sigma (trace of one sample's gradient covariance), B = S / G in samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rightbatch.fits.intervals import FloatArray, student_quantile
from rightbatch.records.estimates import Estimate, NoiseScale, NoiseSnapshot, Status
from rightbatch.records.gradient_norms import GradientNorms
from rightbatch.records.measurements import GradientNoiseMeasurements, NoiseProblem
from rightbatch.units import format_number

DECIDED_FACTOR = 2.4
"""A noise scale wrong by this factor costs at most 5 % of time (docs/theory/tradeoff.md)."""

_PROBLEM_STATUS = {
    NoiseProblem.NON_FINITE_LOSS: Status.NON_FINITE,
    NoiseProblem.ZERO_GRADIENT: Status.NO_GRADIENT,
    NoiseProblem.DATASET_TOO_SMALL: Status.INDETERMINATE,
    NoiseProblem.OUT_OF_MEMORY: Status.INDETERMINATE,
}
_REMEDY = {
    NoiseProblem.NON_FINITE_LOSS: "The loss or a gradient is not finite: lower the learning rate, or check the data and the precision.",
    NoiseProblem.ZERO_GRADIENT: "Every gradient is zero: check that parameters require gradients and that the loss depends on them.",
    NoiseProblem.DATASET_TOO_SMALL: "The dataset is too small for two micro-batches of gradients: give more training samples.",
    NoiseProblem.OUT_OF_MEMORY: "The gradient sums do not fit beside the model: free memory or raise --limit.",
}


GhostVerdict = Literal["agree", "differ", "unknown"]


@dataclass(frozen=True)
class NoiseMoments:
    """Unbiased estimates of S = tr Sigma and G = |gradient|**2, and their jackknife covariances."""

    trace: float
    sq_norm: float
    var_trace: float
    cov: float
    var_sq_norm: float
    dof: float
    """Degrees of freedom of the covariances."""


def fit_snapshot(norms: GradientNorms) -> NoiseSnapshot:
    """Simple noise scale at one set of frozen parameters.

    With K micro-batches of m_k samples drawn without replacement from D, N = sum m_k, their weighted mean square norm
    x = sum m_k |g_k|**2 / N, and the square norm X of their weighted mean:

        S = N / (K - 1) (x - X),   G = X - S / N + S / D,   B = S / G.

    This is the weighted regression of square norms on one over the sample count, through (m_k, |g_k|**2) and (N, X).

    Returns:
        Estimates with 95 % intervals: Student intervals for S and G, Fieller's for B. ``AT_LEAST`` when the interval is a half-line,
        ``INDETERMINATE`` when it says nothing or there are fewer than two blocks, ``NO_GRADIENT`` when every gradient is zero.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, for equal sizes; unequal ones: the analysis of variance of one random
        factor, Searle, Casella and McCulloch, Variance Components (1992), section 3.6; finite population: Cochran, Sampling Techniques
        (1977), section 2.6;
        jackknife with unequal groups: Busing, Meijer and van der Leeden, Statistics and Computing 9, 1999, equations 9 and 10.
    """
    n = sum(samples_by_block(norms))
    if not any(norms.block_sq_norm_sums):
        nothing = Estimate(value=None, low=None, high=None, n=n, status=Status.NO_GRADIENT)
        return _snapshot(norms, nothing, nothing, nothing)
    moments = noise_moments(norms)
    if moments is None:
        nothing = Estimate(value=None, low=None, high=None, n=n, status=Status.INDETERMINATE)
        return _snapshot(norms, nothing, nothing, nothing)
    quantile = student_quantile(moments.dof)
    sq_norm = _symmetric(moments.sq_norm, quantile * math.sqrt(moments.var_sq_norm), n)
    trace = _symmetric(moments.trace, quantile * math.sqrt(moments.var_trace), n)
    return _snapshot(norms, fieller(moments, n), sq_norm, trace)


def is_decided(norms: GradientNorms, *, factor: float = DECIDED_FACTOR) -> bool:
    """Whether the interval of the noise scale lies within ``factor`` of its value on both sides."""
    estimate = fit_snapshot(norms).noise_scale
    if estimate.status is not Status.OK or estimate.value is None or estimate.low is None or estimate.high is None:
        return False
    return estimate.high <= factor * estimate.value and estimate.value <= factor * estimate.low


def fit_noise_scale(measurements: GradientNoiseMeasurements, later: GradientNorms | None = None) -> NoiseScale:
    """Simple noise scale of the run so far: the average over its snapshots that the trade-off law asks for.

        B = sum w_t B_t / sum w_t,   w_t = dt_t / (1 + B_t / b)

    with dt by the trapezoid rule in samples seen and b the pilot's batch size. Because w_t B_t = dt_t b S_t / (b G_t + S_t) and
    w_t = dt_t b G_t / (b G_t + S_t), it is a ratio of sums in which a negative estimate of G does no harm. The interval is Fieller's
    for the two sums with the denominators b G_t + S_t held fixed, and Satterthwaite's degrees of freedom.

    Args:
        measurements: Snapshots at initialisation and along the pilot.
        later: A snapshot further along another training of the same workload; taken in where the pilot did not come so far.

    Returns:
        The estimate; a ``problem`` that left nothing to estimate from gives its status and the remedy as a remark.

    Source:
        McCandlish et al. 2018, appendix D.1; Fieller 1954; Satterthwaite 1946.
    """
    seen = measurements.snapshots
    if later is not None and later.samples_seen > measurements.pilot_samples:
        seen = (*seen, later)
    snapshots = tuple(fit_snapshot(norms) for norms in seen)
    n = sum(sum(samples_by_block(norms)) for norms in seen)
    usable = [(norms, moments) for norms in seen if (moments := noise_moments(norms)) is not None]
    problem = measurements.problem
    remarks = [_REMEDY[problem]] if problem is not None else []
    if measurements.remark:
        remarks.append(measurements.remark)
    estimate = Estimate(value=None, low=None, high=None, n=n, status=_status_without(problem, snapshots))
    if usable and problem not in (NoiseProblem.NON_FINITE_LOSS, NoiseProblem.ZERO_GRADIENT):
        weights = _trapezoid([norms.samples_seen for norms, _ in usable])
        combined = _combine([moments for _, moments in usable], weights, measurements.pilot_batch_size)
        estimate = fieller(combined, n)
        remarks += _remarks(estimate, measurements)
    return NoiseScale(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        n=n,
        status=estimate.status,
        snapshots=snapshots,
        pilot_samples=max(measurements.pilot_samples, seen[-1].samples_seen if seen else 0),
        remarks=tuple(remarks),
    )


def samples_by_block(norms: GradientNorms) -> tuple[int, ...]:
    """Samples in each block of micro-batches."""
    return norms.block_sample_counts or tuple(count * norms.micro_batch_size for count in norms.block_counts)


def noise_moments(norms: GradientNorms) -> NoiseMoments | None:
    """S and G with leave-one-block-out covariances; none with fewer than two blocks or when every gradient is zero.

    The population is finite: the variance of G falls by 1 - N / D, to nil when all samples are drawn, and that of S by
    1 - (K - 1) / (D - 1), since S is the mean over K - 1 of the D - 1 contrasts whose mean the population's is.
    """
    counts = np.asarray(norms.block_counts, dtype=np.float64)
    samples = np.asarray(samples_by_block(norms), dtype=np.float64)
    sums = np.asarray(norms.block_sq_norm_sums, dtype=np.float64)
    gram = np.asarray(norms.block_gram, dtype=np.float64)
    remaining = counts.sum() - counts
    if len(counts) < 2 or remaining.min() < 2 or not sums.any():
        return None
    whole = _trace_and_sq_norm(norms, counts.sum(), samples.sum(), sums.sum(), gram.sum())
    gram_without = gram.sum() - 2 * gram.sum(axis=1) + np.diag(gram)
    without = _trace_and_sq_norm(norms, remaining, samples.sum() - samples, sums.sum() - sums, gram_without)
    ratio = samples.sum() / samples
    pseudo = ratio * whole[:, None] - (ratio - 1) * without
    residual = pseudo - (pseudo / ratio).sum(axis=1, keepdims=True)
    covariance = (residual / (ratio - 1)) @ residual.T / len(counts)
    samples_left, contrasts_left = _finite_population(norms, counts.sum(), samples.sum())
    covariance *= [[contrasts_left, samples_left], [samples_left, samples_left]]
    return NoiseMoments(
        float(whole[0]), float(whole[1]), float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]), len(counts) - 1.0
    )


def compare_ghosts(norms: GradientNorms, half_size: GradientNorms) -> GhostVerdict:
    """Whether two micro-batch sizes at the same parameters give the same tr Sigma and the same squared norm of the gradient.

    Without coupling a micro-batch's gradient is a mean of its samples' gradients: both sizes estimate the same two numbers. Each is
    compared by a t-test at 2.5 %, so that both together err in at most 5 % of cases.

    Args:
        norms: Micro-batches of the usual size.
        half_size: Micro-batches of another size at the same parameters.

    Returns:
        ``unknown`` when one of them says nothing.

    Source:
        Welch 1947, Biometrika 34, 28-35, with the smaller number of degrees of freedom; Bonferroni's inequality.
    """
    first, second = noise_moments(norms), noise_moments(half_size)
    if first is None or second is None:
        return "unknown"
    quantile = student_quantile(min(first.dof, second.dof), 0.025)
    trace_error = math.sqrt(first.var_trace + second.var_trace)
    sq_norm_error = math.sqrt(first.var_sq_norm + second.var_sq_norm)
    agree = abs(first.trace - second.trace) <= quantile * trace_error and abs(first.sq_norm - second.sq_norm) <= quantile * sq_norm_error
    return "agree" if agree else "differ"


def fieller(moments: NoiseMoments, n: int) -> Estimate:
    """Ratio S / G with Fieller's 95 % set {r >= 0 : (S - r G)**2 <= q**2 (v_SS - 2 r v_SG + r**2 v_GG)}.

    Args:
        moments: S, G and their covariances.
        n: Observations behind them.

    Returns:
        A bounded interval: ``OK``. A half-line: ``AT_LEAST`` with ``low``. Anything else: ``INDETERMINATE``.

    Source:
        Fieller 1954, J. R. Stat. Soc. B 16, 175-185.
    """
    q2 = student_quantile(moments.dof) ** 2
    a = moments.sq_norm**2 - q2 * moments.var_sq_norm
    half_b = moments.trace * moments.sq_norm - q2 * moments.cov
    c = moments.trace**2 - q2 * moments.var_trace
    discriminant = half_b**2 - a * c
    value = moments.trace / moments.sq_norm if moments.sq_norm > 0 else None
    if a > 0 and value is not None:
        root = math.sqrt(max(discriminant, 0.0))
        low, high = max((half_b - root) / a, 0.0), (half_b + root) / a
        return Estimate(value=value, low=min(low, value), high=max(high, value), n=n)
    if a < 0 and c > 0 and discriminant > 0:
        low = (half_b - math.sqrt(discriminant)) / a
        return Estimate(value=value, low=low, high=None, n=n, status=Status.AT_LEAST)
    return Estimate(value=None, low=None, high=None, n=n, status=Status.INDETERMINATE)


def _trace_and_sq_norm(
    norms: GradientNorms, count: FloatArray, samples: FloatArray, sq_norm_sum: FloatArray, gram_sum: FloatArray
) -> FloatArray:
    """Rows S and G for ``count`` micro-batches of so many samples, from their sum of square norms and the square norm of their sum."""
    weight = samples / norms.micro_batch_size
    mean_sq_norm, sq_norm_of_mean = sq_norm_sum / weight, gram_sum / weight**2
    trace = samples / (count - 1) * (mean_sq_norm - sq_norm_of_mean)
    sq_norm = sq_norm_of_mean - trace / samples + trace / norms.dataset_size
    return np.array([trace, sq_norm])


def _finite_population(norms: GradientNorms, count: float, samples: float) -> tuple[float, float]:
    """Share of the population's samples that were not drawn, and of its contrasts that S does not rest on."""
    contrasts = max(norms.dataset_size - 1, 1)
    return max(1 - samples / norms.dataset_size, 0.0), max(1 - (count - 1) / contrasts, 0.0)


def _snapshot(norms: GradientNorms, noise_scale: Estimate, sq_norm: Estimate, trace: Estimate) -> NoiseSnapshot:
    return NoiseSnapshot(
        samples_seen=norms.samples_seen,
        noise_scale=noise_scale,
        grad_sq_norm=sq_norm,
        grad_noise_trace=trace,
        micro_batch_size=norms.micro_batch_size,
        micro_batch_count=sum(norms.block_counts),
    )


def _symmetric(value: float, half_width: float, n: int) -> Estimate:
    return Estimate(value=value, low=value - half_width, high=value + half_width, n=n)


def _status_without(problem: NoiseProblem | None, snapshots: Sequence[NoiseSnapshot]) -> Status:
    if problem is not None:
        return _PROBLEM_STATUS[problem]
    if snapshots and all(snapshot.noise_scale.status is Status.NO_GRADIENT for snapshot in snapshots):
        return Status.NO_GRADIENT
    return Status.INDETERMINATE


def _trapezoid(samples_seen: Sequence[int]) -> FloatArray:
    """Share of the run that each snapshot stands for, by the trapezoid rule; equal shares when none lies apart."""
    at = np.asarray(samples_seen, dtype=np.float64)
    if at.max() == at.min():
        return np.full(len(at), 1 / len(at))
    order = np.argsort(at, kind="stable")
    gaps = np.diff(at[order])
    shares = np.empty(len(at))
    shares[order] = (np.append(gaps, 0.0) + np.insert(gaps, 0, 0.0)) / 2
    return np.asarray(shares / shares.sum())


def _combine(parts: Sequence[NoiseMoments], shares: FloatArray, batch_size: int) -> NoiseMoments:
    """Weighted sums of S_t and G_t with weights share_t / (b max(G_t, 0) + S_t), held fixed."""
    weights = shares / np.array([batch_size * max(part.sq_norm, 0.0) + part.trace for part in parts])
    trace = float(weights @ np.array([part.trace for part in parts]))
    sq_norm = float(weights @ np.array([part.sq_norm for part in parts]))
    var_trace, cov, var_sq_norm = (weights**2 @ np.array([[p.var_trace, p.cov, p.var_sq_norm] for p in parts])).tolist()
    ratio = max(trace, 0.0) / sq_norm if sq_norm > 0 else 0.0
    spread = weights**2 * np.array([p.var_trace - 2 * ratio * p.cov + ratio**2 * p.var_sq_norm for p in parts])
    if sq_norm <= 0:
        spread = weights**2 * np.array([p.var_sq_norm for p in parts])
    dof = np.array([part.dof for part in parts])
    total = float(spread.sum())
    combined_dof = total**2 / float((spread**2 / dof).sum()) if total > 0 else float(dof.sum())
    return NoiseMoments(trace, sq_norm, var_trace, cov, var_sq_norm, combined_dof)


def _remarks(estimate: Estimate, measurements: GradientNoiseMeasurements) -> list[str]:
    remarks = []
    if estimate.status is Status.AT_LEAST and estimate.low is not None:
        remarks.append(
            f"The noise scale is at least {format_number(estimate.low)}: the {estimate.n} gradients so far do not bound it from above; "
            f"about {format_number(max(4.0 * estimate.n, 2 * estimate.low))} would."
        )
    if estimate.status is Status.INDETERMINATE:
        remarks.append(
            f"The signal is below the noise after {estimate.n} gradients: at least {4 * estimate.n} are needed; give a larger --budget."
        )
    if measurements.batch_norm:
        size = measurements.snapshots[0].micro_batch_size
        over = "1 sample" if size == 1 else f"{size} samples"
        remarks.append(f"Batch normalisation couples samples: the noise scale is for normalisation over {over} at a time.")
        if measurements.half_size is not None:
            remarks += filter(None, [_ghost_remark(measurements.snapshots[-1], measurements.half_size)])
    if measurements.pilot_samples == 0:
        remarks.append("There was no pilot run: the noise scale at initialisation is usually several times below that of the whole run.")
    return remarks


def _ghost_remark(norms: GradientNorms, half_size: GradientNorms) -> str:
    """Say in one sentence what the comparison showed; empty when it showed nothing."""
    verdict = compare_ghosts(norms, half_size)
    usual, half = (_interval_words(fit_snapshot(n).noise_scale) for n in (norms, half_size))
    sizes = f"over {half_size.micro_batch_size} samples instead of {norms.micro_batch_size}"
    if verdict == "agree":
        return f"Normalisation {sizes} gives the same noise within its error ({half} and {usual}): the size hardly matters here."
    if verdict == "differ":
        return f"Normalisation {sizes} gives another noise scale ({half} instead of {usual}): it holds for that micro-batch size only."
    return ""


def _interval_words(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None:
        return "undetermined"
    high = "" if estimate.high is None else format_number(estimate.high)
    return f"{format_number(estimate.value)} [{format_number(estimate.low)}, {high}]"
