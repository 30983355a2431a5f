"""The course of the noise follows snapshots where they lie, and the prior beyond them."""

import numpy as np
import pytest

from oracles.oracle_schedule import noise_along
from rightbatch.fits.critical_batch import AT_LEAST_LOG_SD, GROWTH_WITH_PILOT_MEDIAN
from rightbatch.fits.noise_course import CELLS, draw_noise_course
from rightbatch.records.estimates import NoiseScale, Status

TOTAL = 100_000
MIDDLES = (np.arange(CELLS) + 0.5) / CELLS * TOTAL


def draws(noise, total=TOTAL):
    return draw_noise_course(noise, total, np.random.default_rng(0), 2048)


def rising(x):
    return 30.0 * (1 + x / 5000)


def test_snapshots_along_a_finished_run_give_back_the_planted_course():
    course = draws(noise_along(rising, range(0, TOTAL + 1, TOTAL // 24)))

    errors = np.log(np.median(course, axis=0) / rising(MIDDLES))
    assert np.abs(errors).max() < 0.3
    assert np.median(course[:, -1] / course[:, 0]) == pytest.approx(rising(MIDDLES[-1]) / rising(MIDDLES[0]), rel=0.4)


def test_planted_course_lies_inside_the_interval_of_a_pilot():
    course = draws(noise_along(rising, (0, 1000, 3000, 10_000)))

    low, high = np.percentile(course, [2.5, 97.5], axis=0)
    assert ((low < rising(MIDDLES)) & (rising(MIDDLES) < high)).all()


def test_run_beyond_a_flat_pilot_grows_less_than_the_prior_and_is_uncertain():
    course = draws(noise_along(lambda _: 100.0, (0, 1000, 3000, 10_000)))

    last = course[:, -1]
    assert 100 < np.median(last) < 100 * GROWTH_WITH_PILOT_MEDIAN**2
    assert np.log(last).std() > np.log(course[:, 4]).std()


def test_value_without_snapshots_and_a_bound_are_enough():
    bare = noise_along(lambda _: 100.0, (10_000,)).model_copy(update={"snapshots": ()})
    bound = noise_along(lambda _: 100.0, (0, 10_000), status=Status.AT_LEAST)

    assert np.median(draws(bare, 20_000)) == pytest.approx(110, rel=0.4)
    assert np.median(draws(bound, 20_000)) > 200
    assert np.log(draws(bound, 20_000)[:, 0]).std() > 0.3 * AT_LEAST_LOG_SD


def test_noise_that_says_nothing_gives_no_course():
    silent = NoiseScale(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE, snapshots=(), pilot_samples=0)

    assert draws(silent) is None
