"""The hyperbola through tuned training at several sizes, with the interval of its critical batch size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.fits.intervals import FloatArray, student_quantile
from rightbatch.records.estimates import Estimate, Status

_GRID = 4001
_BEYOND = 100.0
"""The critical size is looked for from the smallest size over this to the largest times this."""
UNKNOWN = Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE)


@dataclass(frozen=True)
class Hyperbola:
    """E(b) = E_min (1 + b / B_crit) through the sizes.

    Attributes:
        critical: B_crit with its 95 % interval, in samples.
        fewest_samples: E_min; none where samples grow at least in proportion to the size, which no hyperbola does.
        error: Root of the mean squared distance of log E from the hyperbola.
    """

    critical: Estimate
    fewest_samples: float | None
    error: float


def pooled_log_variance(runs: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Variance of the logarithm between seeds, the same at all sizes, and its degrees of freedom; (0, 0) where no size has two seeds."""
    logs = [np.log(np.asarray(samples, dtype=np.float64)) for samples in runs if len(samples) > 1]
    degrees = sum(len(values) - 1 for values in logs)
    if degrees == 0:
        return 0.0, 0
    return float(sum(((values - values.mean()) ** 2).sum() for values in logs)) / degrees, degrees


def fit_hyperbola(sizes: Sequence[int], runs: Sequence[Sequence[float]]) -> Hyperbola | None:
    """Fit (S / S_min - 1)(E / E_min - 1) = 1: least squares of log E over a grid of log B_crit.

    The interval holds every B whose sum of squares exceeds the least by no more than t**2 s**2. s**2 is the variance of a size's mean: that
    of the residuals, with n - 2 degrees of freedom, or that between seeds over their number, whichever is larger. The residuals see what
    seeds do not: rates a factor of two apart leave each size somewhat above its own optimum.

    Args:
        sizes: Global batch sizes, ascending.
        runs: Samples to the target at each, one a seed.

    Returns:
        None with fewer than two sizes; without an interval where neither residuals nor seeds tell a variance.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.11; Seber and Wild, Nonlinear Regression (1989), section 5.3.
    """
    if len(sizes) < 2:
        return None
    b = np.asarray(sizes, dtype=np.float64)
    log_samples = np.array([float(np.log(np.asarray(samples, dtype=np.float64)).mean()) for samples in runs])
    grid = np.geomspace(b.min() / _BEYOND, b.max() * _BEYOND, _GRID)
    levels = log_samples[None, :] - np.log1p(b[None, :] / grid[:, None])
    squares = ((levels - levels.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    at = int(squares.argmin())
    within = _within(squares, float(squares[at]), len(sizes), runs)
    return Hyperbola(
        critical=_critical(grid, at, within, n=sum(len(samples) for samples in runs)),
        fewest_samples=float(np.exp(levels[at].mean())) if at > 0 else None,
        error=math.sqrt(float(squares[at]) / len(sizes)),
    )


def _within(squares: FloatArray, least: float, size_count: int, runs: Sequence[Sequence[float]]) -> FloatArray | None:
    """Indices of the grid inside the interval; none where no variance is known."""
    between, degrees = pooled_log_variance(runs)
    seeds = float(np.mean([len(samples) for samples in runs]))
    of_residuals = (least / (size_count - 2), size_count - 2) if size_count > 2 else (0.0, 0)
    variance, freedom = max(of_residuals, (between / seeds, degrees))
    if freedom == 0:
        return None
    return np.flatnonzero(squares <= least + student_quantile(freedom) ** 2 * variance).astype(np.float64)


def _critical(grid: FloatArray, at: int, within: FloatArray | None, *, n: int) -> Estimate:
    value = float(grid[at]) if 0 < at < len(grid) - 1 else None
    if within is None:
        return Estimate(value=value, low=None, high=None, n=n, status=Status.INDETERMINATE if value is None else Status.OK)
    first, last = int(within[0]), int(within[-1])
    is_open = last == len(grid) - 1
    low = 0.0 if first == 0 else float(grid[first])
    if first == 0 and (is_open or at == 0):
        return Estimate(value=value, low=None, high=None, n=n, status=Status.INDETERMINATE)
    return Estimate(
        value=value, low=low, high=None if is_open else float(grid[last]), n=n, status=Status.AT_LEAST if is_open else Status.OK
    )
