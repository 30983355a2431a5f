import math

import numpy as np
import pytest

from rightbatch.fits.branch import fit_branches, has_stalled, judged, log_error, log_ratio, monotone, samples_to_loss, target_loss
from rightbatch.records.estimates import Status
from rightbatch.records.training import BranchMeasurements, BranchProbe, ProbeOutcome, TrainingProbe


def falling(rate=1.0, *, points=16, interval=100, noise=0.0, seed=0, floor=0.0):
    """A loss that falls with the logarithm of the samples, ``rate`` times as fast."""
    rng = np.random.default_rng(seed)
    at = interval * np.arange(1, points + 1)
    return tuple((int(s), float(max(2 - 0.2 * math.log(rate * s), floor) + noise * rng.standard_normal())) for s in at)


def probe(size, losses, *, outcome=ProbeOutcome.STOPPED, samples=1000.0):
    result = TrainingProbe(global_batch_size=size, lr=0.1, outcome=outcome, samples=samples)
    return BranchProbe(micro_batch_size=size, accumulation_steps=1, result=result, losses=losses)


def test_monotone_curve_never_rises_and_keeps_a_falling_one():
    curve = falling(noise=0.05)

    losses = [loss for _, loss in monotone(curve)]

    assert losses == sorted(losses, reverse=True)
    assert np.mean(losses) != losses[0]
    assert monotone(falling()) == falling()


def test_rising_losses_are_pooled_to_their_mean_at_their_mean_samples():
    assert monotone(((100, 3.0), (200, 1.0), (300, 2.0))) == ((100.0, 3.0), (250.0, 1.5))


def test_crossing_is_interpolated_between_levels():
    assert samples_to_loss(((100, 3.0), (200, 1.0)), 2.0) == 150.0


def test_a_loss_that_is_never_reached_has_no_crossing():
    assert samples_to_loss(falling(), 0.1) is None


def test_a_curve_that_starts_below_the_loss_crosses_it_at_its_first_level():
    assert samples_to_loss(((100, 1.0), (200, 0.5)), 2.0) == 100.0


@pytest.mark.parametrize("rate", [0.5, 0.8, 1.25, 2.0])
def test_a_planted_ratio_of_samples_is_recovered(rate):
    first = falling(points=32, noise=0.002, seed=1)
    target = target_loss(first)

    ratio = samples_to_loss(falling(rate, points=80, noise=0.002, seed=2), target) / samples_to_loss(first, target)

    assert ratio == pytest.approx(1 / rate, rel=0.12)


@pytest.mark.parametrize("rate", [0.5, 0.8, 1.25, 2.0])
def test_a_planted_ratio_is_the_mean_over_many_losses(rate):
    assert log_ratio(falling(rate, points=80), falling(points=40)) == pytest.approx(-math.log(rate), abs=0.03)


def test_the_mean_over_many_losses_scatters_less_than_one_crossing():
    pairs = [(falling(points=32, noise=0.01, seed=seed), falling(points=32, noise=0.01, seed=1000 + seed)) for seed in range(100)]
    target = [2 - 0.2 * math.log(0.7 * 3200)] * len(pairs)

    means = [log_ratio(curve, first) for curve, first in pairs]
    single = [math.log(samples_to_loss(curve, t) / samples_to_loss(first, t)) for (curve, first), t in zip(pairs, target, strict=True)]

    assert np.std(means) < 0.9 * np.std(single)


def test_a_branch_that_was_stopped_short_is_compared_as_far_as_it_came():
    first = falling(points=40)

    assert log_ratio(falling(0.8, points=40), first) == pytest.approx(math.log(1 / 0.8), abs=0.05)
    assert log_ratio(falling(0.3, points=40), first) is None


def test_target_is_the_loss_after_most_of_the_first_branch():
    assert target_loss(falling(points=20)) == pytest.approx(2 - 0.2 * math.log(1700))


@pytest.mark.parametrize(
    "losses",
    [
        tuple((100 * i, 1.0 + 0.1 * (-1) ** i) for i in range(1, 17)),
        tuple((100 * i, math.nan) for i in range(1, 17)),
        falling(points=3),
        tuple((100 * i, 1.0 - 0.01 * i + 0.1 * (-1) ** i) for i in range(1, 17)),  # a fall of 1.2 times the scatter
    ],
)
def test_no_target_without_a_fall_that_can_be_told_from_the_scatter(losses):
    assert target_loss(losses) is None


def test_a_fall_of_three_times_the_scatter_is_a_target():
    losses = tuple((100 * i, 1.0 - 0.025 * i + 0.1 * (-1) ** i) for i in range(1, 17))

    assert target_loss(losses) == pytest.approx(1.0 - 0.025 * 13.6, abs=0.05)


def test_a_branch_above_a_floor_has_stalled_where_the_first_one_went_on():
    first = falling(points=30)

    assert has_stalled(falling(points=24, floor=0.62), first)
    assert not has_stalled(falling(0.8, points=24), first)


def test_judged_tells_diverged_and_stalled_from_slow():
    first = falling(points=30)
    target = target_loss(first)

    assert judged(probe(512, tuple((100 * i, 2.0 + i) for i in range(1, 9))), first=first, loss=target) is ProbeOutcome.FAILED
    assert judged(probe(512, falling(points=24, floor=0.62)), first=first, loss=target) is ProbeOutcome.FAILED
    assert judged(probe(512, falling(0.6, points=24)), first=first, loss=target) is ProbeOutcome.STOPPED


def test_curve_is_relative_to_the_first_branch():
    probes = (
        probe(64, falling(), outcome=ProbeOutcome.REACHED, samples=1000.0),
        probe(128, falling(), outcome=ProbeOutcome.REACHED, samples=1500.0),
    )
    measured = BranchMeasurements(checkpoint_samples=1000, checkpoint_batch_size=64, evaluated_samples=100, target_loss=0.6, probes=probes)

    curve = fit_branches(measured, None)

    assert curve.status is Status.OK
    assert [point.relative_samples for point in curve.points] == [1.0, 1.5]
    assert fit_branches(measured.model_copy(update={"probes": probes[:1]}), None).status is Status.INDETERMINATE


def test_samples_read_off_a_noisier_curve_have_a_larger_error():
    quiet, loud = (log_error(falling(points=32, noise=noise, seed=3)) for noise in (0.02, 0.1))

    assert log_error(falling()) == pytest.approx(0, abs=1e-12)
    assert 0 < quiet < 0.5 * loud


def test_that_error_is_about_the_scatter_of_the_samples_that_are_read_off():
    target = 2 - 0.2 * math.log(2000)
    curves = [falling(points=32, noise=0.01, seed=seed) for seed in range(200)]

    scatter = np.std([math.log(samples_to_loss(curve, target)) for curve in curves])

    assert np.median([log_error(curve) for curve in curves]) == pytest.approx(scatter, rel=0.5)
