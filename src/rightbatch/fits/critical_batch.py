"""What is believed of the critical batch size, from gradient noise, from a whole run, and from training at several sizes."""

import math
from dataclasses import dataclass, replace

import numpy as np

from rightbatch.fits.intervals import FloatArray, log_standard_error, normal_draws
from rightbatch.fits.lr_scaling import RateLimit
from rightbatch.fits.samples_curve import HYPERBOLA, PRIORS, CurveDraws, RateDraws, draw_curves, weigh
from rightbatch.records.estimates import Estimate, NoiseScale, Status
from rightbatch.records.training import BranchMeasurements, ProbeOutcome

CALIBRATION_MEDIAN = 1.3
"""B_crit over the run's noise scale: 0.12-0.5 for image classifiers (McCandlish et al. 2018, table 1), 0.56-4 elsewhere (theory page)."""
CALIBRATION_LOG_SD = math.log(2.4)
GROWTH_WITH_PILOT_MEDIAN = 2.3
"""The run's noise scale over a short pilot's: 3-5 after the first 8 % of two runs, 0.9-1.2 after two thirds of three (theory page)."""
GROWTH_WITH_PILOT_LOG_SD = math.log(2.2)
GROWTH_WITHOUT_PILOT_MEDIAN = 4.6
"""The run's noise scale over that at initialisation: smaller still than a pilot's, and less known (theory page)."""
GROWTH_WITHOUT_PILOT_LOG_SD = math.log(3)
AT_LEAST_LOG_SD = math.log(10)
"""Spread of the half-normal prior above a bound that is all that is known."""
CHECKPOINT_LOG_SD = math.log(1.5)
"""Spread of the noise scale between the pilot's end and the checkpoint from which branches part: about as far, but not the same weights."""

BEST_RATE_MEDIAN = 1.15
"""The best learning rate over the rule's: what wins on a grid is rather too cold, since too hot costs more (docs/theory/branches.md)."""
BEST_RATE_LOG_SD = math.log(1.5)
"""Spread of that: rates are tuned on such a grid, at another size."""
BEST_RATE_SLOPE_SD = 0.3
"""Spread of how that grows with the logarithm of the size."""


@dataclass(frozen=True)
class CriticalBelief:
    """Draws of the critical batch size, in samples, one number a draw; the calibration c is the same in both."""

    over_run: FloatArray
    at_checkpoint: FloatArray
    """Where the pilot ended, and branches part."""


def critical_belief(noise: NoiseScale, rng: np.random.Generator, n_draws: int) -> CriticalBelief | None:
    """Draw the critical batch size: log B_crit = log B + log c + log g.

    B is the measured noise scale with its error, c the calibration of B_crit against it, g its growth over the rest of the run. Known only
    from below, B is drawn above its bound with a wide half-normal in the logarithm. Priors are the constants of this module. At the end of
    the pilot, B is the last snapshot's and nothing has grown yet.

    Returns:
        The draws; none when the noise scale says nothing.
    """
    measured = normal_draws(rng, n_draws)
    log_noise = _log_noise(noise, measured)
    if log_noise is None:
        return None
    median, log_sd = (
        (GROWTH_WITH_PILOT_MEDIAN, GROWTH_WITH_PILOT_LOG_SD)
        if noise.pilot_samples > 0
        else (GROWTH_WITHOUT_PILOT_MEDIAN, GROWTH_WITHOUT_PILOT_LOG_SD)
    )
    log_calibration = math.log(CALIBRATION_MEDIAN) + CALIBRATION_LOG_SD * normal_draws(rng, n_draws)
    log_growth = math.log(median) + log_sd * normal_draws(rng, n_draws)
    last = noise.snapshots[-1].noise_scale if noise.snapshots else None
    log_last = _log_noise(last, measured) if last is not None else log_noise
    log_last = log_noise if log_last is None else log_last
    log_drift = CHECKPOINT_LOG_SD * normal_draws(rng, n_draws)
    return CriticalBelief(
        over_run=np.exp(log_noise + log_calibration + log_growth), at_checkpoint=np.exp(log_last + log_calibration + log_drift)
    )


def _log_noise(noise: NoiseScale | Estimate, normal: FloatArray) -> FloatArray | None:
    if noise.status is Status.AT_LEAST and noise.low is not None and noise.low > 0:
        return np.asarray(math.log(noise.low) + AT_LEAST_LOG_SD * np.abs(normal))
    if noise.status is Status.OK and noise.value is not None and noise.value > 0:
        return np.asarray(math.log(noise.value) + _noise_log_sd(noise) * normal)
    return None


def critical_batch_over_run(
    *, shares: FloatArray, sq_norm: FloatArray, trace: FloatArray, batch_size: float, calibration: FloatArray
) -> FloatArray:
    """Critical batch size of a whole run whose noise was seen along it, one number a draw of the calibration c.

    A run at b0 that spends dt samples at noise scale B = S / G would at b spend dt (b + c B) / (b0 + c B), so that

        E(b) / E(b0) = sum dt (b G + c S) / (b0 G + c S),   B_crit = c sum(w S) / sum(w G),   w = dt / (b0 G + c S).

    Args:
        shares: Samples that each record stands for, dt, shape (records,).
        sq_norm: |G|**2 at each record.
        trace: tr Sigma of one sample at each record.
        batch_size: b0, in samples.
        calibration: Draws of c.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix D.1, with the calibration inside the weights.
    """
    scaled = calibration[:, None] * trace[None, :]
    weights = shares[None, :] / (batch_size * sq_norm[None, :] + scaled)
    return np.asarray((weights * scaled).sum(axis=1) / (weights * sq_norm[None, :]).sum(axis=1))


def curves_of(
    noise: NoiseScale, branches: BranchMeasurements | None, rng: np.random.Generator, n_draws: int, *, limit: RateLimit | None = None
) -> CurveDraws | None:
    """Draws of the samples to the target over the whole run.

    Without branches, hyperbolas. With them, draws of curves of every shape, each at the checkpoint and over the run: the same calibration,
    sharpness and discrepancy, another noise scale. They are weighed by what the branches needed, then drawn again by weight.

    Returns:
        None when the noise scale says nothing.
    """
    belief = critical_belief(noise, rng, n_draws)
    if belief is None:
        return None
    results = () if branches is None else tuple(probe.result for probe in branches.probes)
    reached = [result.global_batch_size for result in results if result.outcome is ProbeOutcome.REACHED]
    if not reached:
        return draw_curves(HYPERBOLA, middle=1, rng=rng, n_draws=n_draws, critical=belief.over_run)
    at_checkpoint, over_run = branch_curves(belief, middle=results[0].global_batch_size, rng=rng)
    weights = weigh(at_checkpoint, results).weights
    drawn = over_run.rows(rng.choice(n_draws, n_draws, p=weights))
    if drawn.rates is None:
        return drawn
    trained = tuple((result.global_batch_size, result.lr_over_rule, result.outcome is ProbeOutcome.FAILED) for result in results)
    tried = tuple(sorted({rate for _, rate, has_failed in trained if not has_failed}))
    return replace(drawn, rates=replace(drawn.rates, tried=tried, branches=trained, limit=limit))


def branch_curves(belief: CriticalBelief, *, middle: float, rng: np.random.Generator) -> tuple[CurveDraws, CurveDraws]:
    """Draws of the curve where branches part, and the same draws over the run, with the learning rate coupled to the size.

    Args:
        belief: Draws of the critical batch size.
        middle: Size of the first branch, in samples.
        rng: Source of the draws.
    """
    n_draws = len(belief.over_run)
    at_checkpoint = draw_curves(PRIORS["coupled"], middle=middle, rng=rng, n_draws=n_draws, critical=belief.at_checkpoint)
    log_best = math.log(BEST_RATE_MEDIAN) + BEST_RATE_LOG_SD * normal_draws(rng, n_draws)
    slope = BEST_RATE_SLOPE_SD * normal_draws(rng, n_draws)
    at_checkpoint = replace(at_checkpoint, rates=RateDraws(log_best, slope, middle))
    shift = np.log(belief.over_run) - at_checkpoint.log_critical
    return at_checkpoint, replace(
        at_checkpoint, log_critical=at_checkpoint.log_critical + shift, log_failing=at_checkpoint.log_failing + shift
    )


def is_ruled_out(size: int, branches: BranchMeasurements | None) -> bool:
    """Whether training says that a size is no candidate: it lies outside those that trained without failing, if there are two and more."""
    if branches is None or len(branches.probes) < 2:
        return False
    trained = [p.result.global_batch_size for p in branches.probes if p.result.outcome is not ProbeOutcome.FAILED]
    return bool(trained) and not min(trained) <= size <= max(trained)


def _noise_log_sd(noise: NoiseScale | Estimate) -> float:
    """Standard error of the logarithm of the noise scale; wide where the interval reaches down to zero."""
    if not noise.low:
        return AT_LEAST_LOG_SD
    return log_standard_error(Estimate(value=noise.value, low=noise.low, high=noise.high, n=noise.n))
