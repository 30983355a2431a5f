import math
from dataclasses import replace

import numpy as np
import pytest

from rightbatch.fits.branch_rate import best_rate, log_rate_loss
from rightbatch.fits.samples_curve import PRIORS, RateDraws, draw_curves


def curves(best, *, tried=(0.5, 1.0, 2.0), log_sd=0.2, slope=0.0):
    rng = np.random.default_rng(0)
    draws = draw_curves(PRIORS["coupled"], middle=64, rng=rng, n_draws=4096)
    return replace(draws, rates=RateDraws(math.log(best) + log_sd * rng.standard_normal(4096), np.full(4096, slope), 64, tried))


def test_best_rate_lies_a_little_below_the_median_because_too_hot_costs_more():
    found = best_rate(curves(1.2), 64)

    assert found.value == pytest.approx(1.12, abs=0.05)
    assert (found.low, found.high) == pytest.approx((1.2 * math.exp(-0.39), 1.2 * math.exp(0.39)), rel=0.03)
    assert found.n == 3


def test_the_rate_is_that_of_the_size():
    assert best_rate(curves(1.0, slope=0.5, log_sd=0.01), 128).value == pytest.approx(math.sqrt(2), rel=0.05)
    assert best_rate(curves(1.0, slope=0.5, log_sd=0.01), 32).value == pytest.approx(math.sqrt(0.5), rel=0.05)


def test_no_rate_outside_those_that_trained_is_given():
    assert best_rate(curves(2.0, tried=(1.0, 1.5)), 64).value == pytest.approx(1.5)
    assert best_rate(curves(0.3, tried=(1.0, 1.5)), 64).value == pytest.approx(1.0)


def test_one_rate_says_nothing():
    assert best_rate(curves(2.0, tried=(1.0,)), 64) is None
    assert best_rate(replace(curves(2.0), rates=None), 64) is None
    assert best_rate(None, 64) is None
    assert not log_rate_loss(curves(2.0, tried=(1.0,)), np.array([64.0])).any()


def test_a_size_whose_best_rate_is_less_known_is_expected_to_cost_more():
    rates = curves(1.0, log_sd=0.05).rates
    unsure = replace(curves(1.0), rates=replace(rates, slope=0.4 * np.random.default_rng(2).standard_normal(4096)))

    loss = np.exp(log_rate_loss(unsure, np.array([16.0, 64.0]))).mean(axis=0)

    assert loss[0] > 1.1 > 1.02 > loss[1] >= 1
