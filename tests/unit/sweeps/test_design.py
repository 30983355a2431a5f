from functools import partial

import numpy as np
import pytest

from planted_sweeps import SIZES, Law, linear_below, settings_of, sweep
from rightbatch.records.sweep import TrialSpec, TrialStatus
from rightbatch.sweeps.design import SLACK_OF_NEIGHBOUR, expected_trials, next_trials


def specs(results):
    return {result.spec for result in results}


def test_the_search_begins_with_one_trial_at_the_first_size_and_rate():
    settings = settings_of()

    assert next_trials(settings, linear_below, ()) == (TrialSpec(global_batch_size=64, lr=0.1, seed=0, most_samples=settings.most_samples),)


@pytest.mark.parametrize("order", ["outward", "at once"])
@pytest.mark.parametrize("seed", range(5))
def test_the_same_trials_are_run_in_whatever_order_they_end(order, seed):
    law, settings, draws = Law(noise=0.15, draw=seed), settings_of(order=order), np.random.default_rng(seed)

    in_turn = sweep(law, settings)
    shuffled = sweep(law, settings, pick=lambda waiting: waiting[int(draws.integers(len(waiting)))])
    last_first = sweep(law, settings, pick=lambda waiting: waiting[-1])

    assert specs(in_turn) == specs(shuffled) == specs(last_first)


def test_no_trial_is_asked_for_twice():
    results = sweep(Law(noise=0.2), settings_of())

    assert len(specs(results)) == len(results)


def test_the_rate_of_least_samples_is_found_at_every_size():
    law = Law(noise=0.0)
    settings = settings_of(seeds=1)

    results = sweep(law, settings)

    for size in SIZES:
        reached = [result for result in results if result.spec.global_batch_size == size and result.samples_to_target is not None]
        best = min(reached, key=lambda result: result.samples_to_target)
        assert 2**-0.5 <= best.spec.lr / law.best_lr(size) <= 2**0.5


def test_rates_that_came_near_the_best_are_tried_on_all_seeds():
    results = sweep(Law(noise=0.0, sharpness=0.05), settings_of(sizes=(64,)))

    first = [result for result in results if result.spec.seed == 0 and result.samples_to_target is not None]
    fewest = min(result.samples_to_target for result in first)
    near = {result.spec.lr for result in first if result.samples_to_target <= 1.25 * fewest}
    assert len(near) > 1
    assert {(lr, seed) for lr in near for seed in (1, 2)} <= {(result.spec.lr, result.spec.seed) for result in results}


def test_smaller_rates_are_tried_when_the_best_one_fails_on_a_seed():
    class Straggling(Law):
        def samples(self, spec):
            return super().samples(spec) if spec.seed == 0 or spec.lr <= 0.05 else float("inf")

    results = sweep(Straggling(noise=0.0, sharpness=1.0), settings_of(sizes=(64,)))

    assert {result.spec.seed for result in results if result.spec.lr == 0.05 and result.samples_to_target is not None} == {0, 1, 2}


def test_where_the_first_seed_was_lucky_other_rates_are_tried_on_all_seeds_too():
    class Lucky(Law):
        def samples(self, spec):
            return super().samples(spec) * (2.0 if spec.lr != 0.1 else 1.0 if spec.seed == 0 else 2.8)

    results = sweep(Lucky(noise=0.0, most_lr=0.25, sharpness=0.1), settings_of(sizes=(64,), first_lr=0.2))

    on_all_seeds = {result.spec.lr for result in results if result.spec.seed == 2 and result.samples_to_target is not None}
    assert {0.1, 0.2} <= on_all_seeds


def test_a_trial_that_cannot_win_is_stopped_before_its_size_has_cost_much():
    law, settings = Law(), settings_of()

    results = sweep(law, settings)

    for result in results:
        if result.spec.global_batch_size != settings.first_size:
            assert result.spec.most_samples <= 6 * 1.25 * law.fewest * (1 + 512 / law.critical)
    assert all(result.samples <= result.spec.most_samples for result in results)


def test_a_neighbour_may_take_a_few_times_the_samples_and_no_more():
    settings = settings_of(sizes=(64, 128), seeds=1)
    results = [Law(noise=0.0).train(next_trials(settings, linear_below, ())[0])]
    while {spec.global_batch_size for spec in next_trials(settings, linear_below, results)} == {64}:
        results += map(Law(noise=0.0).train, next_trials(settings, linear_below, results))

    asked = [spec for spec in next_trials(settings, linear_below, results) if spec.global_batch_size == 128]

    fewest = min(result.samples_to_target for result in results if result.samples_to_target is not None)
    assert asked[0].most_samples == pytest.approx(SLACK_OF_NEIGHBOUR * fewest, abs=1)


def test_sizes_beyond_one_that_never_arrives_are_not_tried():
    results = sweep(Law(largest=64), settings_of())

    tried = {result.spec.global_batch_size for result in results}
    assert tried == {8, 16, 32, 64, 128}


def test_where_the_first_size_never_arrives_a_smaller_one_takes_its_place():
    results = sweep(Law(largest=16), settings_of())

    reached = {result.spec.global_batch_size for result in results if result.status is TrialStatus.COMPLETE}
    assert reached == {8, 16}


def test_where_no_size_arrives_the_search_ends():
    results = sweep(Law(largest=1), settings_of(sizes=(32, 64)))

    assert {result.status for result in results} == {TrialStatus.ABORTED}
    assert len(results) == 10


def test_at_once_all_sizes_start_when_the_first_one_is_climbed():
    settings = settings_of(order="at once", seeds=1)
    results = []
    while len(waiting := next_trials(settings, linear_below, results)) == 1:
        results.append(Law(noise=0.0).train(waiting[0]))

    assert {spec.global_batch_size for spec in waiting} == set(SIZES) - {64}


def test_the_expected_number_of_trials_is_near_the_number_that_is_run():
    settings = settings_of()

    counts = [len(sweep(Law(draw=draw, noise=0.1), settings)) for draw in range(10)]

    assert expected_trials(settings) == pytest.approx(sum(counts) / len(counts), rel=0.2)


def test_a_diverged_trial_is_not_trained_again_with_more_samples():
    class Exploding(Law):
        def train(self, spec):
            result = super().train(spec)
            return result if result.samples_to_target else result.model_copy(update={"status": TrialStatus.DIVERGED})

    results = sweep(Exploding(), settings_of())

    rates = [(result.spec.global_batch_size, result.spec.lr, result.spec.seed) for result in results]
    assert len(rates) == len(set(rates))


def test_all_rates_are_the_first_one_times_a_power_of_two():
    results = sweep(Law(), settings_of(first_lr=0.1))

    grid = {float(f"{0.1 * 2.0**power:.6g}") for power in range(-12, 12)}
    assert {result.spec.lr for result in results} <= grid


def test_a_sweep_trains_less_than_half_of_the_full_grid():
    shares = []
    for draw in range(10):
        law, settings = Law(draw=draw), settings_of()
        results = sweep(law, settings)
        rates = {result.spec.lr for result in results}
        cell = partial(_grid_cell, law, settings)
        grid = sum(cell(size, lr, seed) for size in SIZES for lr in rates for seed in range(3))
        shares.append(sum(result.samples for result in results) / grid)

    assert max(shares) < 0.5


def _grid_cell(law, settings, size, lr, seed):
    """A cell of a full grid that stops, as the sweep does, where a training takes six times the least possible."""
    spec = TrialSpec(global_batch_size=size, lr=lr, seed=seed, most_samples=settings.most_samples)
    return min(law.samples(spec), 6 * law.fewest)
