"""Powers of two are compared with the sizes beside them, in the rounds that timed them together."""

import numpy as np
import pytest

from oracles.oracle_curves import timed
from rightbatch.fits.power_of_two import fit_power_of_two, neighbours
from rightbatch.fits.step_time import fit_step_time
from rightbatch.records.measurements import StepTimePoint


def planted(speed_up, *, rounds=15, jitter=0.0, drift=0.0):
    """Times of an affine law, the power faster by a factor, under jitter of each round and size and a drift that all share."""
    rng = np.random.default_rng(0)
    shared = np.exp(drift * rng.standard_normal(rounds))
    points = []
    for size in (127, 128, 129, 136):
        seconds = (0.01 + size / 10_000) * (speed_up if size == 128 else 1.0)
        own = np.exp(jitter * rng.standard_normal(rounds))
        points.append(StepTimePoint(micro_batch_size=size, step_times_s=tuple(float(value) for value in seconds * shared * own)))
    return tuple(points)


@pytest.mark.parametrize(
    ("knee", "largest", "expected"),
    [
        (128, 1000, (127, 128, 129, 136)),
        (200, 1000, (127, 128, 129, 136)),
        (128, 135, (63, 64, 65, 72)),
        (16, 24, (15, 16, 17, 24)),
        (16, 23, ()),
        (8, 1000, ()),
        (1, 1, ()),
    ],
)
def test_neighbours_stand_beside_the_power_of_two_below_the_knee(knee, largest, expected):
    assert neighbours(knee, largest) == expected


def test_smooth_law_makes_the_power_neither_faster_nor_slower():
    test = fit_power_of_two(planted(1.0))

    assert (test.size, test.multiple_of_eight) == (128, 136)
    assert test.relative_time.value == pytest.approx(1.0)
    assert test.multiple_relative_time.value == pytest.approx((0.01 / 136 + 1e-4) / (0.01 / 128 + 1e-4))


@pytest.mark.parametrize("speed_up", [0.95, 1.08])
def test_planted_advantage_is_recovered_through_jitter_and_a_drifting_machine(speed_up):
    test = fit_power_of_two(planted(speed_up, jitter=0.01, drift=0.3))

    assert test.relative_time.low < speed_up < test.relative_time.high
    assert test.relative_time.high - test.relative_time.low < 0.03
    assert (test.relative_time.high < 1) == (speed_up < 1)


def test_nothing_timed_gives_no_verdict():
    assert fit_power_of_two(()) is None


def test_step_time_curve_carries_the_verdict():
    measurements = timed({64: 0.01, 128: 0.02}).model_copy(update={"neighbours": planted(0.9)})
    assert fit_step_time(measurements).power_of_two.relative_time.value == pytest.approx(0.9)
    assert fit_step_time(timed({64: 0.01, 128: 0.02})).power_of_two is None
