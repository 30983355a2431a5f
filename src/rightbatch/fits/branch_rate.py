"""The learning rate that branches ask for, over the one that couples to the size by the rule."""

import math
from collections.abc import Sequence

import numpy as np

from rightbatch.fits.intervals import FloatArray
from rightbatch.fits.lr_scaling import couple_lr, known_noise_scale
from rightbatch.fits.samples_curve import CurveDraws, RateDraws
from rightbatch.records.estimates import Estimate, NoiseScale
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.training import BranchMeasurements, BranchProbe

_RATES = 33
_LARGEST_LOG_COST = math.log(4)
"""No rate counts as more than this many times the samples of the best: whoever trains with it notices."""


def over_rule(branches: BranchMeasurements, workload: WorkloadSummary, noise: NoiseScale | None) -> BranchMeasurements:
    """Return the branches with their rates over those of the rule at a noise scale.

    They were planned by the noise known before the checkpoint; the noise measured there moves the rule, not what was trained.

    Args:
        branches: As measured.
        workload: With the rate that the rule starts from; without one, or its size, the branches stay as they are.
        noise: All that is known now.
    """
    base_lr = workload.lr
    if base_lr is None or workload.lr_batch_size is None:
        return branches

    def expressed(probe: BranchProbe) -> BranchProbe:
        result = probe.result
        if result.lr is None:
            return probe
        rule = base_lr * couple_lr(workload, known_noise_scale(noise), result.global_batch_size).factor
        return probe.model_copy(update={"result": result.model_copy(update={"lr_over_rule": float(f"{result.lr / rule:.6g}")})})

    return branches.model_copy(update={"probes": tuple(expressed(probe) for probe in branches.probes)})


def best_rate(curves: CurveDraws | None, size: int) -> Estimate | None:
    """Return the rate of least expected samples over the rule's at a size, within those that trained and the limit.

    Args:
        curves: Draws that are weighed by the branches already.
        size: In samples.

    Returns:
        With the 95 % interval of the best rate; none where branches had fewer than two rates.
    """
    if curves is None or curves.rates is None or len(curves.rates.tried) < 2:
        return None
    at = np.array([size], dtype=np.float64)
    value = _given(curves, curves.rates, at)
    low, high = np.exp(np.percentile(curves.rates.log_best_at(at), [2.5, 97.5]))
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=len(curves.rates.tried))


def log_rate_loss(curves: CurveDraws, sizes: FloatArray) -> FloatArray:
    """Log of the samples that the rate which each size would be given costs over its best, shape (draws, sizes); 0 without two rates."""
    if curves.rates is None or len(curves.rates.tried) < 2:
        return np.zeros((len(curves.log_critical), len(sizes)))
    given = np.array([_given(curves, curves.rates, sizes[i : i + 1]) for i in range(len(sizes))])
    return np.asarray(np.minimum(curves.log_rate_cost(sizes, given), _LARGEST_LOG_COST))


def _given(curves: CurveDraws, rates: RateDraws, size: FloatArray) -> float:
    tried = np.geomspace(min(rates.tried), max(rates.tried), _RATES)
    if rates.limit is not None:
        tried = np.minimum(tried, rates.limit.over_rule(size))
    tried = _beside_none_that_failed(tried, [(rate, has_failed) for at, rate, has_failed in rates.branches if at == size[0]])
    log_cost = curves.log_rate_cost(np.repeat(size, len(tried)), tried)
    return float(tried[np.exp(np.minimum(log_cost, _LARGEST_LOG_COST)).mean(axis=0).argmin()])


def _beside_none_that_failed(rates: FloatArray, trained: Sequence[tuple[float, bool]]) -> FloatArray:
    """Leave out the rates that lie nearest to one that failed at their size; all stay where that leaves none."""
    if not trained:
        return rates
    distance = np.abs(np.log(rates[:, None] / np.array([rate for rate, _ in trained])[None, :]))
    kept = rates[~np.array([has_failed for _, has_failed in trained])[distance.argmin(axis=1)]]
    return kept if len(kept) else rates
