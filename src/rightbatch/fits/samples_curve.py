"""Samples to a target by batch size: draws of the curve from a prior, and their weights after training probes.

Symbols: b global batch size, E(b) samples to the target, B_c critical batch size, a sharpness, b_lo size below which the learning rate is
too hot, delta a smooth discrepancy:

    log E(b) = log E_min + log(1 + (b / B_c)**a) + log(1 + b_lo / b) + delta(log b)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rightbatch.fits.intervals import BoolArray, FloatArray, normal_draws
from rightbatch.fits.lr_scaling import RateLimit
from rightbatch.records.training import ProbeOutcome, TrainingProbe

LrRegime = Literal["tuned", "coupled", "fixed"]
"""How the learning rate goes with the size: tuned at each, coupled by a rule, or the same at all."""

_FEATURES = 24
_UNLUCKY = 0.05
"""Probability that a run fails at a size that can reach the target."""
_LARGEST_SPREAD = 1.0
LEAST_PROGRESS = 0.1
"""Of a rate that is far too hot, over the best rate's."""
_NO_LOW = -100.0
"""Logarithm of a b_lo that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class CurvePrior:
    """Belief about the curve before any training; medians of log-normal laws and the spreads of the logarithms.

    Attributes:
        critical_over_middle: B_c over the middle size, where no gradient noise was measured.
        critical_log_sd: Its spread.
        low_over_middle: b_lo over the middle size; 0: none.
        low_log_sd: Its spread.
        exponent_log_sd: Spread of a around 1.
        discrepancy_sd: Standard deviation of delta.
        correlation_log: Distance in log b over which delta stays alike.
        run_log_sd: Spread of log E between seeds.
        run_log_sd_log_sd: How well that is known.
        heat: Spread between seeds that each unit of log(1 + b_lo / b) adds: too hot a rate makes runs straggle.
        failing_over_critical: Size from which no run reaches the target, over B_c.
        failing_log_sd: Its spread.
    """

    critical_over_middle: float = 10.0
    critical_log_sd: float = math.log(6)
    low_over_middle: float
    low_log_sd: float = math.log(6)
    exponent_log_sd: float = 0.25
    discrepancy_sd: float = 0.15
    correlation_log: float = math.log(3)
    run_log_sd: float = 0.06
    run_log_sd_log_sd: float = 0.7
    heat: float
    failing_over_critical: float = 10.0
    failing_log_sd: float = math.log(5)


PRIORS: dict[LrRegime, CurvePrior] = {
    "tuned": CurvePrior(low_over_middle=0.0, heat=0.0, critical_over_middle=3.0),
    "coupled": CurvePrior(low_over_middle=0.03, heat=0.3, critical_over_middle=3.0),
    "fixed": CurvePrior(low_over_middle=1.0, heat=0.6, critical_over_middle=5.0, failing_over_critical=3.0),
}
"""How each was chosen, and how it does without the data it was chosen on: docs/theory/samples_curve.md."""
HYPERBOLA = CurvePrior(low_over_middle=0.0, heat=0.0, exponent_log_sd=0.0, discrepancy_sd=0.0)
"""E = E_min (1 + b / B_c) and nothing else: what is believed of a curve that no training has tested."""


@dataclass(frozen=True)
class RateDraws:
    """Draws of the best learning rate over the one that the rule gives a size: one row a draw."""

    log_best: FloatArray
    """At ``size``."""
    slope: FloatArray
    """How much it grows with the logarithm of the size."""
    size: float
    tried: tuple[float, ...] = ()
    """Rates over the rule's that trained without failing, by which the draws are weighed; none before that."""
    branches: tuple[tuple[int, float, bool], ...] = ()
    """Size, rate over the rule's, and whether it failed, of everything that trained."""
    limit: RateLimit | None = None
    """What no rate is raised above."""

    def log_best_at(self, sizes: FloatArray) -> FloatArray:
        """Log of the best rate over the rule's, shape (draws, sizes)."""
        return np.asarray(self.log_best[:, None] + self.slope[:, None] * np.log(np.asarray(sizes) / self.size)[None, :])

    def log_cost(self, sizes: FloatArray, lr_over_rule: FloatArray) -> FloatArray:
        """Log of the samples that a learning rate at each size costs over the best rate, shape (draws, sizes).

        On a quadratic loss a step of x times the best rate makes 2 x - x**2 of the best progress, and none from x = 2 on.

        Source:
            McCandlish et al. 2018, arXiv:1812.06162, equation 2.5.
        """
        over_best = np.asarray(lr_over_rule)[None, :] / np.exp(self.log_best_at(sizes))
        return np.asarray(-np.log(np.maximum(over_best * (2 - over_best), LEAST_PROGRESS)))


@dataclass(frozen=True)
class CurveDraws:
    """Draws of the curve: one row a draw."""

    log_critical: FloatArray
    exponent: FloatArray
    log_low: FloatArray
    frequencies: FloatArray
    phases: FloatArray
    discrepancy_sd: float
    run_log_sd: FloatArray
    heat: float
    log_failing: FloatArray
    level_normal: FloatArray
    """Standard normal, one a draw, from which the level E_min is drawn once probes tell it."""
    rates: RateDraws | None = None
    """Draws of the best learning rate; none: the rule's rate is the best."""

    def log_samples(self, sizes: FloatArray) -> FloatArray:
        """Log E(b) - log E_min of each draw, shape (draws, sizes)."""
        log_sizes = np.log(np.asarray(sizes, dtype=np.float64))[None, :]
        rising = np.log1p(np.exp(self.exponent[:, None] * (log_sizes - self.log_critical[:, None])))
        if self.discrepancy_sd == 0:
            return np.asarray(rising + self._too_hot(log_sizes))
        angles = self.frequencies[:, :, None] * log_sizes[:, None, :] + self.phases[:, :, None]
        discrepancy = self.discrepancy_sd * math.sqrt(2 / self.frequencies.shape[1]) * np.cos(angles).sum(axis=1)
        return np.asarray(rising + self._too_hot(log_sizes) + discrepancy)

    def spread(self, sizes: FloatArray) -> FloatArray:
        """Standard deviation of log E(b) between seeds, shape (draws, sizes)."""
        log_sizes = np.log(np.asarray(sizes, dtype=np.float64))[None, :]
        return np.asarray(np.hypot(self.run_log_sd[:, None], self.heat * self._too_hot(log_sizes)))

    def log_straggling(self, sizes: FloatArray) -> FloatArray:
        """How far the logarithm of the mean over seeds lies above the mean of the logarithm, shape (draws, sizes): stragglers count."""
        return np.asarray(np.minimum(self.spread(sizes), _LARGEST_SPREAD) ** 2 / 2)

    def fails(self, sizes: FloatArray) -> BoolArray:
        """Whether no run reaches the target, shape (draws, sizes)."""
        return np.asarray(np.log(np.asarray(sizes, dtype=np.float64))[None, :] > self.log_failing[:, None])

    def log_rate_cost(self, sizes: FloatArray, lr_over_rule: FloatArray) -> FloatArray:
        """Log of the samples that a learning rate at each size costs over the best rate, shape (draws, sizes)."""
        return np.zeros((len(self.log_critical), len(sizes))) if self.rates is None else self.rates.log_cost(sizes, lr_over_rule)

    def rows(self, rows: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> "CurveDraws":
        """Some of the draws, in this order."""
        return replace(
            self,
            log_critical=self.log_critical[rows],
            exponent=self.exponent[rows],
            log_low=self.log_low[rows],
            frequencies=self.frequencies[rows],
            phases=self.phases[rows],
            run_log_sd=self.run_log_sd[rows],
            log_failing=self.log_failing[rows],
            level_normal=self.level_normal[rows],
            rates=None if self.rates is None else replace(self.rates, log_best=self.rates.log_best[rows], slope=self.rates.slope[rows]),
        )

    def _too_hot(self, log_sizes: FloatArray) -> FloatArray:
        return np.asarray(np.log1p(np.exp(self.log_low[:, None] - log_sizes)))


@dataclass(frozen=True)
class CurvePosterior:
    """What probes say of the draws."""

    weights: FloatArray
    """One a draw; they sum to 1."""
    log_level: FloatArray
    """Log E_min of each draw; zero while no probe reached the target."""


def draw_curves(
    prior: CurvePrior,
    *,
    middle: float,
    rng: np.random.Generator,
    n_draws: int,
    critical: FloatArray | None = None,
) -> CurveDraws:
    """Draw curves from the prior.

    Args:
        prior: The belief.
        middle: The size that the rate was tuned at, in samples; where that is not known, the geometric middle of the candidates, each of
            which may be it.
        rng: Source of the draws.
        n_draws: Number of draws.
        critical: Draws of the critical batch size from measured gradient noise, in samples, shape (n_draws,); none takes the prior's.

    Source:
        Random cosine features of a squared-exponential covariance: Rahimi and Recht, NeurIPS 2007.
    """
    normal = [normal_draws(rng, n_draws) for _ in range(6)]
    if critical is not None:
        log_critical = np.log(critical)
    else:
        log_critical = math.log(prior.critical_over_middle * middle) + prior.critical_log_sd * normal[0]
    has_low = prior.low_over_middle > 0
    low = math.log(prior.low_over_middle * middle) + prior.low_log_sd * normal[2] if has_low else np.full(n_draws, _NO_LOW)
    return CurveDraws(
        log_critical=log_critical,
        exponent=np.exp(prior.exponent_log_sd * normal[1]),
        log_low=low,
        frequencies=rng.standard_normal((n_draws, _FEATURES)) / prior.correlation_log,
        phases=rng.uniform(0, 2 * math.pi, (n_draws, _FEATURES)),
        discrepancy_sd=prior.discrepancy_sd,
        run_log_sd=prior.run_log_sd * np.exp(prior.run_log_sd_log_sd * normal[3]),
        heat=prior.heat,
        log_failing=log_critical + math.log(prior.failing_over_critical) + prior.failing_log_sd * normal[4],
        level_normal=normal[5],
    )


def weigh(draws: CurveDraws, probes: Sequence[TrainingProbe]) -> CurvePosterior:
    """Weights of the draws given training probes, by importance sampling.

    A probe that reached the target at b says y = log E_min + log E(b) + normal error, of the draw's spread and its own; with a flat prior
    the level log E_min is integrated out, then drawn. One that was stopped at e samples says that log E > log e. One that failed says
    that the size fails, or that it was unlucky.

    Returns:
        Equal weights without probes.
    """
    log_weight = np.zeros(len(draws.log_critical))
    reached = [probe for probe in probes if probe.outcome is ProbeOutcome.REACHED]
    level = np.zeros_like(log_weight)
    if reached:
        sizes = np.array([probe.global_batch_size for probe in reached], dtype=np.float64)
        errors = np.array([probe.log_error for probe in reached])
        precision = 1 / (draws.spread(sizes) ** 2 + errors**2)
        rates = np.array([probe.lr_over_rule for probe in reached])
        residual = np.log([probe.samples for probe in reached])[None, :] - draws.log_samples(sizes) - draws.log_rate_cost(sizes, rates)
        total = precision.sum(axis=1)
        mean = (precision * residual).sum(axis=1) / total
        log_weight -= 0.5 * (precision * (residual - mean[:, None]) ** 2).sum(axis=1)
        log_weight += 0.5 * np.log(precision).sum(axis=1) - 0.5 * np.log(total)
        log_weight[draws.fails(sizes).any(axis=1)] = -math.inf
        level = mean + draws.level_normal / np.sqrt(total)
    for probe in probes:
        log_weight += _log_likelihood_without_target(draws, probe, level, level_is_known=bool(reached))
    weights = np.exp(log_weight - log_weight.max())
    return CurvePosterior(weights / weights.sum(), level)


def log_probability_above(
    draws: CurveDraws, size: float, log_samples: float, level: FloatArray, *, log_error: float = 0.0, lr_over_rule: float = 1.0
) -> FloatArray:
    """Log probability that a run at ``size`` needs more samples than that, one number a draw."""
    from scipy.special import log_ndtr

    at = np.array([size], dtype=np.float64)
    expected = level + draws.log_samples(at)[:, 0] + draws.log_rate_cost(at, np.array([lr_over_rule]))[:, 0]
    standard = (expected - log_samples) / np.hypot(draws.spread(at)[:, 0], log_error)
    return np.where(draws.fails(at)[:, 0], 0.0, log_ndtr(standard))


def _log_likelihood_without_target(draws: CurveDraws, probe: TrainingProbe, level: FloatArray, *, level_is_known: bool) -> FloatArray:
    if probe.outcome is ProbeOutcome.STOPPED and level_is_known:
        return log_probability_above(
            draws,
            probe.global_batch_size,
            math.log(probe.samples),
            level,
            log_error=probe.log_error,
            lr_over_rule=probe.lr_over_rule,
        )
    if probe.outcome is ProbeOutcome.FAILED:
        size, rate = np.array([probe.global_batch_size], dtype=np.float64), np.array([probe.lr_over_rule])
        fails = draws.fails(size)[:, 0] | (draws.log_rate_cost(size, rate)[:, 0] >= -math.log(LEAST_PROGRESS))
        return np.where(fails, 0.0, math.log(_UNLUCKY))
    return np.zeros_like(level)
