import re

import numpy as np
import pytest

from oracles.oracle_curves import QUIET, law_s, timed
from rightbatch.fits.step_time import candidate_sizes, fit_law, fit_step_time, is_decided
from rightbatch.records.estimates import Status

SIZES = (1, 4, 16, 64, 128, 256, 1024, 4096)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 4.0])
def test_planted_law_is_recovered(exponent):
    curve = fit_step_time(timed({b: law_s(b, 0.02, 8000.0, exponent) for b in SIZES}))

    assert curve.status is Status.OK
    assert curve.fixed_time_s == pytest.approx(0.02, rel=0.01)
    assert curve.saturated_samples_per_s == pytest.approx(8000, rel=0.01)
    assert curve.exponent == pytest.approx(exponent, rel=0.03)
    assert curve.half_saturation == pytest.approx(160, rel=0.02)
    assert curve.fit_error < 0.01


def test_fit_is_no_worse_than_a_search_over_a_grid():
    sizes = np.array([4.0, 16, 64, 256])
    times_s = np.array([0.011, 0.012, 0.019, 0.055])
    law = fit_law(sizes, times_s)

    def loss(fixed_s, rate, exponent):
        return sum(np.log(law_s(b, fixed_s, rate, exponent) / t) ** 2 for b, t in zip(sizes, times_s, strict=True))

    grid = min(loss(f, r, p) for f in np.linspace(0.008, 0.013, 21) for r in np.linspace(3500, 6500, 31) for p in np.linspace(1, 8, 29))
    assert loss(law.fixed_time_s, law.saturated_samples_per_s, law.exponent) <= grid * 1.01 + 1e-6


def test_two_sizes_give_the_affine_law_and_one_gives_none():
    law = fit_law(np.array([8.0, 80.0]), np.array([0.018, 0.09]))

    assert law.exponent == pytest.approx(1.0)
    assert law.fixed_time_s == pytest.approx(0.01, rel=1e-3)
    assert fit_step_time(timed({8: 0.01})).fixed_time_s is None


def test_knee_is_the_smallest_measured_size_near_the_best_throughput():
    curve = fit_step_time(timed({32: 0.032, 64: 0.05, 128: 0.0815, 256: 0.16, 512: 0.33}))

    assert curve.knee == 128
    assert curve.best == 256


def test_median_and_interval_stand_for_the_rounds():
    measurements = timed({8: 0.01}, rounds=41, jitter=0.05, seed=3)

    estimate = fit_step_time(measurements).points[0].step_time_s

    assert estimate.value == pytest.approx(np.median(measurements.points[0].step_times_s))
    assert estimate.low < estimate.value < estimate.high
    assert estimate.high / estimate.low < 1.08


def test_bootstrap_interval_covers_the_median():
    covered = 0
    for seed in range(300):
        estimate = fit_step_time(timed({8: 0.01}, rounds=21, jitter=0.05, seed=seed)).points[0].step_time_s
        covered += estimate.low <= 0.01 <= estimate.high

    assert 0.91 <= covered / 300 <= 0.99


def test_busy_machine_is_unstable_with_its_reason():
    busy = QUIET.model_copy(update={"reasons": ("Load average 8 on 4 cores.",)})

    curve = fit_step_time(timed({8: 0.01, 16: 0.02}, contention=busy))

    assert curve.status is Status.UNSTABLE
    assert curve.reasons == ("Load average 8 on 4 cores.",)
    assert curve.knee == 8


def test_rounds_that_disagree_are_unstable():
    curve = fit_step_time(timed({8: 0.01, 16: 0.02}, jitter=0.8, seed=1))

    assert curve.status is Status.UNSTABLE
    (reason,) = curve.reasons
    assert re.fullmatch(r"Rounds differ by \d+ to \d+ % \(median absolute deviation\) at batch 8, 16\.", reason)


def test_one_size_at_which_rounds_disagree_is_named_alone():
    steady = timed({8: 0.01, 16: 0.02})
    first, second = steady.points
    shaky = second.model_copy(update={"step_times_s": (0.01, 0.02, 0.03, 0.04, 0.05)})

    (reason, *_) = fit_step_time(steady.model_copy(update={"points": (first, shaky)})).reasons

    assert reason == "Rounds differ by 33 % (median absolute deviation) at batch 16."


def test_law_that_misses_leaves_the_knee():
    curve = fit_step_time(timed({8: 0.01, 16: 0.05, 32: 0.011, 64: 0.06}))

    assert curve.status is Status.INCONSISTENT
    assert curve.knee == 32
    assert "fitted curve misses" in curve.reasons[0]


def test_nothing_timed_is_indeterminate():
    curve = fit_step_time(timed({}))

    assert curve.status is Status.INDETERMINATE
    assert (curve.knee, curve.best) == (None, None)


def test_candidates_surround_the_knee_and_include_the_ceiling():
    scan = [(2**k, law_s(2**k, 0.02, 8000.0, 4.0)) for k in range(12)]

    sizes = candidate_sizes(scan, largest=1640, must_include=(100, 5000))

    assert len(sizes) == 8
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == 1640
    assert 100 in sizes
    assert 256 in sizes


def test_candidates_without_a_scan_descend_from_the_largest():
    assert candidate_sizes([], largest=32) == (1, 2, 4, 8, 16, 32)
    assert candidate_sizes([(1, 0.1)], largest=1) == (1,)


def test_precise_rounds_are_decided_and_few_are_not():
    times_s = {b: law_s(b, 0.02, 8000.0) for b in SIZES}

    assert is_decided(timed(times_s, rounds=5))
    assert not is_decided(timed(times_s, rounds=4))


def test_noisy_rounds_are_decided_only_when_the_knee_cannot_change():
    far_apart = {8: 0.01, 64: 0.011}
    close = {64: 0.0100, 128: 0.0194}

    assert is_decided(timed(far_apart, jitter=0.06, rounds=7))
    assert not is_decided(timed(close, jitter=0.06, rounds=7))
