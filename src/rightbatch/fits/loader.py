"""Data loader: throughput by number of workers, and the number that the plan uses."""

import numpy as np

from rightbatch.fits.intervals import median_estimate
from rightbatch.records.estimates import Estimate, LoaderCurve, LoaderThroughput, Status
from rightbatch.records.measurements import LoaderMeasurements
from rightbatch.units import format_number

ENOUGH_OF_BEST = 0.05
"""The number of workers is the smallest whose throughput is within this fraction of the best."""
_BOOTSTRAP_SEED = 20240608


def fit_loader(measurements: LoaderMeasurements) -> LoaderCurve:
    """Median throughput for each number of workers, and the number to use.

    Returns:
        The workload's own number when it names one that was measured, else the smallest within 5 % of the best; ``INDETERMINATE``
        when nothing was measured.
    """
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    configured = measurements.configured_num_workers
    measured = sorted((point for point in measurements.points if point.samples_per_s), key=lambda point: point.num_workers)
    points = tuple(LoaderThroughput(num_workers=p.num_workers, samples_per_s=median_estimate(p.samples_per_s, rng)) for p in measured)
    if not points:
        return LoaderCurve(
            points=(),
            num_workers=configured or 0,
            samples_per_s=Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE),
            status=Status.INDETERMINATE,
            remark=measurements.remark or "The data loader was not measured.",
        )
    enough = (1 - ENOUGH_OF_BEST) * max(_rate(point) for point in points)
    advised = next(point for point in points if _rate(point) >= enough)
    own = next((point for point in points if point.num_workers == configured), None)
    used = own or advised
    remarks = [measurements.remark] if measurements.remark else []
    if configured is not None and own is None:
        remarks.append(f"num_workers={configured} was not measured; the figures are for {advised.num_workers}.")
    elif _rate(used) < enough:
        remarks.append(
            f"num_workers={used.num_workers} delivers {format_number(_rate(used))} samples/s; "
            f"{advised.num_workers} would deliver {format_number(_rate(advised))}."
        )
    return LoaderCurve(points=points, num_workers=used.num_workers, samples_per_s=used.samples_per_s, remark=" ".join(remarks))


def _rate(point: LoaderThroughput) -> float:
    return point.samples_per_s.value or 0.0
