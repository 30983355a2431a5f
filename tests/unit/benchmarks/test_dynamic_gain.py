"""Seconds of a training by any clock, training by a schedule, and what counts as a forecast that came true."""

import math

import numpy as np
import pytest

import dynamic_gain as benchmark
import live_regret_workloads as workloads
from dynamic_gain_training import Samples, ScheduleTrainer, Trained, to_loss
from oracles.oracle_schedule import findings, noise_along
from rightbatch.fits.schedule_forecast import forecast_schedule
from rightbatch.fits.step_time import fit_step_time
from rightbatch.records.schedule import ConstantSize, GrowthForDecay, MilestoneSizes, NoiseAdaptive, SizeCoupling
from rightbatch.training.batch_schedule import DynamicBatch

COUPLING = SizeCoupling(base_batch_size=64, optimizer="SGD", noise_scale_samples=100.0)


def row(predicted, realised, *, worth_it):
    forecast = forecast_schedule(findings(noise_along(lambda _: 200.0, (0, 1000))), ConstantSize(global_batch_size=64), 2000)
    relative = forecast.relative_time.model_copy(update={"value": predicted})
    return benchmark.Row(
        workload="w",
        device="d",
        schedule="64",
        forecast=forecast.model_copy(update={"relative_time": relative, "worth_it": worth_it}),
        best_size=64,
        realised=realised,
        standard_error=0.01,
        fixed={64: 1.0},
        ends=(64, 64),
    )


def test_seconds_add_up_over_the_steps_and_the_last_step_counts_in_part():
    trained = Trained.of([64, 64, 128, 128, 128], 64 * 2 + 128 * 1.5)

    assert trained.steps == ((64, 2), (128, 2))
    assert trained.seconds(lambda size: 1.0 + size / 64) == pytest.approx(2 * 2.0 + 1.5 * 3.0)


def test_training_that_never_reached_its_target_takes_for_ever():
    assert Trained.of([64, 64], None).seconds(lambda _: 1.0) == math.inf


def test_simulated_clock_is_its_law_at_the_sizes_in_use():
    step_time_s = benchmark.clock(fit_step_time(benchmark.simulated(300)))

    assert [step_time_s(size) for size in (8, 64, 1024)] == pytest.approx([(300 + size) / 1e4 for size in (8, 64, 1024)])
    assert step_time_s(80) == pytest.approx(380 / 1e4, rel=0.005)
    assert step_time_s(2048) == pytest.approx(2 * step_time_s(1024))


def test_samples_come_once_an_epoch_whatever_the_sizes():
    samples = Samples(10, seed=0)
    taken = np.concatenate([samples.take(size) for size in (3, 4, 6, 7)])

    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))


@pytest.mark.slow
def test_training_by_milestones_changes_size_where_they_say_and_reaches_the_loss():
    train = ScheduleTrainer(to_loss(workloads.digits()), target_loss=1.5, lr=0.1)
    schedule = MilestoneSizes(milestones=((0, 32), (320, 64)), coupling=COUPLING)
    trained = train(DynamicBatch(schedule), 0, 20_000)

    assert trained.steps[0] == (32, 10)
    assert trained.steps[1][0] == 64
    assert 320 < trained.samples < 20_000


@pytest.mark.slow
def test_noise_adaptive_training_takes_decisions_from_its_own_noise():
    train = ScheduleTrainer(to_loss(workloads.digits()), target_loss=0.1, lr=0.1)
    adaptive = NoiseAdaptive(start=128, smallest=8, largest=128, half_saturation=4.0, calibration=1.0, coupling=COUPLING)
    schedule = DynamicBatch(adaptive)
    train(schedule, 0, 20_000)

    assert schedule.decisions
    assert schedule.decisions[-1].global_batch_size < 128


def test_fixed_sizes_divide_their_rate_where_the_schedule_grows():
    case = benchmark.CASES[-1]
    fixed = benchmark.fixed_schedule(case, 96, COUPLING)

    assert isinstance(fixed, GrowthForDecay)
    assert (fixed.start, fixed.largest, fixed.at_samples) == (96, 96, case.grow.at_samples)
    assert benchmark.fixed_schedule(benchmark.CASES[0], 96, COUPLING) == ConstantSize(global_batch_size=96, coupling=COUPLING)


def test_goals_hold_for_near_forecasts_and_right_verdicts_only():
    good = benchmark.goals([row(0.99, 1.02, worth_it=False), row(0.80, 0.84, worth_it=True)])
    bad = benchmark.goals([row(0.99, 0.92, worth_it=False), row(0.80, 1.01, worth_it=True)])

    assert [goal["holds"] for goal in good] == [True, True, True, True]
    assert [goal["holds"] for goal in bad] == [False, False, False, False]
    assert [goal["holds"] for goal in benchmark.goals([row(0.99, 1.0, worth_it=False)])] == [True, True, False]
