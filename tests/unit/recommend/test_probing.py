import math
from dataclasses import replace

import numpy as np

from rightbatch.fits.samples_curve import PRIORS, RateDraws, draw_curves, weigh
from rightbatch.recommend.probing import LARGEST_COST, Candidates, choose_probed, first_probes, next_probe
from rightbatch.records.training import ProbeOutcome, TrainingProbe

SIZES = np.array([16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0])
HALF = 100.0
SURE = replace(PRIORS["tuned"], critical_log_sd=1e-6, exponent_log_sd=1e-6, discrepancy_sd=1e-6, run_log_sd=0.01, run_log_sd_log_sd=1e-6)


def candidates(prior=PRIORS["coupled"], *, half=HALF, seed=0):
    draws = draw_curves(prior, middle=128, rng=np.random.default_rng(seed), n_draws=2048)
    return Candidates(sizes=SIZES, log_time=np.log((half + SIZES) / SIZES)[None, :], curves=draws)


def probe(size, samples=1000.0, outcome=ProbeOutcome.REACHED):
    return TrainingProbe(global_batch_size=size, outcome=outcome, samples=samples)


def samples(size, critical):
    return 1000 * (1 + size / critical)


def run_to_the_end(cost_of, found, *, most=8):
    """Carry out the design against a planted law of samples; infinite: never."""
    log_time = dict(zip(SIZES.astype(int).tolist(), found.log_time[0].tolist(), strict=True))
    probes, best, spent = (), math.inf, 0.0
    while len(probes) < most:
        if math.isfinite(best):
            proposal = next_probe(found, probes, best_log_time=math.log(best))
            indices = () if proposal is None else (proposal.index,)
        else:
            indices = first_probes(found, probes, count=2)
        if not indices:
            break
        sizes = [int(SIZES[i]) for i in indices]
        times = [cost_of(size) * math.exp(log_time[size]) for size in sizes]
        best = min(best, *times)
        for size, time in zip(sizes, times, strict=True):
            pace = math.exp(log_time[size])
            took = min(time, best, 1e5 * pace)
            if time <= best and math.isfinite(time):
                probes = (*probes, probe(size, cost_of(size)))
            else:
                probes = (*probes, probe(size, took / pace, ProbeOutcome.STOPPED if math.isfinite(best) else ProbeOutcome.FAILED))
            spent += took
    return probes, spent / best


def test_planted_laws_are_answered_within_a_tenth_of_the_best_for_the_time_of_a_few_runs():
    for critical in (30.0, 300.0, 3000.0):
        found = candidates()
        probes, spent = run_to_the_end(lambda size, critical=critical: samples(size, critical), found)

        chosen = choose_probed(found, probes).index
        times = samples(SIZES, critical) * (HALF + SIZES) / SIZES
        assert times[chosen] <= 1.1 * times.min()
        assert spent <= 0.6 * times.sum() / times.min()


def test_no_size_is_chosen_that_fails_although_it_would_be_the_fastest():
    found = candidates(half=2000.0)

    probes, _ = run_to_the_end(lambda size: samples(size, 1e4) if size <= 128 else math.inf, found)

    assert SIZES[choose_probed(found, probes).index] <= 128


def test_choice_lies_between_the_sizes_that_reached_the_target():
    probes = (probe(32, samples(32, 1e5)), probe(128, samples(128, 1e5)), probe(64, 900.0, ProbeOutcome.STOPPED))

    index = choose_probed(candidates(), probes).index

    assert SIZES[index] in (32, 128)


def test_without_probes_the_least_expected_cost_is_chosen_and_probed_first():
    found = candidates()

    assert first_probes(found) == (choose_probed(found, ()).index,) == (int(np.argmin(found.costs.mean(axis=0))),)


def test_the_first_two_are_those_whose_better_one_is_expected_to_cost_least():
    found = candidates(PRIORS["fixed"])
    tried = (probe(512, 1e5, ProbeOutcome.FAILED),)
    weights = weigh(found.curves, tried).weights

    pair = first_probes(found, tried, count=2)

    expected = {
        (i, j): sum(weight * min(costs[i], costs[j]) for weight, costs in zip(weights, found.costs, strict=True))
        for i in range(len(SIZES))
        for j in range(i + 1, len(SIZES))
        if 512 not in (SIZES[i], SIZES[j])
    }
    assert pair == min(expected, key=expected.get)
    cheapest = np.argsort(weights @ found.costs)[:2]
    assert set(pair) != set(cheapest)  # neighbours of the best guess would tell little


def test_no_first_probe_when_every_size_was_tried():
    tried = tuple(probe(int(size), outcome=ProbeOutcome.FAILED) for size in SIZES)

    assert first_probes(candidates(), tried) == ()
    assert first_probes(candidates(), tried[1:], count=2) == (0,)


def test_nothing_more_is_trained_when_the_curve_is_known():
    found = candidates(SURE)
    index = choose_probed(found, ()).index
    size = int(SIZES[index])
    log_time = float(found.log_time[0, index])

    proposal = next_probe(found, (probe(size, 1000.0),), best_log_time=math.log(1000) + log_time)

    assert proposal is None


def test_a_probe_never_costs_more_than_the_best_run_and_promises_what_it_removes():
    found = candidates()
    index = choose_probed(found, ()).index
    first = probe(int(SIZES[index]), 1000.0)
    regret_now = choose_probed(found, (first,)).regret

    proposal = next_probe(found, (first,), best_log_time=math.log(1000) + float(found.log_time[0, index]))

    assert proposal is not None
    assert proposal.index != index
    assert 0 < proposal.cost <= 1
    assert 0 < proposal.regret_removed <= regret_now + 0.1


def test_no_size_counts_as_more_than_four_times_the_best():
    costs = candidates().costs

    assert costs.min() == 1
    assert costs.max() <= LARGEST_COST + 1e-9


def with_rates(*, log_sd):
    """One size at three rates, of which the best is unknown."""
    draws = draw_curves(SURE, middle=128, rng=np.random.default_rng(0), n_draws=2048)
    draws = replace(draws, rates=RateDraws(log_sd * np.random.default_rng(1).standard_normal(2048), np.zeros(2048), 64))
    rates = np.array([0.5, 1.0, 2.0])
    return Candidates(sizes=np.full(3, 64.0), log_time=np.zeros((1, 3)), curves=draws, lr_over_rule=rates, run=draws)


def test_another_rate_is_trained_as_long_as_the_best_one_is_unknown():
    first = probe(64, 1000.0)

    proposal = next_probe(with_rates(log_sd=0.5), (first,), best_log_time=math.log(1000), without={(64, 1.0)})

    assert proposal is not None
    assert proposal.regret_removed > 0.02
    assert next_probe(with_rates(log_sd=1e-6), (first,), best_log_time=math.log(1000), without={(64, 1.0)}) is None


def test_less_is_expected_of_a_probe_that_is_read_with_an_error():
    exact = with_rates(log_sd=0.5)
    rough, useless = (replace(exact, log_error=error) for error in (1.0, 10.0))

    removed = [
        proposal.regret_removed
        for found in (exact, rough)
        if (proposal := next_probe(found, (probe(64),), best_log_time=math.log(1000), without={(64, 1.0)}))
    ]

    assert removed[0] > 1.5 * removed[1] > 0
    assert next_probe(useless, (probe(64),), best_log_time=math.log(1000), without={(64, 1.0)}) is None


def test_the_rate_that_needed_fewest_samples_is_chosen_and_no_failed_one():
    found = with_rates(log_sd=0.5)
    hot, cold = (probe(64, samples).model_copy(update={"lr_over_rule": rate}) for samples, rate in ((700.0, 2.0), (2000.0, 0.5)))

    assert found.settings[choose_probed(found, (probe(64), hot, cold)).index] == (64, 2.0)
    failed = hot.model_copy(update={"outcome": ProbeOutcome.FAILED})
    assert found.settings[choose_probed(found, (probe(64), failed, cold)).index] == (64, 1.0)
