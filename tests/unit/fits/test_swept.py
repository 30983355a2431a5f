import numpy as np
import pytest

from planted_sweeps import Law, settings_of, summary, sweep
from rightbatch.fits.sweep import fit_sweep
from rightbatch.fits.swept import evidence_of, is_outside, swept_curves, with_swept_rate


def result_of(law, **changes):
    settings = settings_of(**changes)
    return fit_sweep(settings, summary(), sweep(law, settings), is_complete=True, device_name="planted")


@pytest.fixture(scope="module")
def evidence():
    return evidence_of(result_of(Law()), "rightbatch-runs/sweep")


def test_every_size_that_arrived_is_one_probe_at_its_tuned_rate(evidence):
    result = result_of(Law(largest=64))

    found = evidence_of(result, "x")

    assert [probe.global_batch_size for probe in found.probes] == [8, 16, 32, 64]
    assert [probe.lr for probe in found.probes] == [point.lr for point in result.points if point.lr is not None]
    assert all(0.05 <= probe.log_error < 0.2 for probe in found.probes)


def test_a_sweep_without_two_sizes_that_arrived_says_nothing():
    assert evidence_of(result_of(Law(largest=1), sizes=(32, 64)), "x") is None
    assert evidence_of(result_of(Law(largest=32), sizes=(32, 64), first_size=32), "x") is None


def test_draws_follow_the_swept_sizes(evidence):
    curves = swept_curves(evidence, np.random.default_rng(0), 512)

    growth = np.exp(curves.log_samples(np.array([8.0, 512.0])))
    ratio = growth[:, 1] / growth[:, 0]
    assert np.median(ratio) == pytest.approx((1 + 512 / 120) / (1 + 8 / 120), rel=0.15)


def test_sizes_outside_the_sweep_are_no_answer(evidence):
    assert [size for size in (4, 8, 100, 512, 1024) if is_outside(size, evidence)] == [4, 1024]
    assert not is_outside(4, None)


def test_the_rate_is_that_of_the_nearest_size(evidence):
    by_size = {probe.global_batch_size: probe.lr for probe in evidence.probes}

    near = with_swept_rate(summary(), evidence, 100)

    assert (near.lr, near.lr_batch_size, near.lr_is_tested) == (by_size[128], 128, True)
    assert with_swept_rate(summary(), None, 100) == summary()
