"""The forecast finds the gain of a planted run, refuses what it cannot know, and says why a schedule does not pay."""

import numpy as np
import pytest

from oracles.oracle_curves import law_s, timed
from oracles.oracle_schedule import best_ratio_by_quadrature, findings, noise_along
from rightbatch.fits import schedule_forecast
from rightbatch.fits.schedule_forecast import WORTH_IT, forecast_schedule
from rightbatch.fits.step_time import fit_step_time
from rightbatch.records.estimates import BranchCurve, Estimate, Status, Tradeoff
from rightbatch.records.plan import Constraints
from rightbatch.records.schedule import ConstantSize, GeometricGrowth, GrowthForDecay, NoiseAdaptive, ScheduleForecast

TOTAL = 200_000
POSITIONS = range(0, TOTAL + 1, TOTAL // 24)


def steep(x):
    return 10.0 + 8000.0 * (x / TOTAL) ** 2


def flat(_):
    return 200.0


def adaptive(**changes):
    base = {"start": 64, "smallest": 16, "largest": 2048, "half_saturation": 160.0, "calibration": 1.3}
    return NoiseAdaptive(**{**base, **changes})


def test_forecast_equals_the_integral_when_little_is_uncertain(monkeypatch):
    monkeypatch.setattr(schedule_forecast, "CALIBRATION_LOG_SD", 1e-6)
    given = findings(noise_along(steep, POSITIONS), sizes=tuple(2**power for power in range(15)))
    forecast = forecast_schedule(given, adaptive(smallest=1, largest=2**14), TOTAL)

    exact = best_ratio_by_quadrature(lambda x: 1.3 * steep(x), 64, TOTAL, 0.02, 8000.0)
    assert exact < 0.9
    assert forecast.relative_time.value == pytest.approx(exact, abs=0.03)
    assert forecast.relative_time.low < exact < forecast.relative_time.high


def test_steep_noise_is_worth_a_schedule_and_says_why():
    forecast = forecast_schedule(findings(noise_along(steep, POSITIONS)), adaptive(), TOTAL)

    assert forecast.worth_it
    assert forecast.relative_time.value <= WORTH_IT
    assert forecast.first_size < forecast.best_fixed_size < forecast.last_size
    assert forecast.reasons[0].startswith("Worth it: ")


def test_flat_noise_is_not_worth_a_schedule_and_says_why():
    forecast = forecast_schedule(findings(noise_along(flat, POSITIONS)), adaptive(), TOTAL)

    assert not forecast.worth_it
    assert forecast.relative_time.value == pytest.approx(1.0, abs=0.04)
    assert "one size suits all of it" in " ".join(forecast.reasons)


def test_schedule_with_a_calibration_far_from_the_belief_is_forecast_to_lose():
    given = findings(noise_along(flat, POSITIONS))

    assert forecast_schedule(given, adaptive(calibration=1.3 * 16), TOTAL).relative_time.value > 1.15


def test_schedule_against_the_noise_is_told_from_one_that_could_pay():
    shrinking = GeometricGrowth(start=2048, stop=16, over_samples=TOTAL)
    forecast = forecast_schedule(findings(noise_along(steep, POSITIONS)), shrinking, TOTAL)

    assert forecast.relative_time.value > 1.2
    assert "this one does not follow the noise" in " ".join(forecast.reasons)


def off_the_law(sizes=(16, 32, 64, 128, 256, 512, 1024)):
    """Step times of which one is three times what any smooth law allows."""
    curve = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) * (3 if b == sizes[3] else 1) for b in sizes}))
    assert curve.status is Status.INCONSISTENT
    return curve


def test_step_times_that_no_law_fits_still_forecast_a_schedule_between_timed_sizes():
    given, curve = findings(noise_along(steep, POSITIONS)), off_the_law()
    forecast = forecast_schedule(given, adaptive(), TOTAL, step_time=curve)
    without_law = curve.model_copy(update={"fixed_time_s": None, "saturated_samples_per_s": None, "exponent": None})

    assert forecast.status is Status.OK
    assert forecast == forecast_schedule(given, adaptive(), TOTAL, step_time=without_law)
    assert forecast != forecast_schedule(given, adaptive(), TOTAL)


@pytest.mark.parametrize(
    "schedule",
    [
        GeometricGrowth(start=8, stop=512, over_samples=TOTAL),
        GrowthForDecay(start=8, factor=2.0, at_samples=(TOTAL // 2,), largest=512),
        ConstantSize(global_batch_size=8),
    ],
)
def test_step_times_that_no_law_fits_forecast_nothing_below_the_smallest_timed_size(schedule):
    given = findings(noise_along(steep, POSITIONS))

    assert forecast_schedule(given, schedule, TOTAL).status is Status.OK
    refused = forecast_schedule(given, schedule, TOTAL, step_time=off_the_law())
    assert refused.status is Status.INDETERMINATE
    assert "keep the batch at 16 or more" in refused.reasons[0]


def test_expensive_step_leaves_the_largest_size_best_and_says_so():
    given = findings(noise_along(flat, POSITIONS), fixed_s=30.0, sizes=(16, 32, 64), constraints=Constraints(max_global_batch_size=64))
    forecast = forecast_schedule(given, adaptive(half_saturation=240_000.0, largest=64), TOTAL)

    assert not forecast.worth_it
    assert "is best for most of the run: memory or the dataset" in " ".join(forecast.reasons)


def test_cheap_step_leaves_the_smallest_size_best_and_says_so():
    small = noise_along(lambda _: 2.0, POSITIONS)
    forecast = forecast_schedule(findings(small, fixed_s=1e-6, sizes=(64, 128, 256)), adaptive(start=64, smallest=64), TOTAL)

    assert not forecast.worth_it
    assert "a step costs little besides its samples" in " ".join(forecast.reasons)


def test_constant_schedule_never_beats_the_best_fixed_size():
    forecast = forecast_schedule(findings(noise_along(steep, POSITIONS)), ConstantSize(global_batch_size=256), TOTAL)

    assert forecast.relative_time.low >= 1 - 1e-9
    assert (forecast.first_size, forecast.last_size) == (256, 256)


def test_noise_of_a_finished_run_and_another_device_replace_what_was_found():
    pilot = findings(noise_along(flat, (0, 1000, 5000)), fixed_s=1e-6)
    device = findings(noise_along(flat, (0, 1000, 5000))).step_time

    assert not forecast_schedule(pilot, adaptive(), TOTAL).worth_it
    assert forecast_schedule(pilot, adaptive(), TOTAL, noise=noise_along(steep, POSITIONS), step_time=device).worth_it


def test_branches_move_the_belief_about_the_critical_size():
    branches = BranchCurve(status=Status.OK, checkpoint_samples=1000, evaluated_samples=1000, target_loss=1.0, points=())

    def best_fixed(critical):
        narrow = Estimate(value=critical, low=critical / 1.3, high=critical * 1.3, n=100)
        tradeoff = Tradeoff(status=Status.OK, critical_batch_size=narrow, points=())
        given = findings(noise_along(flat, (0, 1000, 5000)), branches=branches, tradeoff=tradeoff)
        return forecast_schedule(given, adaptive(), TOTAL).best_fixed_size

    assert best_fixed(100.0) == pytest.approx(np.sqrt(100 * 160), rel=0.15)
    assert best_fixed(2000.0) == pytest.approx(np.sqrt(2000 * 160), rel=0.15)


def test_growth_instead_of_decay_saves_the_seconds_of_its_samples():
    growing = GrowthForDecay(start=64, factor=4.0, at_samples=(TOTAL // 2, 3 * TOTAL // 4), largest=1024)
    forecast = forecast_schedule(findings(noise_along(flat, POSITIONS)), growing, TOTAL)

    sample_s = {size: law_s(size, 0.02, 8000.0) / size for size in (64, 256, 1024)}
    exact = (0.5 * sample_s[64] + 0.25 * sample_s[256] + 0.25 * sample_s[1024]) / sample_s[64]
    assert forecast.relative_time.value == pytest.approx(exact, rel=0.01)
    assert (forecast.worth_it, forecast.best_fixed_size, forecast.last_size) == (True, 64, 1024)
    assert "with the rate divided: as many samples by assumption, and fewer steps" in forecast.reasons[0]


def test_growth_instead_of_decay_is_not_worth_it_where_steps_cost_by_the_sample():
    growing = GrowthForDecay(start=64, factor=4.0, at_samples=(TOTAL // 2,), largest=1024)

    assert not forecast_schedule(findings(noise_along(flat, POSITIONS), fixed_s=1e-5), growing, TOTAL).worth_it


def test_equal_arguments_give_equal_forecasts_that_round_trip():
    given = findings(noise_along(steep, (0, 1000, 5000)))
    forecast = forecast_schedule(given, adaptive(), TOTAL)

    assert forecast == forecast_schedule(given, adaptive(), TOTAL)
    assert ScheduleForecast.model_validate_json(forecast.model_dump_json()) == forecast


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_scale": None}, "The gradient noise is not known"),
        ({"step_time": None}, "Without a step time and a plan"),
        (
            {"noise_scale": noise_along(flat, (5,)).model_copy(update={"snapshots": (), "status": Status.INDETERMINATE})},
            "The gradient noise is not known",
        ),
    ],
)
def test_missing_measurement_gives_no_forecast(changes, words):
    forecast = forecast_schedule(findings(noise_along(flat, POSITIONS)).model_copy(update=changes), adaptive(), TOTAL)

    assert (forecast.status, forecast.worth_it, forecast.relative_time.value) == (Status.INDETERMINATE, False, None)
    assert words in forecast.reasons[0]


def test_size_limit_below_every_timed_size_gives_no_forecast():
    given = findings(noise_along(flat, POSITIONS), constraints=Constraints(max_global_batch_size=8))

    assert "No timed size is allowed" in forecast_schedule(given, adaptive(), TOTAL).reasons[0]


def test_loss_that_couples_samples_gets_no_forecast():
    given = findings(noise_along(steep, POSITIONS))
    coupled = given.model_copy(update={"workload": given.workload.model_copy(update={"couples_samples": True})})

    assert "another objective" in forecast_schedule(coupled, adaptive(), TOTAL).reasons[0]


def test_step_times_that_were_disturbed_give_no_forecast():
    given = findings(noise_along(steep, POSITIONS))
    disturbed = given.step_time.model_copy(update={"status": Status.UNSTABLE})

    forecast = forecast_schedule(given.model_copy(update={"step_time": disturbed}), adaptive(), TOTAL)

    assert (forecast.status, forecast.worth_it) == (Status.INDETERMINATE, False)
    assert "free the machine" in forecast.reasons[0]
