import math
from dataclasses import replace

import numpy as np
import pytest

from oracles import oracle_samples
from rightbatch.fits.samples_curve import PRIORS, RateDraws, draw_curves, log_probability_above, weigh
from rightbatch.records.training import ProbeOutcome, TrainingProbe

SIZES = (16, 64, 256, 1024)
BROAD = replace(PRIORS["fixed"], run_log_sd=0.2)


def curves(prior=BROAD, *, n_draws=512, seed=0, critical=None):
    return draw_curves(prior, middle=128, rng=np.random.default_rng(seed), n_draws=n_draws, critical=critical)


def reached(size, samples):
    return TrainingProbe(global_batch_size=size, outcome=ProbeOutcome.REACHED, samples=samples)


def test_curve_and_spread_equal_the_formula_draw_by_draw():
    draws = curves(n_draws=8)

    log_samples, spread = draws.log_samples(np.array(SIZES)), draws.spread(np.array(SIZES))

    for row in range(8):
        for column, size in enumerate(SIZES):
            assert log_samples[row, column] == pytest.approx(oracle_samples.log_samples(draws, row, size), rel=1e-12)
            assert spread[row, column] == pytest.approx(oracle_samples.spread(draws, row, size), rel=1e-12)


def test_discrepancy_has_the_stated_deviation_and_correlation():
    flat = replace(PRIORS["tuned"], critical_over_middle=1e9, critical_log_sd=1e-9, exponent_log_sd=1e-9, discrepancy_sd=0.3)
    apart = 16 * math.exp(flat.correlation_log)

    values = curves(flat, n_draws=8192).log_samples(np.array([16.0, apart]))

    assert values.std(axis=0) == pytest.approx([0.3, 0.3], abs=4 * 0.3 / math.sqrt(2 * 8192))
    assert np.corrcoef(values.T)[0, 1] == pytest.approx(math.exp(-0.5), abs=4 * (1 - math.exp(-1)) / math.sqrt(8192))


def test_weights_equal_the_likelihood_with_the_level_integrated_out():
    draws = replace(curves(n_draws=6), log_failing=np.full(6, math.inf))
    probes = (reached(16, 1000.0), reached(64, 1100.0), reached(1024, 2500.0))

    weights = weigh(draws, probes).weights

    expected = np.array([oracle_samples.likelihood(draws, row, probes) for row in range(6)])
    assert weights == pytest.approx(expected / expected.sum(), rel=1e-5)


def with_rates(draws, *, log_sd=0.5):
    best, slope = np.random.default_rng(7).standard_normal((2, len(draws.log_critical)))
    return replace(draws, rates=RateDraws(log_sd * best, 0.2 * slope, 64))


def test_rates_count_in_the_likelihood():
    draws = with_rates(replace(curves(n_draws=6), log_failing=np.full(6, math.inf)))
    probes = (reached(64, 1000.0), reached(64, 900.0).model_copy(update={"lr_over_rule": 1.4}), reached(256, 1500.0))

    weights = weigh(draws, probes).weights

    expected = np.array([oracle_samples.likelihood(draws, row, probes) for row in range(6)])
    assert weights == pytest.approx(expected / expected.sum(), rel=1e-5, abs=1e-9)


def test_the_best_rate_costs_nothing_and_twice_as_much_makes_next_to_no_progress():
    draws = replace(curves(n_draws=2), rates=RateDraws(np.log([1.0, 2.0]), np.zeros(2), 64))

    cost = draws.log_rate_cost(np.full(3, 64.0), np.array([1.0, 2.0, 4.0]))

    assert cost[0] == pytest.approx([0.0, math.log(10), math.log(10)])
    assert cost[1] == pytest.approx([math.log(4 / 3), 0.0, math.log(10)])


def test_the_best_rate_may_grow_with_the_size():
    rates = RateDraws(np.array([0.0]), np.array([0.5]), 64)

    assert rates.log_best_at(np.array([16.0, 64.0, 256.0]))[0] == pytest.approx([-math.log(2), 0.0, math.log(2)])


def test_without_rates_every_rate_is_the_best():
    assert not curves(n_draws=3).log_rate_cost(np.full(2, 64.0), np.array([0.5, 2.0])).any()


def test_a_rate_that_needed_fewer_samples_moves_the_best_rate_towards_it():
    draws = with_rates(curves(n_draws=4096))
    probes = (reached(64, 1000.0), reached(64, 800.0).model_copy(update={"lr_over_rule": 1.41}))

    assert float(weigh(draws, probes).weights @ draws.rates.log_best) > 0.15


def test_a_rate_that_failed_says_less_of_its_size():
    draws = with_rates(curves(n_draws=4096))
    fails = draws.fails(np.array([1024.0]))[:, 0]
    failed = TrainingProbe(global_batch_size=1024, outcome=ProbeOutcome.FAILED, samples=3000)

    at_rule, hot = (weigh(draws, (failed.model_copy(update={"lr_over_rule": rate}),)).weights[fails].sum() for rate in (1.0, 2.0))

    assert fails.mean() < hot < at_rule - 0.1


def test_without_probes_all_draws_weigh_the_same():
    assert weigh(curves(), ()).weights == pytest.approx(np.full(512, 1 / 512))


def test_one_probe_tells_the_level_but_not_the_shape():
    draws = replace(curves(), log_failing=np.full(512, math.inf))

    posterior = weigh(draws, (reached(64, 5000.0),))

    at_64 = posterior.log_level + draws.log_samples(np.array([64.0]))[:, 0]
    assert posterior.weights == pytest.approx(np.full(512, 1 / 512))
    assert np.median(at_64) == pytest.approx(math.log(5000), abs=0.1)


def test_a_size_that_reached_the_target_rules_out_draws_in_which_it_fails():
    draws = curves()

    weights = weigh(draws, (reached(1024, 1000.0),)).weights

    fails = draws.fails(np.array([1024.0]))[:, 0]
    assert fails.any()
    assert weights[fails].sum() == 0


def test_a_stopped_probe_moves_weight_to_curves_that_need_more_samples_there():
    draws = curves()
    stopped = TrainingProbe(global_batch_size=1024, outcome=ProbeOutcome.STOPPED, samples=3000)

    before, after = weigh(draws, (reached(64, 1000.0),)), weigh(draws, (reached(64, 1000.0), stopped))

    rise = np.where(draws.fails(np.array([1024.0]))[:, 0], 10.0, draws.log_samples(np.array([1024.0, 64.0])) @ np.array([1.0, -1.0]))
    assert after.weights @ rise > before.weights @ rise + 0.3
    above = np.exp(log_probability_above(draws, 1024, math.log(3000), before.log_level))
    assert after.weights == pytest.approx(before.weights * above / (before.weights @ above))


def test_a_failed_probe_is_twenty_times_likelier_where_the_size_fails():
    draws = curves()
    failed = TrainingProbe(global_batch_size=1024, outcome=ProbeOutcome.FAILED, samples=3000)

    weights = weigh(draws, (failed,)).weights

    fails = draws.fails(np.array([1024.0]))[:, 0]
    assert weights[fails].min() == pytest.approx(20 * weights[~fails].max())


def test_a_planted_critical_size_is_recovered_from_three_probes():
    exact = replace(PRIORS["tuned"], discrepancy_sd=1e-3, run_log_sd=0.02, exponent_log_sd=1e-3)
    draws = curves(exact, n_draws=4096)
    probes = tuple(reached(size, 1000 * (1 + size / 200)) for size in (16, 128, 1024))

    posterior = weigh(draws, probes)

    mean = float(posterior.weights @ draws.log_critical)
    assert mean == pytest.approx(math.log(200), abs=0.1)


def test_measured_noise_takes_the_place_of_the_prior_on_the_critical_size():
    critical = np.geomspace(50, 500, 512)

    assert curves(critical=critical).log_critical == pytest.approx(np.log(critical))


def test_a_probe_read_off_a_noisy_curve_weighs_less():
    draws = replace(curves(), log_failing=np.full(512, math.inf))
    exact = (reached(16, 1000.0), reached(1024, 5000.0))
    rough = tuple(probe.model_copy(update={"log_error": 2.0}) for probe in exact)

    spread = [float(np.std(weigh(draws, probes).weights)) for probes in (exact, rough)]

    assert spread[1] < 0.3 * spread[0]
