import math
from dataclasses import replace

import numpy as np
import pytest

from oracles.oracle_curves import noise, workload
from rightbatch.fits.branch_rate import best_rate, log_rate_loss, over_rule
from rightbatch.fits.critical_batch import BEST_RATE_LOG_SD, BEST_RATE_MEDIAN
from rightbatch.fits.lr_scaling import SATURATION, RateLimit, saturating_gain
from rightbatch.fits.samples_curve import PRIORS, RateDraws, draw_curves
from rightbatch.records.training import BranchMeasurements, BranchProbe, ProbeOutcome, TrainingProbe


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


def test_no_rate_is_raised_above_the_limit_of_its_size():
    hot = curves(2.0, tried=(1.0, 2.0), log_sd=0.01)
    limited = replace(hot, rates=replace(hot.rates, limit=RateLimit(base_size=64, saturation=64)))

    assert best_rate(hot, 32).value == pytest.approx(2.0, rel=0.03)
    assert best_rate(limited, 32).value == pytest.approx(1.5)
    assert best_rate(limited, 64).value == pytest.approx(2.0, rel=0.03)
    assert log_rate_loss(limited, np.array([32.0])).mean() > log_rate_loss(hot, np.array([32.0])).mean() + 0.03


def test_no_rate_beside_one_that_failed_at_its_size_is_given():
    found = curves(1.5, tried=(0.5, 1.0, 2.0), log_sd=0.01)
    between = replace(found, rates=replace(found.rates, branches=((64, 1.0, False), (64, 1.4, True), (64, 2.0, False))))
    alone = replace(found, rates=replace(found.rates, branches=((64, 1.4, True),)))

    assert best_rate(found, 64).value == pytest.approx(1.5, rel=0.05)
    assert best_rate(between, 64).value == pytest.approx(math.sqrt(1.4 * 2), rel=0.04)
    assert best_rate(between, 32).value == pytest.approx(1.5, rel=0.05)
    assert best_rate(alone, 64).value == pytest.approx(1.5, rel=0.05)


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


def test_what_wins_on_a_grid_of_three_lies_below_the_best_rate_by_as_much_as_is_expected():
    best = np.exp(np.linspace(0, math.log(3), 1001))  # anywhere between two rates of the grid
    grid = 3.0 ** np.arange(-3, 5)
    law = RateDraws(np.log(best), np.zeros(len(best)), 64)

    winner = grid[law.log_cost(np.full(len(grid), 64.0), grid).argmin(axis=1)]

    assert np.median(best / winner) == pytest.approx(BEST_RATE_MEDIAN, abs=0.02)
    assert (best / winner).max() < 2 * math.exp(BEST_RATE_LOG_SD)


def branched(*rates):
    """Branches at (size, learning rate)."""
    probes = tuple(
        BranchProbe(
            micro_batch_size=size,
            accumulation_steps=1,
            result=TrainingProbe(global_batch_size=size, lr=lr, lr_over_rule=9.0, outcome=ProbeOutcome.REACHED, samples=1000),
            losses=((1000, 1.0),),
        )
        for size, lr in rates
    )
    return BranchMeasurements(checkpoint_samples=5000, checkpoint_batch_size=64, evaluated_samples=512, target_loss=1.0, probes=probes)


def test_rates_are_over_those_of_the_rule_at_the_noise_that_is_known_now():
    tuned = workload(lr=0.1, lr_batch_size=64)
    rule = {scale: 0.1 * saturating_gain(SATURATION * scale, 64, 256) for scale in (100.0, 400.0)}

    planned, later = (over_rule(branched((64, 0.2), (256, 2 * rule[100.0])), tuned, noise(scale)) for scale in rule)

    assert [probe.result.lr_over_rule for probe in planned.probes] == [2.0, 2.0]
    assert [probe.result.lr_over_rule for probe in later.probes] == pytest.approx([2.0, 2 * rule[100.0] / rule[400.0]], rel=1e-5)


@pytest.mark.parametrize("missing", ["lr", "lr_batch_size"])
def test_without_a_rate_to_start_from_the_branches_stay_as_they_are(missing):
    measured = branched((64, 0.2), (256, None))

    assert over_rule(measured, workload(**{"lr": 0.1, "lr_batch_size": 64, missing: None}), noise(100.0)) == measured
    assert over_rule(measured, workload(lr=0.1, lr_batch_size=64), noise(100.0)).probes[1] == measured.probes[1]
