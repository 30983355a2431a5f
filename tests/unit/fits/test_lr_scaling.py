import math

import pytest

from oracles.oracle_curves import workload
from rightbatch.fits.lr_scaling import couple_lr


def test_sgd_is_linear_far_below_the_noise_scale():
    assert couple_lr(workload(), 1e9, 512).factor == pytest.approx(4.0, rel=1e-5)


def test_sgd_saturates_far_above_the_noise_scale():
    coupling = couple_lr(workload(), 64.0, 10**9)

    assert coupling.rule == "saturating linear"
    assert coupling.factor == pytest.approx(1 + 64 / 128, rel=1e-5)
    assert (coupling.base_lr, coupling.base_batch_size) == (0.1, 128)


def test_sgd_factor_is_the_ratio_of_adascale_gains():
    trace, sq_norm = 600.0, 2.0

    def gain(size):
        return (trace + sq_norm) / (trace / size + sq_norm)

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


@pytest.mark.parametrize("optimizer", ["LBFGS", "Lion"])
def test_other_optimizers_have_no_rule(optimizer):
    coupling = couple_lr(workload(optimizer=optimizer), 300.0, 512)

    assert (coupling.rule, coupling.factor, coupling.companions) == ("none", 1.0, ())
    assert optimizer in coupling.validity


def test_unknown_tuned_size_asks_for_it():
    coupling = couple_lr(workload(lr_batch_size=None), 300.0, 512)

    assert (coupling.factor, coupling.base_batch_size, coupling.companions) == (1.0, None, ())
    assert "lr_batch_size=" in coupling.validity


def test_companions_keep_their_memory_in_samples():
    coupling = couple_lr(workload(optimizer="AdamW", betas=(0.9, 0.999), weight_decay=0.01, batch_norm=True), 300.0, 512)

    companions = dict(coupling.companions)
    assert companions["betas"].startswith("0.656, 0.9960")
    assert math.log(0.5) / math.log(0.9) * 128 == pytest.approx(math.log(0.5) / math.log(0.9**4) * 512)
    assert companions["weight decay"].startswith("0.0200")
    assert companions["batch norm momentum"].startswith("0.344")
    assert companions["warm-up"].endswith("0.250 times the steps")


def test_the_tuned_size_itself_needs_no_companions():
    coupling = couple_lr(workload(), 300.0, 128)

    assert (coupling.factor, coupling.companions) == (1.0, ())
