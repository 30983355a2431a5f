import math

import numpy as np
import pytest

from rightbatch.fits.robust_curve import robust_curve
from rightbatch.fits.samples_curve import PRIORS, draw_curves, weigh
from rightbatch.records.training import ProbeOutcome, TrainingProbe


def probe(size, samples, outcome=ProbeOutcome.REACHED, seed=0):
    return TrainingProbe(global_batch_size=size, samples=samples, outcome=outcome, seed=seed)


def oracle(probes, middle):
    """Quantiles of B_c by weighing many draws of whole curves, each with a discrepancy of its own."""
    draws = draw_curves(PRIORS["tuned"], middle=middle, rng=np.random.default_rng(1), n_draws=60_000)
    weights = weigh(draws, probes).weights
    order = np.argsort(draws.log_critical)
    share = np.cumsum(weights[order])
    return [float(draws.log_critical[order][np.searchsorted(share, level)]) for level in (0.025, 0.5, 0.975)]


@pytest.mark.parametrize(
    "probes",
    [
        (probe(16, 4400.0), probe(256, 9800.0)),
        (probe(16, 4400.0), probe(16, 4000.0, seed=1), probe(128, 7600.0), probe(1024, 39_000.0)),
        (probe(16, 4400.0), probe(64, 5200.0), probe(1024, 30_000.0, ProbeOutcome.STOPPED)),
    ],
)
def test_the_critical_size_agrees_with_weighing_draws_of_whole_curves(probes):
    critical, _ = robust_curve(probes, middle=64, rng=np.random.default_rng(0))

    low, median, high = oracle(probes, middle=64)
    spread = high - low
    assert math.log(critical.value) == pytest.approx(median, abs=0.08 * spread)
    assert math.log(critical.low) == pytest.approx(low, abs=0.12 * spread)
    assert math.log(critical.high) == pytest.approx(high, abs=0.12 * spread)


def test_the_curve_passes_through_sizes_with_many_seeds():
    rng = np.random.default_rng(0)
    samples = {16: 4500.0, 64: 6100.0, 256: 12_500.0}
    probes = [probe(size, mean * math.exp(0.05 * rng.standard_normal()), seed=seed) for size, mean in samples.items() for seed in range(9)]

    _, band = robust_curve(probes, middle=64, rng=rng)

    for size, mean in samples.items():
        nearest = min(band, key=lambda point: abs(math.log(point.global_batch_size / size)))
        assert nearest.low * 0.97 < mean < nearest.high * 1.03
        assert nearest.high / nearest.low < 1.25


def test_one_size_says_nothing_of_the_curve():
    critical, band = robust_curve((probe(16, 4400.0),), middle=64, rng=np.random.default_rng(0))

    assert critical.value is None
    assert band == ()
