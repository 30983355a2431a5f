"""Schedules are functions of samples; the noise-adaptive rule follows sqrt(c B b_half); rate and company follow the size."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from oracles.oracle_curves import workload
from rightbatch.fits.batch_schedule import coupled_setting, friendly_size, next_size, setting_at
from rightbatch.fits.lr_company import clip_factor, company
from rightbatch.fits.lr_scaling import couple_lr, saturating_gain
from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.schedule import (
    BatchSetting,
    ConstantSize,
    GeometricGrowth,
    GrowthForDecay,
    LinearGrowth,
    MilestoneSizes,
    NoiseAdaptive,
    SizeCoupling,
    SizeDecision,
)

SIZES = st.integers(1, 100_000)


def adaptive(**changes):
    given = {"start": 64, "smallest": 8, "largest": 4096, "half_saturation": 200.0, "calibration": 1.3, **changes}
    return NoiseAdaptive(**given)


def scale(value, low=None, high=None, status=Status.OK):
    return Estimate(value=value, low=low, high=high, n=100, status=status)


def sizes(schedule, positions):
    return [setting_at(schedule, position).global_batch_size for position in positions]


def test_constant_size_stays():
    assert sizes(ConstantSize(global_batch_size=48), [0, 1, 10**9]) == [48, 48, 48]


def test_milestone_takes_effect_at_its_sample():
    schedule = MilestoneSizes(milestones=((0, 64), (1000, 256), (5000, 128)))

    assert sizes(schedule, [0, 999, 1000, 4999, 5000, 10**9]) == [64, 64, 256, 256, 128, 128]


@given(start=SIZES, stop=SIZES, over=st.integers(1, 10**6), kind=st.sampled_from([LinearGrowth, GeometricGrowth]))
def test_growth_goes_from_start_to_stop_without_turning_back(start, stop, over, kind):
    schedule = kind(start=start, stop=stop, over_samples=over)
    found = sizes(schedule, [over * step // 20 for step in range(21)] + [over + 1])

    assert (found[0], found[-1]) == (start, stop)
    assert found == sorted(found, reverse=stop < start)


def test_linear_growth_is_half_way_in_size_and_geometric_in_ratio():
    assert sizes(LinearGrowth(start=64, stop=1088, over_samples=1000), [500]) == [576]
    assert sizes(GeometricGrowth(start=64, stop=1024, over_samples=1000), [500]) == [256]


@given(st.floats(1, 1e6))
def test_friendly_size_is_near_and_of_few_significant_bits(size):
    friendly = friendly_size(size)

    assert abs(friendly - size) <= max(0.5, size / 16)
    assert friendly >> max(0, friendly.bit_length() - 4) << max(0, friendly.bit_length() - 4) == friendly
    if friendly >= 64:
        assert friendly % 8 == 0


def test_growth_instead_of_decay_divides_rate_over_size_by_the_factor():
    schedule = GrowthForDecay(start=100, factor=5.0, at_samples=(1000, 2000, 3000), largest=1500)
    settings = [setting_at(schedule, position) for position in (0, 1000, 2000, 3000)]

    assert [setting.lr_factor / setting.global_batch_size for setting in settings] == pytest.approx(
        [1 / 100 / 5.0**power for power in range(4)]
    )
    assert settings[0] == BatchSetting(global_batch_size=100)
    assert settings[1].lr_factor == pytest.approx(settings[1].global_batch_size / 500)
    assert [setting.global_batch_size for setting in settings[2:]] == [1500, 1500]


def test_growth_instead_of_decay_keeps_the_weight_decay_and_moves_the_betas():
    coupling = SizeCoupling(base_batch_size=64, optimizer="AdamW", noise_scale_samples=500.0)
    schedule = GrowthForDecay(start=64, factor=4.0, at_samples=(1000,), largest=1024, coupling=coupling)

    setting = setting_at(schedule, 1000)

    assert (setting.lr_factor, setting.weight_decay_factor, setting.beta_power) == (1.0, 1.0, 4.0)


def test_setting_couples_rate_and_company_as_the_recommendation_does():
    given = workload(optimizer="AdamW", betas=(0.9, 0.999), weight_decay=0.05, lr_batch_size=128)
    coupling = SizeCoupling(base_batch_size=128, optimizer="AdamW", noise_scale_samples=300.0)

    setting = coupled_setting(coupling, 512)

    words = dict(company(given, size=512, lr_factor=setting.lr_factor, micro_batch_size=None, snapshot=None))
    assert setting.lr_factor == couple_lr(given, 300.0, 512).factor
    assert words["betas"].startswith(f"{0.9**setting.beta_power:.3g}, {0.999**setting.beta_power:.4g}")
    assert words["weight decay"].startswith(f"{0.05 * setting.weight_decay_factor:.3g}")
    assert setting.clip_factor == pytest.approx(clip_factor(2.0, 600.0, 128, 512))


def test_sgd_keeps_weight_decay_and_layerwise_optimizers_keep_betas():
    sgd = coupled_setting(SizeCoupling(base_batch_size=64, optimizer="SGD", noise_scale_samples=300.0), 256)
    lamb = coupled_setting(SizeCoupling(base_batch_size=64, optimizer="LAMB", noise_scale_samples=300.0), 256)

    assert sgd.weight_decay_factor == 1.0
    assert sgd.lr_factor == pytest.approx(saturating_gain(600.0, 64, 256))
    assert lamb.beta_power == 1.0


def test_unknown_optimizer_and_missing_coupling_keep_the_rate():
    assert coupled_setting(None, 256) == BatchSetting(global_batch_size=256)
    assert coupled_setting(SizeCoupling(base_batch_size=64, optimizer="Muon"), 256).lr_factor == 1.0


def test_setting_of_a_decision_is_that_of_a_whole_run_at_its_size():
    coupling = SizeCoupling(base_batch_size=64, optimizer="SGD", noise_scale_samples=50.0)
    decisions = (SizeDecision(samples_seen=1001, global_batch_size=256, noise_scale_samples=5000.0),)
    schedule = adaptive(coupling=coupling)

    assert setting_at(schedule, 1000, decisions) == BatchSetting(global_batch_size=64)
    assert setting_at(schedule, 1001, decisions) == coupled_setting(coupling, 256)


@given(noise=st.floats(1, 1e5), half=st.floats(1, 1e4), calibration=st.floats(0.1, 5))
def test_repeated_decisions_come_to_the_optimum_within_the_bounds(noise, half, calibration):
    schedule = adaptive(half_saturation=half, calibration=calibration)
    size = schedule.start
    for _ in range(20):
        size = next_size(schedule, size, scale(noise, 0.999 * noise, 1.001 * noise))

    optimum = min(max(math.sqrt(calibration * noise * half), schedule.smallest), schedule.largest)
    assert abs(size / optimum - 1) <= 0.05 + 1 / 16 + 0.5 / optimum


def test_one_decision_changes_the_size_by_the_most_growth_at_most():
    assert next_size(adaptive(), 64, scale(1e6, 9e5, 1.1e6)) == 128
    assert next_size(adaptive(), 64, scale(1.0, 0.9, 1.1)) == 32


def test_size_whose_noise_scale_lies_inside_the_interval_stays():
    suits = 64**2 / (200 * 1.3)

    assert next_size(adaptive(), 64, scale(3 * suits, 0.9 * suits, 9 * suits)) == 64
    assert next_size(adaptive(), 64, scale(3 * suits, 1.1 * suits, 9 * suits)) > 64


def test_change_below_the_hysteresis_is_not_made():
    noise = (66**2) / (200 * 1.3)

    assert next_size(adaptive(), 64, scale(noise, 0.999 * noise, 1.001 * noise)) == 64
    assert next_size(adaptive(hysteresis=0.0, start=40, smallest=1), 40, scale(45.0**2 / 260, 7.0, 8.0)) == 44


def test_indeterminate_noise_changes_nothing():
    assert next_size(adaptive(), 64, scale(1e6, status=Status.INDETERMINATE)) == 64
    assert next_size(adaptive(), 64, scale(None, status=Status.NO_GRADIENT)) == 64


def test_bound_lets_the_size_grow_to_what_it_supports_and_never_shrink():
    suits_96 = 96**2 / (200 * 1.3)
    bound = scale(1e9, low=suits_96, status=Status.AT_LEAST)

    assert next_size(adaptive(), 64, bound) == 96
    assert next_size(adaptive(), 512, bound) == 512


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MilestoneSizes(milestones=((5, 64),)), "begin at 0; got 5"),
        (lambda: MilestoneSizes(milestones=((0, 64), (9, 1), (9, 2))), "ascend"),
        (lambda: GrowthForDecay(start=8, factor=2.0, at_samples=(9, 3), largest=64), "ascend; got 9, 3"),
        (lambda: GrowthForDecay(start=80, factor=2.0, at_samples=(9,), largest=64), "at least start; got 64 and 80"),
        (lambda: adaptive(start=5000), "between smallest and largest; got 5000, 8 and 4096"),
    ],
)
def test_contradictory_schedule_is_refused(build, words):
    with pytest.raises(ValidationError, match=words):
        build()
