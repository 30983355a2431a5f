import math
from dataclasses import replace

import numpy as np
import pytest

from rightbatch.fits.branch_rate import best_rate
from rightbatch.fits.samples_curve import PRIORS, draw_curves
from rightbatch.records.training import BranchMeasurements, BranchProbe, ProbeOutcome, TrainingProbe


def curves(best, *, log_sd=0.2):
    rng = np.random.default_rng(0)
    draws = draw_curves(PRIORS["coupled"], middle=64, rng=rng, n_draws=4096)
    return replace(draws, log_best_rate=math.log(best) + log_sd * rng.standard_normal(4096))


def branches(*rates, failed=()):
    probes = tuple(
        BranchProbe(
            micro_batch_size=64,
            accumulation_steps=1,
            result=TrainingProbe(
                global_batch_size=64,
                lr_over_rule=rate,
                outcome=ProbeOutcome.FAILED if rate in failed else ProbeOutcome.REACHED,
                samples=1000,
            ),
            losses=((100, 1.0),),
        )
        for rate in rates
    )
    return BranchMeasurements(checkpoint_samples=1, checkpoint_batch_size=64, evaluated_samples=1, target_loss=1.0, probes=probes)


def test_best_rate_lies_a_little_below_the_median_because_too_hot_costs_more():
    found = best_rate(curves(1.2), branches(1.0, 0.5, 2.0))

    assert found.value == pytest.approx(1.15, abs=0.05)
    assert (found.low, found.high) == pytest.approx((1.2 * math.exp(-0.39), 1.2 * math.exp(0.39)), rel=0.03)
    assert found.n == 3


def test_no_rate_outside_those_that_trained_is_given():
    assert best_rate(curves(2.0), branches(1.0, 1.5)).value == pytest.approx(1.5)
    assert best_rate(curves(2.0), branches(1.0, 1.5, 3.0, failed=(3.0,))).value == pytest.approx(1.5)
    assert best_rate(curves(0.3), branches(1.0, 1.5)).value == pytest.approx(1.0)


def test_one_rate_says_nothing():
    assert best_rate(curves(2.0), branches(1.0, 1.0)) is None
    assert best_rate(curves(2.0), branches(1.0, 2.0, failed=(2.0,))) is None
    assert best_rate(curves(2.0), None) is None
    assert best_rate(None, branches(1.0, 2.0)) is None
