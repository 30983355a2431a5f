"""The samples curve of ``fits.samples_curve`` for tuned rates, given every trial of a sweep, with its smooth discrepancy integrated out.

That module weighs draws of whole curves, which suits a few probes. A sweep knows so much that hardly a draw of the discrepancy would agree
with it; but given the other parameters the discrepancy is a Gaussian process, so its part of the likelihood has a closed form.

Symbols: y_i mean of log samples over the n_i seeds of size b_i, f the curve of one draw without its discrepancy, C covariance of y - f:

    C_ij = d**2 exp(-(log b_i - log b_j)**2 / (2 l**2)) + s**2 / n_i [i = j],  d and l of the prior, s the draw's spread between seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rightbatch.fits.hyperbola import UNKNOWN
from rightbatch.fits.intervals import FloatArray
from rightbatch.fits.samples_curve import PRIORS, CurveDraws, draw_curves
from rightbatch.records.estimates import Estimate
from rightbatch.records.sweep import SweepBand
from rightbatch.records.training import ProbeOutcome, TrainingProbe

_PRIOR = PRIORS["tuned"]
_DRAWS = 8192
_BAND_DRAWS = 1024
_BAND_POINTS = 25
_FEWEST_EFFECTIVE = 20.0
"""Draws that the weights must leave, in effect, for quantiles of them to mean anything."""


def robust_curve(probes: Sequence[TrainingProbe], *, middle: int, rng: np.random.Generator) -> tuple[Estimate, tuple[SweepBand, ...]]:
    """Return B_c of the robust curve with its 95 % interval, and the curve with its 90 % band between the sizes that arrived.

    Args:
        probes: Trials at the best rate of each size; where none arrived, one that was stopped.
        middle: Size at which the prior is centred.
        rng: Source of the draws.

    Returns:
        Unknown, and no curve, with fewer than two sizes that arrived, or where hardly a draw describes them.

    Source:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), equations 2.23-2.24 and, for the flat level, 2.43-2.45.
    """
    seen = _Seen.of(probes)
    if seen is None:
        return UNKNOWN, ()
    draws = draw_curves(replace(_PRIOR, discrepancy_sd=0.0), middle=middle, rng=rng, n_draws=_DRAWS)
    log_weight = _Given(draws, seen).log_likelihood + _log_probability_of_stops(draws, seen, probes)
    weights = np.exp(log_weight - log_weight.max())
    weights /= weights.sum()
    effective = 1 / float((weights**2).sum())
    if effective < _FEWEST_EFFECTIVE:
        return UNKNOWN, ()
    kept = draws.rows(rng.choice(_DRAWS, _BAND_DRAWS, p=weights))
    low, median, high = (float(value) for value in np.exp(np.percentile(kept.log_critical, [2.5, 50, 97.5])))
    at = np.geomspace(np.exp(seen.log_sizes[0]), np.exp(seen.log_sizes[-1]), _BAND_POINTS)
    mean, variance = _Given(kept, seen).predict(at)
    curves = np.exp(mean + np.sqrt(variance) * rng.standard_normal((_BAND_DRAWS, 1)))
    ends = np.percentile(curves, [5, 50, 95], axis=0)
    band = tuple(
        SweepBand(global_batch_size=float(size), samples=float(ends[1, i]), low=float(ends[0, i]), high=float(ends[2, i]))
        for i, size in enumerate(at)
    )
    return Estimate(value=median, low=low, high=high, n=round(effective)), band


@dataclass(frozen=True)
class _Seen:
    """What the sizes that arrived showed: shape (sizes,) each.

    Attributes:
        log_sizes: Ascending.
        log_samples: Mean over seeds.
        counts: Seeds.
        scatter: Sum over all seeds of the squared distance of log samples from the mean of their size.
    """

    log_sizes: FloatArray
    log_samples: FloatArray
    counts: FloatArray
    scatter: float

    @classmethod
    def of(cls, probes: Sequence[TrainingProbe]) -> "_Seen | None":
        by_size: dict[int, list[float]] = {}
        for probe in probes:
            if probe.outcome is ProbeOutcome.REACHED:
                by_size.setdefault(probe.global_batch_size, []).append(float(np.log(probe.samples)))
        if len(by_size) < 2:
            return None
        sizes = sorted(by_size)
        return cls(
            log_sizes=np.log(np.array(sizes, dtype=np.float64)),
            log_samples=np.array([np.mean(by_size[size]) for size in sizes]),
            counts=np.array([float(len(by_size[size])) for size in sizes]),
            scatter=float(sum(((np.array(values) - np.mean(values)) ** 2).sum() for values in by_size.values())),
        )


class _Given:
    """The draws given the sizes that arrived: their likelihood, and what they say of other sizes."""

    def __init__(self, draws: CurveDraws, seen: _Seen) -> None:
        self._draws, self._seen = draws, seen
        spread = draws.run_log_sd[:, None] ** 2 / seen.counts[None, :]
        covariance = _smooth(seen.log_sizes, seen.log_sizes)[None] + np.eye(len(seen.counts))[None] * spread[:, :, None]
        self._inverse = np.linalg.inv(covariance)
        self._log_determinant = np.linalg.slogdet(covariance)[1]
        residual = seen.log_samples[None, :] - draws.log_samples(np.exp(seen.log_sizes))
        self._total = self._inverse.sum(axis=(1, 2))
        self._level = np.einsum("dij,dj->d", self._inverse, residual) / self._total
        self._left = residual - self._level[:, None]

    @property
    def log_likelihood(self) -> FloatArray:
        """Of the means, with a flat prior on the level integrated out, and of the scatter between seeds; one number a draw."""
        seen = self._seen
        of_means = np.einsum("di,dij,dj->d", self._left, self._inverse, self._left) + self._log_determinant + np.log(self._total)
        degrees = float((seen.counts - 1).sum())
        log_sd = np.log(self._draws.run_log_sd)
        log_likelihood = -0.5 * of_means - degrees * log_sd - 0.5 * seen.scatter * np.exp(-2 * log_sd)
        return np.where(self._draws.fails(np.exp(seen.log_sizes)).any(axis=1), -np.inf, log_likelihood)

    def predict(self, sizes: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of log samples, averaged over seeds, at other sizes; shape (draws, sizes) each."""
        across = _smooth(np.log(sizes), self._seen.log_sizes)
        gain = np.einsum("si,dij->dsj", across, self._inverse)
        mean = self._draws.log_samples(sizes) + self._level[:, None] + np.einsum("dsj,dj->ds", gain, self._left)
        missing = 1 - gain.sum(axis=2)  # what the unknown level adds
        variance = _PRIOR.discrepancy_sd**2 - np.einsum("dsj,sj->ds", gain, across) + missing**2 / self._total[:, None]
        return np.asarray(mean), np.maximum(variance, 0.0)


def _smooth(first: FloatArray, second: FloatArray) -> FloatArray:
    distance = (first[:, None] - second[None, :]) / _PRIOR.correlation_log
    return np.asarray(_PRIOR.discrepancy_sd**2 * np.exp(-0.5 * distance**2))


def _log_probability_of_stops(draws: CurveDraws, seen: _Seen, probes: Sequence[TrainingProbe]) -> FloatArray:
    """Log probability that sizes which never arrived need more samples than they had, each on its own; one number a draw."""
    from scipy.special import log_ndtr

    stopped = [probe for probe in probes if probe.outcome is ProbeOutcome.STOPPED]
    if not stopped:
        return np.zeros(len(draws.log_critical))
    sizes = np.array([probe.global_batch_size for probe in stopped], dtype=np.float64)
    mean, variance = _Given(draws, seen).predict(sizes)
    log_samples = np.log([probe.samples for probe in stopped])
    standard = (mean - log_samples[None, :]) / np.sqrt(variance + draws.run_log_sd[:, None] ** 2)
    return np.asarray(np.where(draws.fails(sizes), 0.0, log_ndtr(standard)).sum(axis=1))
