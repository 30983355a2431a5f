import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles.oracle_curves import noise, workload
from rightbatch.fits.lr_scaling import HOTTEST, couple_lr, known_noise_scale, rate_factor, rate_limit, saturating_gain, surge_gain
from rightbatch.records.estimates import Status


def test_sgd_is_linear_far_below_the_noise_scale():
    assert couple_lr(workload(), 1e9, 512).factor == pytest.approx(4.0, rel=1e-5)


def test_sgd_saturates_far_above_twice_the_noise_scale():
    coupling = couple_lr(workload(), 64.0, 10**9)

    assert coupling.rule == "saturating linear"
    assert coupling.factor == pytest.approx(1 + 2 * 64 / 128, rel=1e-5)
    assert (coupling.base_lr, coupling.base_batch_size) == (0.1, 128)


def test_sgd_factor_is_the_ratio_of_adascale_gains_at_twice_the_noise():
    trace, sq_norm = 600.0, 2.0

    def gain(size):
        return (2 * trace + sq_norm) / (2 * trace / size + sq_norm)

    assert couple_lr(workload(), trace / sq_norm, 1000).factor == pytest.approx(gain(1000) / gain(128))


def test_sgd_without_a_noise_scale_is_lowered_in_proportion_and_never_raised():
    assert couple_lr(workload(), None, 64).factor == 0.5
    kept = couple_lr(workload(), None, 128 * 100)
    assert kept.factor == 1.0
    assert "unknown" in kept.validity
    assert "keeps the rate" in kept.validity


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop"])
def test_adaptive_optimizers_follow_the_square_root(optimizer):
    coupling = couple_lr(workload(optimizer=optimizer), 300.0, 512)

    assert coupling.rule == "square root"
    assert coupling.factor == 2.0


@pytest.mark.parametrize(("optimizer", "power", "alone"), [("LARS", 0.39, 0.30), ("LAMB", 0.70, 0.56), ("FusedLAMB", 0.70, 0.56)])
def test_layerwise_optimizers_follow_the_saturating_gain_to_the_power_of_their_family(optimizer, power, alone):
    known = couple_lr(workload(optimizer=optimizer), 300.0, 512)
    unknown = couple_lr(workload(optimizer=optimizer), None, 512)

    assert known.rule == "saturating power"
    assert known.factor == pytest.approx(saturating_gain(300.0, 128, 512) ** power)
    assert unknown.factor == pytest.approx(4**alone)
    assert "MLPerf" in known.validity
    assert dict(known.companions)["warm-up"] == "the same number of steps: 4.00 times the samples"


def test_square_root_rule_says_what_lies_beyond_the_noise_scale():
    below = couple_lr(workload(optimizer="Adam"), 1000.0, 512).validity
    above = couple_lr(workload(optimizer="Adam"), 200.0, 512).validity

    assert below.endswith("the best rate falls again.")
    assert f"this size takes {surge_gain(200.0, 128, 512):.3f} times the rate" in above


def test_surge_is_the_square_root_far_below_the_noise_scale_and_falls_above_it():
    assert surge_gain(1e9, 128, 512) == pytest.approx(2.0, rel=1e-5)
    assert surge_gain(1e-3, 128, 512) == pytest.approx(0.5, rel=1e-4)
    gains = [surge_gain(300.0, 32, size) for size in (100, 200, 300, 400, 800)]
    assert max(gains) == gains[2]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "LARS", "LAMB"])
@given(sizes=st.tuples(*[st.integers(1, 10**6)] * 3), noise=st.floats(0.1, 1e6))
def test_two_changes_of_size_compose_to_one(optimizer, sizes, noise):
    base, middle, last = sizes

    def factor(start, end):
        return couple_lr(workload(optimizer=optimizer, lr_batch_size=start), noise, end).factor

    assert factor(base, middle) * factor(middle, last) == pytest.approx(factor(base, last), rel=1e-9)
    assert factor(base, base) == 1.0


def test_source_of_the_rate_is_kept():
    assert not couple_lr(workload(), 300.0, 512).base_is_tested
    assert couple_lr(workload(lr_is_tested=True), 300.0, 512).base_is_tested


@pytest.mark.parametrize("optimizer", ["LBFGS", "Lion"])
def test_other_optimizers_have_no_rule(optimizer):
    coupling = couple_lr(workload(optimizer=optimizer), 300.0, 512)

    assert (coupling.rule, coupling.factor, coupling.companions) == ("none", 1.0, ())
    assert optimizer in coupling.validity


def test_unknown_tuned_size_asks_for_it():
    coupling = couple_lr(workload(lr_batch_size=None), 300.0, 512)

    assert (coupling.factor, coupling.base_batch_size, coupling.companions) == (1.0, None, ())
    assert "lr_batch_size=" in coupling.validity


def test_the_tuned_size_itself_needs_no_companions():
    coupling = couple_lr(workload(), 300.0, 128)

    assert (coupling.factor, coupling.companions) == (1.0, ())


def test_rates_saturate_at_the_measured_noise_scale_or_its_lower_bound():
    assert known_noise_scale(noise(80.0)) == 80.0
    assert known_noise_scale(noise(80.0, factor=2.0, status=Status.AT_LEAST)) == 40.0
    assert known_noise_scale(noise(status=Status.INDETERMINATE)) is None
    assert known_noise_scale(None) is None
    assert known_noise_scale(noise(80.0).model_copy(update={"value": 0.0, "low": 0.0, "high": 0.0})) is None


def test_rate_over_size_is_raised_to_twice_that_of_the_tuned_rate_and_no_further():
    limit, sizes = rate_limit(workload(lr_batch_size=64), 30.0), (8, 32, 64, 256)

    highest = [rate_factor("SGD", 30.0, 64, size) * float(limit.over_rule(np.array([size]))[0]) for size in sizes]

    assert [lr / (size / 64) for lr, size in zip(highest[1:], sizes[1:], strict=True)] == pytest.approx([HOTTEST] * 3)
    assert limit.over_rule(np.array([8.0]))[0] > 1


def test_the_rules_own_rate_is_always_allowed():
    limit = rate_limit(workload(lr_batch_size=1024), 10.0)

    assert limit.over_rule(np.array([8.0]))[0] == 1


@pytest.mark.parametrize(
    ("changes", "noise_scale"), [({"optimizer": "AdamW"}, 30.0), ({"lr_batch_size": None}, 30.0), ({"optimizer": "SGD"}, None)]
)
def test_no_limit_is_known_without_what_it_rests_on(changes, noise_scale):
    assert rate_limit(workload(**changes), noise_scale) is None
