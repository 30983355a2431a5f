"""The learning rate that branches ask for, over the one that couples to the size by the rule."""

import math

import numpy as np

from rightbatch.fits.samples_curve import CurveDraws
from rightbatch.records.estimates import Estimate
from rightbatch.records.training import BranchMeasurements, ProbeOutcome

_RATES = 65
_LARGEST_COST = 4.0
"""No rate counts as more than this many times the samples of the best: whoever trains with it notices."""


def best_rate(curves: CurveDraws | None, branches: BranchMeasurements | None) -> Estimate | None:
    """Return the rate of least expected samples over the rule's, between the smallest and the largest that trained without failing.

    Args:
        curves: Draws that are weighed by the branches already.
        branches: The branches.

    Returns:
        With the 95 % interval of the best rate; none where branches had fewer than two rates.
    """
    if branches is None or curves is None or curves.log_best_rate is None:
        return None
    trained = {probe.result.lr_over_rule for probe in branches.probes if probe.result.outcome is not ProbeOutcome.FAILED}
    if len(trained) < 2:
        return None
    rates = np.geomspace(min(trained), max(trained), _RATES)
    costs = np.exp(np.minimum(curves.log_rate_cost(rates), math.log(_LARGEST_COST))).mean(axis=0)
    value = float(rates[costs.argmin()])
    low, high = np.exp(np.percentile(curves.log_best_rate, [2.5, 97.5]))
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=len(branches.probes))
