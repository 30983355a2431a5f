import math

import pytest

from planted_sweeps import SIZES, Law, settings_of, step_time_s, summary, sweep
from rightbatch.fits.sweep import fit_sweep, probes_of, tune
from rightbatch.records.estimates import Status
from rightbatch.records.plan import BatchPlan
from rightbatch.records.sweep import SweepResult
from rightbatch.records.training import ProbeOutcome

STEP_TIMES = {size: step_time_s(size) for size in SIZES}


def result_of(law: Law, *, plan=None, step_times=STEP_TIMES, is_complete=True, keep=None, **changes) -> SweepResult:
    settings = settings_of(**changes)
    trials = sweep(law, settings)
    trials = trials if keep is None else [trial for trial in trials if keep(trial)]
    return fit_sweep(settings, summary(), trials, is_complete=is_complete, device_name="planted", step_times_s=step_times, plan=plan)


def test_the_critical_size_of_the_planted_law_lies_in_its_interval():
    held = 0
    for draw in range(20):
        critical = result_of(Law(draw=draw)).critical_batch_size
        held += critical.low <= 120 <= (critical.high or math.inf)

    assert held >= 18  # 95 % intervals: 17 or fewer of 20 have probability 0.016


def test_without_noise_the_hyperbola_is_the_planted_one():
    result = result_of(Law(noise=0.0, sharpness=0.0))

    assert result.critical_batch_size.value == pytest.approx(120, rel=0.01)
    assert result.fewest_samples == pytest.approx(4000, rel=0.01)
    assert result.fewest_steps == pytest.approx(4000 / 120, rel=0.01)
    assert result.fit_error < 0.01


def test_the_robust_curve_agrees_with_the_hyperbola_on_a_hyperbola():
    result = result_of(Law())

    robust = result.robust_critical_size
    assert robust.low < 120 < robust.high
    assert all(point.low <= point.samples <= point.high for point in result.band)
    smallest = result.band[0]
    assert smallest.low < 4000 * (1 + 8 / 120) < smallest.high * 1.1


def test_each_size_is_judged_at_the_rate_of_least_mean_samples():
    law, settings = Law(noise=0.0), settings_of()
    trials = sweep(law, settings)

    for size in SIZES:
        tuned = tune(settings, trials, size)
        means = {}
        for trial in trials:
            if trial.spec.global_batch_size == size and trial.samples_to_target is not None:
                means.setdefault(trial.spec.lr, []).append(trial.samples_to_target)
        full = {lr: sum(values) / 3 for lr, values in means.items() if len(values) == 3}
        assert tuned.lr == min(full, key=full.get)
        assert tuned.is_complete


def test_a_rate_that_failed_on_a_seed_loses_against_one_that_did_not():
    class Failing(Law):
        def samples(self, spec):
            return math.inf if spec.lr > 0.15 and spec.seed == 2 else super().samples(spec)

    result = result_of(Failing(most_lr=0.4, noise=0.0), sizes=(256,), first_size=256)

    assert result.points[0].lr <= 0.15
    assert result.points[0].samples.n == 3


def test_seconds_are_steps_times_the_step_time_measured_alone():
    result = result_of(Law(), step_times={size: 2 * step_time_s(size) for size in SIZES})

    assert result.time_source == "alone"
    for point in result.points:
        assert point.seconds.value == pytest.approx(point.steps.value * 2 * step_time_s(point.global_batch_size))
        assert point.measured_seconds.value == pytest.approx(point.seconds.value / 2, rel=0.05)


def test_without_step_times_seconds_come_from_the_trials_and_that_is_said():
    assert result_of(Law(), step_times=None).time_source == "side by side"


def test_the_best_size_is_that_of_least_time():
    result = result_of(Law(noise=0.0, sharpness=0.0))

    times = {size: (1 + 120 / size) * step_time_s(size) for size in SIZES}
    assert result.best_size == min(times, key=times.get)
    assert result.best_size in result.equivalent_sizes


def test_the_regret_of_a_plan_is_its_time_over_the_least():
    result = result_of(Law(noise=0.0, sharpness=0.0), plan=BatchPlan(global_batch_size=512, micro_batch_size=512, lr=0.3))

    times = {size: (1 + 120 / size) * step_time_s(size) for size in SIZES}
    assert result.plan.regret.value == pytest.approx(times[512] / min(times.values()) - 1, rel=0.02)
    assert not result.plan.is_interpolated


def test_a_plan_at_the_best_size_loses_nothing_whatever_the_spread_between_seeds():
    best = result_of(Law()).best_size

    result = result_of(Law(), plan=BatchPlan(global_batch_size=best, micro_batch_size=best))

    assert (result.plan.regret.low, result.plan.regret.value, result.plan.regret.high) == (0, 0, 0)


def test_the_regret_of_a_plan_between_two_sizes_is_interpolated():
    result = result_of(Law(noise=0.0, sharpness=0.0), plan=BatchPlan(global_batch_size=362, micro_batch_size=362))

    times = {size: (1 + 120 / size) * step_time_s(size) for size in (*SIZES, 362)}
    assert result.plan.is_interpolated
    assert result.plan.regret.value == pytest.approx(times[362] / min(times[size] for size in SIZES) - 1, abs=0.03)


def test_a_plan_outside_the_sizes_has_no_regret():
    assert result_of(Law(), plan=BatchPlan(global_batch_size=4, micro_batch_size=4)).plan is None


def test_where_no_size_arrives_nothing_is_concluded():
    result = result_of(Law(largest=1), sizes=(32, 64))

    assert result.status == "never"
    assert [point.status for point in result.points] == ["never", "never"]
    assert result.critical_batch_size.status is Status.INDETERMINATE
    assert result.best_size is None


def test_sizes_that_never_arrive_say_that_they_need_more():
    settings = settings_of()
    trials = sweep(Law(largest=64), settings)

    stopped = [probe for probe in probes_of(settings, trials, is_complete=True) if probe.outcome is ProbeOutcome.STOPPED]

    assert [probe.global_batch_size for probe in stopped] == [128]


def test_a_size_where_every_rate_fails_on_a_seed_is_unsteady_and_no_part_of_the_curve():
    class Failing(Law):
        def samples(self, spec):
            return math.inf if (spec.global_batch_size, spec.seed) == (512, 2) else super().samples(spec)

    result = result_of(Failing(noise=0.0, sharpness=0.0))

    assert result.points[-1].status == "unsteady"
    assert result.points[-1].samples.value is None
    assert result.critical_batch_size.value == pytest.approx(120, rel=0.01)


def test_a_sweep_that_was_ended_early_is_partial():
    result = result_of(Law(), is_complete=False, keep=lambda trial: trial.spec.seed < 2)

    assert result.status == "partial"
    assert {point.status for point in result.points} == {"partial"}


def test_with_one_seed_and_two_sizes_there_is_no_interval():
    result = result_of(Law(), seeds=1, sizes=(32, 64))

    assert result.critical_batch_size.value is not None
    assert result.critical_batch_size.low is None
    assert any("One seed" in remark for remark in result.remarks)


def test_a_curve_that_never_bends_gives_a_lower_bound():
    critical = result_of(Law(critical=1e9, saturation=1.0, noise=0.03)).critical_batch_size

    assert critical.status is Status.AT_LEAST
    assert critical.low > 512
    assert critical.high is None


def test_samples_that_grow_faster_than_the_size_are_no_hyperbola():
    class Steep(Law):
        def samples(self, spec):
            return super().samples(spec) * (spec.global_batch_size / 64) ** 1.4

    result = result_of(Steep(critical=1e6, noise=0.0, sharpness=0.0), sizes=(32, 64, 128))

    assert result.critical_batch_size.value is None
    assert result.critical_batch_size.status is Status.INDETERMINATE
    assert (result.fewest_samples, result.fewest_steps) == (None, None)


def test_metrics_are_compared_at_samples_that_every_size_had():
    result = result_of(Law(noise=0.0, sharpness=0.0))

    at_equal = [point.metric_at_equal_samples.value for point in result.points]
    assert at_equal[0] == pytest.approx(0.97)
    assert at_equal == sorted(at_equal, reverse=True)


def test_the_grid_counts_all_rates_at_all_sizes_with_all_seeds():
    settings = settings_of(sizes=(32, 64))
    trials = sweep(Law(noise=0.0), settings)

    result = fit_sweep(settings, summary(), trials, is_complete=True, device_name="planted")

    rates = {trial.spec.lr for trial in trials}
    expected = 3 * len(rates) * sum(point.samples.value for point in result.points)
    assert result.grid_samples == pytest.approx(expected, abs=1)


def test_a_result_reads_back_as_it_was_written():
    result = result_of(Law())

    assert SweepResult.model_validate_json(result.model_dump_json(), strict=True) == result
