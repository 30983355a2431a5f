"""The course of the noise scale along a run, drawn from the snapshots of a pilot or of a finished run.

Symbols: B simple noise scale, x samples seen, X those of the whole run, u = log((x + x0) / (X + x0)) with x0 = X / 100.
"""

import math

import numpy as np

from rightbatch.fits.critical_batch import (
    AT_LEAST_LOG_SD,
    GROWTH_WITH_PILOT_LOG_SD,
    GROWTH_WITH_PILOT_MEDIAN,
    GROWTH_WITHOUT_PILOT_LOG_SD,
    GROWTH_WITHOUT_PILOT_MEDIAN,
)
from rightbatch.fits.intervals import FloatArray, log_standard_error
from rightbatch.records.estimates import Estimate, NoiseScale, Status

CELLS = 48
"""Parts of the run that each have one noise scale."""
_BEGINNING = 0.01
"""x0 over X: the power law starts there."""
_WAVE_SD = 0.6
"""Spread of log B about the power law: on a digits CNN it fell to a fifteenth of its first value before it rose (theory page)."""
_WAVE_LENGTH = 1.0
"""In u: over which the course stays on one side of the power law."""
_MOMENT_LOG_SD = math.log(1.5)
"""How far one moment of one run lies from the course of runs like it: two seeds differed by 1.5 times in the median (theory page)."""
_LEVEL_SD = 20.0
_JITTER = 1e-9


def draw_noise_course(noise: NoiseScale, total_samples: int, rng: np.random.Generator, n_draws: int) -> FloatArray | None:
    """Draw log B(x) = level + slope u + wave(u) given the snapshots: a Gaussian process.

    The slope's prior says what is believed of growth beyond a pilot of x_p samples: B averaged over x in [0, X] is (X / x_p)^slope times
    that over [0, x_p] under a power law, so slope ~ N(log g, sd^2) / log(X / x_p). Snapshots over a whole run leave nothing to the prior.
    A snapshot that is only bounded from below counts with its bound raised by the mean of the half-normal that lies above it.

    Args:
        noise: Of a pilot, or of a finished run; snapshots without a value are left out.
        total_samples: Of the run to forecast, at least 1.
        rng: Source of the draws.
        n_draws: Rows.

    Returns:
        B of each of ``CELLS`` equal parts of the run, by samples seen, shape (n_draws, cells); none when nothing is known of the noise.

    Source:
        Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), sections 2.2 and 2.7 (explicit basis functions).
    """
    seen = [(snapshot.samples_seen, snapshot.noise_scale) for snapshot in noise.snapshots]
    whole = Estimate(value=noise.value, low=noise.low, high=noise.high, n=noise.n, status=noise.status)
    known: list[tuple[float, float, float]] = [(x, *value) for x, estimate in seen if (value := _log_value(estimate)) is not None]
    if not known and (value := _log_value(whole)) is not None:
        known = [(noise.pilot_samples / 2, *value)]
    if not known:
        return None
    at, log_noise, log_sd = (np.array(column) for column in zip(*known, strict=True))
    cells = (np.arange(CELLS) + 0.5) / CELLS
    u = np.log((np.append(at / total_samples, cells) + _BEGINNING) / (1 + _BEGINNING))
    slope, slope_sd = _slope_prior(noise.pilot_samples, total_samples)
    covariance = _LEVEL_SD**2 + slope_sd**2 * np.outer(u, u)
    covariance += _WAVE_SD**2 * np.exp(-0.5 * (np.subtract.outer(u, u) / _WAVE_LENGTH) ** 2)
    n = len(at)
    observed = covariance[:n, :n] + np.diag(log_sd**2 + _MOMENT_LOG_SD**2)
    gain = np.linalg.solve(observed, covariance[:n, n:]).T
    mean = slope * u[n:] + gain @ (log_noise - slope * u[:n])
    posterior = covariance[n:, n:] - gain @ covariance[:n, n:]
    root = np.linalg.cholesky(posterior + _JITTER * _LEVEL_SD**2 * np.eye(CELLS))
    return np.asarray(np.exp(mean[None, :] + rng.standard_normal((n_draws, CELLS)) @ root.T))


def _slope_prior(pilot_samples: int, total_samples: int) -> tuple[float, float]:
    """Mean and standard deviation; a pilot counts as no longer than the run over e, so that growth beyond it stays finite."""
    if pilot_samples > 0:
        reach = max(math.log(total_samples / pilot_samples), 1.0)
        return math.log(GROWTH_WITH_PILOT_MEDIAN) / reach, GROWTH_WITH_PILOT_LOG_SD / reach
    reach = math.log(1 / _BEGINNING)
    return math.log(GROWTH_WITHOUT_PILOT_MEDIAN) / reach, GROWTH_WITHOUT_PILOT_LOG_SD / reach


def _log_value(estimate: Estimate) -> tuple[float, float] | None:
    """Logarithm and its standard error; none when nothing is known."""
    if estimate.status is Status.AT_LEAST and estimate.low is not None and estimate.low > 0:
        half_normal_mean = math.sqrt(2 / math.pi)
        return math.log(estimate.low) + AT_LEAST_LOG_SD * half_normal_mean, AT_LEAST_LOG_SD * math.sqrt(1 - half_normal_mean**2)
    if estimate.status is Status.OK and estimate.value is not None and estimate.value > 0:
        return math.log(estimate.value), log_standard_error(estimate) if estimate.low else AT_LEAST_LOG_SD
    return None
