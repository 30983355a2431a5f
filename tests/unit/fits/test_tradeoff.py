import math

import numpy as np
import pytest

from oracles.oracle_curves import law_s, loader, memory, noise, regret_by_loops, timed, workload
from rightbatch.errors import UsageError
from rightbatch.fits.critical_batch import critical_belief
from rightbatch.fits.step_time import fit_step_time
from rightbatch.fits.tradeoff import accumulated_time_s, draw_costs, fit_tradeoff, relative_to_best, time_at
from rightbatch.records.estimates import Status
from rightbatch.records.plan import Constraints, Goal, Objective


def _over_run(*arguments):
    belief = critical_belief(*arguments)
    return None if belief is None else belief.over_run


SIZES = (16, 32, 64, 128, 256, 512, 1024)


def _arguments(**changes):
    curve = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in SIZES}, jitter=0.01, optimizer_s=0.002))
    base = {
        "step_time": curve,
        "loader": None,
        "noise_scale": noise(),
        "memory": None,
        "workload": workload(),
        "constraints": Constraints(),
    }
    return {**base, "rng": np.random.default_rng(0), **changes}


def _tradeoff(goal=Goal.TIME, **changes):
    arguments = _arguments(**changes)
    return fit_tradeoff(draw_costs(**arguments), noise_scale=arguments["noise_scale"], objective=Objective(goal=goal))


def test_prior_of_the_critical_size_is_the_stated_one():
    draws = np.log(_over_run(noise(100.0, factor=1.0001), np.random.default_rng(1), 4096))

    assert np.median(draws) == pytest.approx(math.log(100 * 1.3 * 2.3), abs=0.08)
    assert draws.std() == pytest.approx(math.hypot(math.log(2.4), math.log(2.2)), rel=0.03)


def test_without_a_pilot_the_belief_is_larger_and_wider():
    piloted, blind = (np.log(_over_run(noise(pilot_samples=p), np.random.default_rng(1), 4096)) for p in (1000, 0))

    assert np.median(blind) - np.median(piloted) == pytest.approx(math.log(2), abs=0.1)
    assert blind.std() > piloted.std()


def test_a_lower_bound_is_drawn_from_above_it():
    bounded = _over_run(noise(300.0, status=Status.AT_LEAST), np.random.default_rng(1), 4096)
    known = _over_run(noise(200.0), np.random.default_rng(1), 4096)

    assert np.median(bounded) > np.median(known)
    assert _over_run(noise(status=Status.INDETERMINATE), np.random.default_rng(1), 64) is None


@pytest.mark.parametrize("critical", [40.0, 160.0, 2500.0])
def test_affine_optimum_is_picked_within_one_candidate(critical):
    tradeoff = _tradeoff(noise_scale=noise(critical / 4, factor=1.0001))

    best = min(tradeoff.points, key=lambda p: p.regret).global_batch_size
    optimum = math.sqrt(critical * 0.02 * 8000)
    assert abs(math.log2(best / optimum)) <= 1


def test_regret_equals_the_naive_one():
    draws = draw_costs(**_arguments())

    vectorised = (relative_to_best(draws.time()) - 1).mean(axis=0)

    np.testing.assert_allclose(vectorised, regret_by_loops(draws), rtol=1e-10)


def test_accumulation_repeats_all_but_the_optimizer():
    assert accumulated_time_s(np.array([0.10]), 0.02, 4) == pytest.approx(4 * 0.08 + 0.02)


def test_larger_sizes_are_composed_up_to_a_quarter_of_the_dataset():
    points = _tradeoff().points

    measured = [p.global_batch_size for p in points if p.evidence == "measured"]
    composed = [p for p in points if p.evidence == "composed"]
    assert measured == list(SIZES)
    assert [p.global_batch_size for p in composed] == [2048, 4096, 8192]
    assert all(p.micro_batch_size == 1024 for p in composed)


def test_a_bound_between_timed_sizes_leaves_accumulation_up_to_it():
    curve = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in (16, 64, 128, 1024)}))

    points = _tradeoff(step_time=curve, constraints=Constraints(max_global_batch_size=600)).points

    assert [(p.global_batch_size, p.accumulation_steps) for p in points] == [(16, 1), (64, 1), (128, 1), (256, 2), (512, 4)]


def test_coupled_samples_forbid_accumulation():
    assert all(p.accumulation_steps == 1 for p in _tradeoff(workload=workload(couples_samples=True)).points)


def test_constraints_bound_the_candidates():
    assert max(p.global_batch_size for p in _tradeoff(constraints=Constraints(max_global_batch_size=300)).points) == 256
    assert all(p.micro_batch_size <= 128 for p in _tradeoff(memory=memory(128)).points)
    assert _tradeoff(constraints=Constraints(max_global_batch_size=3)).status is Status.INDETERMINATE


def test_an_accumulated_micro_batch_fits_beside_the_gradients_that_it_adds_to():
    curve = memory(1024).model_copy(update={"accumulation_ceiling": 64})

    points = _tradeoff(memory=curve).points

    assert {p.micro_batch_size for p in points if p.accumulation_steps > 1} == {64}
    assert max(p.micro_batch_size for p in points if p.accumulation_steps == 1) > 64
    none_fits = memory(1024).model_copy(update={"accumulation_ceiling": 1})
    assert all(p.accumulation_steps == 1 for p in _tradeoff(memory=none_fits).points)


def test_ranks_multiply_and_are_extrapolated():
    points = _tradeoff(constraints=Constraints(world_size=4)).points

    assert points[0].global_batch_size == 64
    assert {p.evidence for p in points} == {"extrapolated"}


def test_a_slow_loader_sets_the_step_time():
    points = _tradeoff(loader=loader(1000.0)).points

    at_1024 = next(p for p in points if p.global_batch_size == 1024)
    assert at_1024.loader_bound
    assert at_1024.step_time_s == pytest.approx(1.024, rel=0.01)
    assert not points[0].loader_bound


def test_without_noise_only_step_times_are_known():
    tradeoff = _tradeoff(noise_scale=None)

    assert tradeoff.status is Status.INDETERMINATE
    assert tradeoff.critical_batch_size.value is None
    assert all(p.relative_time.value is None and p.regret is None for p in tradeoff.points)
    assert tradeoff.points[0].step_time_s > 0


def test_energy_needs_a_meter():
    with pytest.raises(UsageError, match="energy meter"):
        _tradeoff(Goal.ENERGY)
    with pytest.raises(UsageError, match="energy meter"):
        _tradeoff(Goal.ENERGY, noise_scale=None)


def test_energy_follows_joules_not_seconds():
    joules = {b: 5.0 + 0.001 * b for b in SIZES}
    curve = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in SIZES}, energy=joules))

    by_energy, by_time = _tradeoff(Goal.ENERGY, step_time=curve), _tradeoff(step_time=curve)

    best_energy, best_time = (min(t.points, key=lambda p: p.regret).global_batch_size for t in (by_energy, by_time))
    assert best_energy > best_time
    assert by_energy.points[0].relative_energy.value > 1


def test_lower_bound_leaves_the_critical_size_open_above():
    tradeoff = _tradeoff(noise_scale=noise(status=Status.AT_LEAST))

    assert tradeoff.status is Status.AT_LEAST
    assert tradeoff.critical_batch_size.high is None
    assert tradeoff.critical_batch_size.low > 0


@pytest.mark.parametrize("size", [8, 48, 100, 3000])
def test_time_between_and_beyond_the_timed_sizes_follows_the_law(size):
    draws = draw_costs(**_arguments())

    step_s = np.median(time_at(draws, size) / draws.steps(np.array([float(size)]))[:, 0])

    expected = law_s(size, 0.02, 8000.0) if size <= 1024 else 3 * (law_s(1000, 0.02, 8000.0) - 0.002) + 0.002
    assert step_s == pytest.approx(expected, rel=0.06)


def test_interval_that_reaches_zero_is_wide_not_exact():
    touching_zero = noise(100.0).model_copy(update={"low": 0.0})

    wide, narrow = (np.log(_over_run(estimate, np.random.default_rng(1), 2048)).std() for estimate in (touching_zero, noise(100.0)))

    assert wide > 1.5 * narrow


def test_single_round_is_not_taken_as_exact():
    once = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in SIZES}, rounds=1))

    draws = draw_costs(**_arguments(step_time=once))

    assert np.log(draws.measured_time_s[:, 0]).std() == pytest.approx(0.05, rel=0.02)
