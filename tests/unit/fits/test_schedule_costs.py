"""The cost of a schedule equals numerical integrals and a run taken step by step."""

import math

import numpy as np
import pytest

from oracles.oracle_curves import law_s
from oracles.oracle_schedule import best_ratio_by_quadrature, costs_by_steps
from rightbatch.fits.schedule_costs import RunDraws
from rightbatch.records.schedule import GeometricGrowth, MilestoneSizes, NoiseAdaptive

TOTAL, REFERENCE, FIXED_S, RATE = 1_000_000, 64, 0.03, 8000.0
HALF = FIXED_S * RATE
SIZES = np.unique(np.round(np.geomspace(8, 16_384, 300)))
COURSES = {
    "flat": lambda x: 300.0 + 0 * x,
    "root": lambda x: 20.0 + 2.0 * np.sqrt(x),
    "square": lambda x: 5.0 + 4000.0 * (x / TOTAL) ** 2,
}


def run(course, cells=2000):
    at = (np.arange(cells) + 0.5) * TOTAL / cells
    return RunDraws.along(course(at)[None, :], REFERENCE, TOTAL, SIZES, law_s(SIZES, FIXED_S, RATE)[None, :])


@pytest.mark.parametrize("name", COURSES)
def test_best_schedule_over_best_fixed_size_equals_the_integral(name):
    planted = run(COURSES[name])
    time_s, _ = planted.scheduled(planted.best())

    ratio = time_s[0] / planted.fixed()[0].min()

    assert ratio == pytest.approx(best_ratio_by_quadrature(COURSES[name], REFERENCE, TOTAL, FIXED_S, RATE), rel=1e-3)


def test_flat_noise_leaves_no_gain_and_steep_noise_does():
    flat, square = (best_ratio_by_quadrature(COURSES[name], REFERENCE, TOTAL, FIXED_S, RATE) for name in ("flat", "square"))

    assert flat == pytest.approx(1.0, abs=1e-6)
    assert square < 0.95


def test_no_course_of_noise_lets_a_schedule_halve_the_time():
    steep = run(lambda x: 1e-3 + 1e9 * (x / TOTAL) ** 12)
    time_s, _ = steep.scheduled(steep.best())

    assert 0.5 < time_s[0] / steep.fixed()[0].min() < 0.95


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize(
    "schedule",
    [
        GeometricGrowth(start=64, stop=1024, over_samples=TOTAL),
        MilestoneSizes(milestones=((0, 32), (100_000, 128), (600_000, 512))),
    ],
    ids=lambda schedule: schedule.kind,
)
def test_schedule_by_samples_costs_what_its_steps_add_up_to(name, schedule):
    from rightbatch.fits.batch_schedule import setting_at

    planted = run(COURSES[name])
    time_s, samples = planted.scheduled(planted.by_samples(schedule))

    expected_s, expected_samples = costs_by_steps(
        lambda seen, _: setting_at(schedule, int(seen)).global_batch_size,
        COURSES[name],
        REFERENCE,
        TOTAL,
        lambda size: law_s(size, FIXED_S, RATE),
    )
    assert time_s[0] == pytest.approx(expected_s, rel=0.02)
    assert samples[0] == pytest.approx(expected_samples, rel=0.02)


def test_fixed_size_costs_what_its_steps_add_up_to():
    planted = run(COURSES["root"])
    column = int(np.searchsorted(SIZES, 256))
    size = float(SIZES[column])
    expected_s, expected_samples = costs_by_steps(
        lambda *_: size, COURSES["root"], REFERENCE, TOTAL, lambda size: law_s(size, FIXED_S, RATE)
    )
    time_s, samples = planted.fixed()

    assert time_s[0, column] == pytest.approx(expected_s, rel=0.005)
    assert samples[0, column] == pytest.approx(expected_samples, rel=0.005)


def test_noise_adaptive_rule_with_the_right_calibration_comes_to_the_best_schedule():
    planted = run(COURSES["square"])
    schedule = NoiseAdaptive(start=64, smallest=8, largest=16_384, half_saturation=HALF, calibration=2.0)
    chosen = planted.by_noise(schedule, 1.0)

    assert planted.sizes[chosen] == pytest.approx(np.clip(np.sqrt(planted.critical * HALF), 8, 16_384), rel=0.03)
    assert planted.scheduled(chosen)[0][0] == pytest.approx(planted.scheduled(planted.best())[0][0], rel=0.002)


def test_wrong_calibration_costs_what_the_stop_rule_says():
    planted = run(COURSES["flat"])
    schedule = NoiseAdaptive(start=64, smallest=1, largest=16_384, half_saturation=HALF, calibration=4.0)
    ratio = planted.scheduled(planted.by_noise(schedule, 4.0))[0][0] / planted.scheduled(planted.best())[0][0]

    critical = 300.0
    exact = (math.sqrt(FIXED_S) + math.sqrt(critical / RATE)) ** 2
    size = math.sqrt(4 * critical * HALF)
    assert ratio == pytest.approx((1 + critical / size) * (FIXED_S + size / RATE) / exact, rel=0.01)
