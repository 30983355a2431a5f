"""Intervals that several fits share: Student's quantile, a median's interval, the spread behind an interval, stratified normal draws."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rightbatch.records.estimates import Estimate, Status

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

NORMAL_QUANTILE_95 = 1.959963984540054
"""Half-width of a two-sided 95 % normal interval, in standard deviations."""
_BOOTSTRAP_REPEATS = 1000
_FEWEST_RESAMPLED = 5
"""Of fewer values the bootstrap's interval is their range at most, which holds the median of 3 in 75 % of cases, of 4 in 88 %."""


def student_quantile(dof: float, error: float = 0.05) -> float:
    """Quantile of Student's t that is exceeded, in absolute value, with probability ``error``."""
    from scipy.special import stdtrit

    return float(stdtrit(dof, 1 - error / 2))


def median_estimate(values: Sequence[float], rng: np.random.Generator) -> Estimate:
    """Median with a 95 % interval over rounds: percentile bootstrap, and below five rounds Student's interval of the mean logarithm.

    Args:
        values: One positive number a round, in any unit.
        rng: Source of the resampling.

    Returns:
        The median; without an interval of one round, ``INDETERMINATE`` without any.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    rounds = np.asarray(values, dtype=np.float64)
    if rounds.size == 0:
        return Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE)
    median = float(np.median(rounds))
    if rounds.size == 1:
        return Estimate(value=median, low=None, high=None, n=1)
    if rounds.size < _FEWEST_RESAMPLED:
        logs = np.log(rounds)
        half_width = student_quantile(rounds.size - 1) * float(logs.std(ddof=1)) / math.sqrt(rounds.size)
        low, high = math.exp(float(logs.mean()) - half_width), math.exp(float(logs.mean()) + half_width)
        return Estimate(value=median, low=min(low, median), high=max(high, median), n=rounds.size)
    resampled = rounds[rng.integers(rounds.size, size=(_BOOTSTRAP_REPEATS, rounds.size))]
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return Estimate(value=median, low=min(float(low), median), high=max(float(high), median), n=rounds.size)


def log_standard_error(estimate: Estimate) -> float:
    """Standard error of log(value) that the 95 % interval implies; 0 without a two-sided positive interval."""
    if estimate.low is None or estimate.high is None or estimate.low <= 0:
        return 0.0
    return math.log(estimate.high / estimate.low) / (2 * NORMAL_QUANTILE_95)


def normal_draws(rng: np.random.Generator, n_draws: int) -> FloatArray:
    """Standard normal draws, one from each of ``n_draws`` equally likely strata, in random order.

    The order is random, the set is not: quantiles of a prior come out the same for every seed (Latin hypercube sampling;
    McKay, Beckman and Conover, Technometrics 21, 1979).
    """
    return rng.permutation(_normal_strata(n_draws))


@lru_cache(maxsize=4)
def _normal_strata(n_draws: int) -> FloatArray:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / n_draws) for i in range(n_draws)])
