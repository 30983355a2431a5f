import numpy as np
import pytest

from rightbatch.fits.loader import fit_loader
from rightbatch.records.estimates import Status
from rightbatch.records.measurements import LoaderMeasurements, LoaderPoint


def _measured(rates, configured=None):
    points = tuple(LoaderPoint(num_workers=n, batch_size=64, samples_per_s=(rate * 0.99, rate, rate * 1.01)) for n, rate in rates.items())
    return LoaderMeasurements(points=points, configured_num_workers=configured)


def test_fewest_workers_near_the_best_are_used():
    curve = fit_loader(_measured({0: 500.0, 2: 960.0, 4: 1000.0, 8: 990.0}))

    assert curve.num_workers == 2
    assert curve.samples_per_s.value == pytest.approx(np.median([950.4, 960.0, 969.6]))
    assert curve.status is Status.OK


def test_configured_workers_are_kept_and_a_better_number_is_said():
    curve = fit_loader(_measured({0: 500.0, 4: 1000.0}, configured=0))

    assert curve.num_workers == 0
    assert "4 would deliver 1000" in curve.remark


def test_configured_workers_that_were_not_measured_are_said():
    curve = fit_loader(_measured({0: 500.0, 4: 1000.0}, configured=3))

    assert curve.num_workers == 4
    assert "num_workers=3 was not measured" in curve.remark


def test_nothing_measured_is_indeterminate():
    curve = fit_loader(_measured({}, configured=3))

    assert curve.status is Status.INDETERMINATE
    assert (curve.num_workers, curve.samples_per_s.value) == (3, None)
