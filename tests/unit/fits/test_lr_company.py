"""What moves with the learning rate keeps its meaning in samples: checked against slow twins, and against composing two changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles.oracle_curves import workload
from oracles.oracle_noise import gaussian_gradients
from rightbatch.fits.lr_company import batch_norm_momentum, clip_factor, company, decay_by_half_life, decoupled_weight_decay
from rightbatch.records.estimates import Estimate, NoiseSnapshot

KAPPAS = st.floats(1 / 8, 8)
SHARES = st.floats(0.01, 0.99)


def snapshot(sq_norm=2.0, trace=600.0):
    def known(value):
        return Estimate(value=value, low=None, high=None, n=100)

    return NoiseSnapshot(
        samples_seen=100,
        noise_scale=known(300.0),
        grad_sq_norm=known(sq_norm),
        grad_noise_trace=known(trace),
        micro_batch_size=8,
        micro_batch_count=16,
    )


def companions(size=512, *, lr_factor=2.0, micro_batch_size=None, noise=None, **changes):
    return dict(company(workload(**changes), size=size, lr_factor=lr_factor, micro_batch_size=micro_batch_size, snapshot=noise))


def averaged(values, decay):
    state = 0.0
    for value in values:
        state = decay * state + (1 - decay) * value
    return state


@pytest.mark.parametrize("kappa", [2, 4, 8])
@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_average_of_larger_steps_forgets_as_many_samples_ago(kappa, decay):
    """Each larger step stands for kappa small ones that all see the same value."""
    values = np.random.default_rng(0).normal(size=50)

    large = averaged(values, decay_by_half_life(decay, kappa))

    assert large == pytest.approx(averaged(np.repeat(values, kappa), decay))


@pytest.mark.parametrize("kappa", [2, 4])
def test_batch_statistics_of_larger_batches_forget_as_many_samples_ago(kappa):
    values = np.random.default_rng(1).normal(size=50)

    large = averaged(values, 1 - batch_norm_momentum(0.1, kappa))

    assert large == pytest.approx(averaged(np.repeat(values, kappa), 0.9))


def test_decoupled_decay_forgets_old_weights_over_as_many_samples():
    lr, decay, kappa = 0.01, 0.1, 4
    factor = kappa**0.5

    scaled = decoupled_weight_decay(decay, kappa, factor)

    assert kappa * 128 / (factor * lr * scaled) == pytest.approx(128 / (lr * decay))


def test_clip_threshold_follows_the_root_mean_square_norm_of_batch_gradients():
    """Against drawn gradients; the tolerance is four standard errors, a third of the change to be seen."""
    samples, base, size = 2**17, 32, 128
    gradients = gaussian_gradients(np.random.default_rng(2), samples=samples, noise_scale=100.0, dimension=30)
    sq_norm, trace = float(np.sum(gradients.mean(0) ** 2)), float(gradients.var(0, ddof=1).sum())

    small, large = (np.sum(gradients.reshape(-1, batch, 30).mean(1) ** 2, axis=1) for batch in (base, size))
    measured = (large.mean() / small.mean()) ** 0.5
    relative_errors = [each.std() / each.mean() / len(each) ** 0.5 for each in (small, large)]
    error = measured / 2 * float(np.hypot(*relative_errors))
    assert 4 * error < (1 - measured) / 3
    assert clip_factor(sq_norm, trace, base, size) == pytest.approx(measured, abs=4 * error)


@given(kappa=KAPPAS, other=KAPPAS, share=st.floats(0.01, 0.3))
def test_two_changes_compose_to_one(kappa, other, share):
    assert decay_by_half_life(decay_by_half_life(share, kappa), other) == pytest.approx(decay_by_half_life(share, kappa * other))
    twice = batch_norm_momentum(batch_norm_momentum(share, kappa), other)
    assert twice == pytest.approx(batch_norm_momentum(share, kappa * other), abs=1e-7)
    decay = decoupled_weight_decay(decoupled_weight_decay(share, kappa, kappa**0.5), other, other**0.5)
    assert decay == pytest.approx(decoupled_weight_decay(share, kappa * other, (kappa * other) ** 0.5))


@given(sizes=st.tuples(*[st.integers(1, 10**6)] * 3), sq_norm=st.floats(1e-6, 1e6), trace=st.floats(1e-6, 1e6))
def test_clip_factors_compose_and_lie_between_one_and_the_square_root(sizes, sq_norm, trace):
    base, middle, last = sizes
    both = clip_factor(sq_norm, trace, base, middle) * clip_factor(sq_norm, trace, middle, last)
    whole = clip_factor(sq_norm, trace, base, last)
    assert both == pytest.approx(whole)
    root = (base / last) ** 0.5
    assert min(1, root) * (1 - 1e-9) <= whole <= max(1, root) * (1 + 1e-9)


@given(share=SHARES)
def test_an_unchanged_size_changes_nothing(share):
    assert decay_by_half_life(share, 1) == share
    assert batch_norm_momentum(share, 1) == pytest.approx(share)
    assert decoupled_weight_decay(share, 1, 1) == share
    assert clip_factor(share, 1 - share, 64, 64) == 1
    assert company(workload(batch_norm=True, clip_norm=1.0), size=128, lr_factor=1, micro_batch_size=None, snapshot=snapshot()) == ()


def test_a_known_tuned_size_is_needed():
    assert companions(lr_batch_size=None) == {}


def test_words_give_the_new_values():
    found = companions(optimizer="AdamW", betas=(0.9, 0.999), weight_decay=0.01, batch_norm=True)

    assert found["betas"].startswith("0.656, 0.9960")
    assert found["weight decay"].startswith("0.0200")
    assert found["batch norm momentum"].startswith("0.344")
    assert found["EMA decay"].startswith("0.9960")
    assert found["warm-up"].endswith("0.250 times the steps")
    assert found["schedule"].endswith("0.250 times the steps")


def test_batch_norm_follows_the_micro_batch_that_it_sees():
    assert "batch norm momentum" not in companions(micro_batch_size=128, batch_norm=True)
    assert companions(micro_batch_size=64, batch_norm=True)["batch norm momentum"].startswith("0.0513")


def test_sgd_keeps_its_weight_decay_and_has_no_betas():
    assert not {"betas", "weight decay", "clip threshold"} & companions(weight_decay=0.1).keys()


def test_clip_threshold_is_worded_where_the_workload_clips():
    threshold = (2 + 600 / 512) ** 0.5 / (2 + 600 / 128) ** 0.5

    assert companions(clip_norm=1.0, noise=snapshot())["clip threshold"] == f"{threshold:.3f} instead of 1.00 clips as many steps"


@pytest.mark.parametrize("noise", [None, snapshot(sq_norm=-0.1), snapshot(trace=0.0)])
def test_clip_threshold_has_no_number_without_a_signal_and_its_noise(noise):
    assert "has to be found again" in companions(clip_norm=1.0, noise=noise)["clip threshold"]
