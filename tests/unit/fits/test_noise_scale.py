import numpy as np
import pytest

from oracles.oracle_noise import (
    fieller_set,
    gaussian_gradients,
    jackknife_covariance,
    norms_of,
    ragged_means,
    ragged_norms_of,
    ragged_trace_and_sq_norm,
    trace_and_sq_norm,
)
from rightbatch.fits.intervals import student_quantile
from rightbatch.fits.noise_scale import (
    NoiseMoments,
    compare_ghosts,
    fieller,
    fit_noise_scale,
    fit_snapshot,
    is_decided,
    noise_moments,
)
from rightbatch.records.estimates import Status
from rightbatch.records.measurements import GradientNoiseMeasurements, NoiseProblem

M = 4


def _norms(seed, *, noise_scale=50.0, blocks=(3,) * 12, dimension=40, samples_seen=0, dataset_size=10**12):
    rng = np.random.default_rng(seed)
    gradients = gaussian_gradients(rng, samples=M * sum(blocks), noise_scale=noise_scale, dimension=dimension)
    return norms_of(gradients, micro_batch_size=M, block_counts=blocks, samples_seen=samples_seen, dataset_size=dataset_size)


def _measurements(*snapshots, problem=None, pilot_samples=1000, batch_norm=False, batch=32):
    return GradientNoiseMeasurements(
        snapshots=snapshots, pilot_batch_size=batch, pilot_lr=0.1, pilot_samples=pilot_samples, batch_norm=batch_norm, problem=problem
    )


@pytest.mark.parametrize("blocks", [(1,) * 9, (3, 3, 3, 3), (4, 4, 4, 1)])
def test_moments_equal_the_naive_ones_with_equal_and_unequal_blocks(blocks):
    gradients = gaussian_gradients(np.random.default_rng(3), samples=M * sum(blocks), noise_scale=20.0, dimension=7)
    micro = gradients.reshape(sum(blocks), M, -1).mean(axis=1)

    moments = noise_moments(norms_of(gradients, micro_batch_size=M, block_counts=blocks, dataset_size=200))

    np.testing.assert_allclose((moments.trace, moments.sq_norm), trace_and_sq_norm(micro, M, 200), rtol=1e-10)
    expected = jackknife_covariance(micro, M, 200, blocks)
    np.testing.assert_allclose(
        [[moments.var_trace, moments.cov], [moments.cov, moments.var_sq_norm]], expected, rtol=1e-8, atol=1e-10 * expected.max()
    )


def test_trace_and_square_norm_are_unbiased_without_replacement():
    rng = np.random.default_rng(11)
    population = gaussian_gradients(rng, samples=64, noise_scale=30.0, dimension=6)
    truth = np.array([population.var(axis=0, ddof=1).sum(), (population.mean(axis=0) ** 2).sum()])
    draws = []
    for _ in range(1500):
        sample = population[rng.permutation(64)[:48]]
        moments = noise_moments(norms_of(sample, micro_batch_size=M, block_counts=(3,) * 4, dataset_size=64))
        draws.append((moments.trace, moments.sq_norm))
    error = np.mean(draws, axis=0) - truth
    standard_error = np.std(draws, axis=0) / np.sqrt(len(draws))

    assert (np.abs(error) < 4 * standard_error).all()
    # Leaving the population correction out would shift G by S / D, which the test must be able to see.
    assert 4 * standard_error[1] < 0.5 * truth[0] / 64


@pytest.mark.parametrize("share_drawn", [0.25, 0.8])
def test_intervals_cover_the_noise_scale_of_a_small_population_without_excess(share_drawn):
    """Without the share not drawn, all but one of 1000 intervals would cover at four fifths."""
    rng, samples, covered = np.random.default_rng(14), M * 100, 0
    size = round(samples / share_drawn)
    population = gaussian_gradients(rng, samples=size, noise_scale=100.0, dimension=40)
    truth = population.var(axis=0, ddof=1).sum() / (population.mean(axis=0) ** 2).sum()
    for _ in range(1000):
        sample = population[rng.permutation(size)[:samples]]
        estimate = fit_snapshot(norms_of(sample, micro_batch_size=M, block_counts=(2,) * 50, dataset_size=size)).noise_scale
        covered += estimate.low <= truth and (estimate.high is None or estimate.high >= truth)

    assert 0.93 <= covered / 1000 <= 0.98


def test_gradient_of_a_population_that_is_used_up_is_exact():
    gradients = gaussian_gradients(np.random.default_rng(15), samples=48, noise_scale=20.0, dimension=7)
    moments = noise_moments(norms_of(gradients, micro_batch_size=M, block_counts=(1,) * 12, dataset_size=48))

    assert moments.sq_norm == pytest.approx((gradients.mean(axis=0) ** 2).sum(), rel=1e-12)
    assert (moments.var_sq_norm, moments.cov) == (0.0, 0.0)
    assert moments.var_trace > 0


RAGGED = (4, 1, 7, 4, 2, 4, 9, 3, 4, 4, 1, 5)


def test_moments_of_unequal_micro_batches_equal_squared_deviations():
    gradients = gaussian_gradients(np.random.default_rng(4), samples=sum(RAGGED), noise_scale=20.0, dimension=7)
    norms = ragged_norms_of(gradients, sizes=RAGGED, micro_batch_size=4, block_counts=(3,) * 4, dataset_size=200)

    moments = noise_moments(norms)

    expected = ragged_trace_and_sq_norm(ragged_means(gradients, RAGGED), RAGGED, 200)
    np.testing.assert_allclose((moments.trace, moments.sq_norm), expected, rtol=1e-10)
    assert fit_snapshot(norms).noise_scale.n == sum(RAGGED)


def test_equal_sizes_said_one_by_one_change_nothing():
    gradients = gaussian_gradients(np.random.default_rng(8), samples=M * 12, noise_scale=20.0, dimension=7)
    said = ragged_norms_of(gradients, sizes=(M,) * 12, micro_batch_size=M, block_counts=(3,) * 4)
    unsaid = norms_of(gradients, micro_batch_size=M, block_counts=(3,) * 4)

    assert fit_snapshot(said) == fit_snapshot(unsaid)


def test_unequal_micro_batches_of_a_small_population_are_unbiased():
    rng = np.random.default_rng(12)
    population = gaussian_gradients(rng, samples=64, noise_scale=30.0, dimension=6)
    truth = np.array([population.var(axis=0, ddof=1).sum(), (population.mean(axis=0) ** 2).sum()])
    draws = []
    for _ in range(1500):
        sample = population[rng.permutation(64)[: sum(RAGGED)]]
        moments = noise_moments(ragged_norms_of(sample, sizes=RAGGED, micro_batch_size=4, block_counts=(3,) * 4, dataset_size=64))
        draws.append((moments.trace, moments.sq_norm))
    error = np.mean(draws, axis=0) - truth
    standard_error = np.std(draws, axis=0) / np.sqrt(len(draws))

    assert (np.abs(error) < 4 * standard_error).all()
    # Taking every micro-batch for one of 4 samples would raise S by half; leaving the population out would shift G by S / D.
    assert 4 * standard_error[0] < 0.5 * truth[0]
    assert 4 * standard_error[1] < 0.5 * truth[0] / 64


def test_unequal_micro_batches_give_intervals_that_cover():
    rng, covered = np.random.default_rng(13), 0
    for _ in range(1500):
        gradients = gaussian_gradients(rng, samples=3 * sum(RAGGED), noise_scale=50.0, dimension=40)
        norms = ragged_norms_of(gradients, sizes=RAGGED * 3, micro_batch_size=4, block_counts=(3,) * 12)
        estimate = fit_snapshot(norms).noise_scale
        covered += estimate.low is not None and estimate.low <= 50.0 and (estimate.high is None or estimate.high >= 50.0)

    assert 0.93 <= covered / 1500 <= 0.97


def test_fieller_intervals_cover_the_planted_noise_scale():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(1500):
        gradients = gaussian_gradients(rng, samples=M * 36, noise_scale=50.0, dimension=40)
        estimate = fit_snapshot(norms_of(gradients, micro_batch_size=M, block_counts=(3,) * 12)).noise_scale
        covered += estimate.low is not None and estimate.low <= 50.0 and (estimate.high is None or estimate.high >= 50.0)

    assert 0.93 <= covered / 1500 <= 0.97


def test_interval_of_the_run_covers_its_weighted_average():
    rng = np.random.default_rng(6)
    scales, batch, seen = np.array([20.0, 60.0, 120.0]), 32, (0, 1000, 4000)
    weights = np.array([500.0, 2000.0, 1500.0]) / (1 + scales / batch)
    truth, covered, repeats = weights @ scales / weights.sum(), 0, 800
    for _ in range(repeats):
        snapshots = [
            norms_of(
                gaussian_gradients(rng, samples=M * 36, noise_scale=scale, dimension=40),
                micro_batch_size=M,
                block_counts=(3,) * 12,
                samples_seen=at,
            )
            for scale, at in zip(scales, seen, strict=True)
        ]
        estimate = fit_noise_scale(_measurements(*snapshots, batch=batch))
        covered += estimate.low is not None and estimate.low <= truth and (estimate.high is None or estimate.high >= truth)

    assert 0.925 <= covered / repeats <= 0.975


def test_a_later_snapshot_of_another_training_counts_as_one_of_the_pilots_and_an_earlier_one_not():
    rng = np.random.default_rng(7)

    def at(samples_seen, scale):
        gradients = gaussian_gradients(rng, samples=M * 36, noise_scale=scale, dimension=40)
        return norms_of(gradients, micro_batch_size=M, block_counts=(3,) * 12, samples_seen=samples_seen)

    start, end, later = at(0, 20.0), at(1000, 60.0), at(4000, 120.0)

    whole = fit_noise_scale(_measurements(start, end, later).model_copy(update={"pilot_samples": 4000}))
    pilot = _measurements(start, end).model_copy(update={"pilot_samples": 1000})
    assert fit_noise_scale(pilot, later) == whole
    assert fit_noise_scale(pilot, at(1000, 120.0)) == fit_noise_scale(pilot)


def test_fieller_interval_is_the_set_a_test_does_not_reject():
    moments = NoiseMoments(trace=40.0, sq_norm=1.0, var_trace=9.0, cov=-0.2, var_sq_norm=0.02, dof=9)

    estimate = fieller(moments, n=100)

    accepted = fieller_set(moments, student_quantile(9), np.linspace(0, 400, 400_001))
    assert estimate.low == pytest.approx(accepted.min(), abs=2e-3)
    assert estimate.high == pytest.approx(accepted.max(), abs=2e-3)


def test_one_snapshot_is_the_run():
    norms = _norms(1)

    run, snapshot = fit_noise_scale(_measurements(norms)), fit_snapshot(norms)

    assert run.value == pytest.approx(snapshot.noise_scale.value)
    assert (run.low, run.high) == pytest.approx((snapshot.noise_scale.low, snapshot.noise_scale.high))
    assert run.n == 144


def test_weak_gradient_gives_a_lower_bound_only():
    estimate = fit_snapshot(_norms(2, noise_scale=2000.0)).noise_scale

    assert estimate.status is Status.AT_LEAST
    assert estimate.high is None
    assert 0 < estimate.low < 2000


def test_lower_bound_says_how_many_more_gradients_are_needed():
    estimate = fit_noise_scale(_measurements(_norms(2, noise_scale=2000.0)))

    assert estimate.status is Status.AT_LEAST
    assert "at least" in estimate.remarks[0]


def test_nothing_known_about_trace_or_norm_is_indeterminate():
    moments = NoiseMoments(trace=1.0, sq_norm=0.1, var_trace=4.0, cov=0.0, var_sq_norm=4.0, dof=5)

    estimate = fieller(moments, n=10)

    assert estimate.status is Status.INDETERMINATE
    assert (estimate.value, estimate.low, estimate.high) == (None, None, None)


def test_one_block_is_indeterminate():
    snapshot = fit_snapshot(_norms(1, blocks=(6,)))

    assert snapshot.noise_scale.status is Status.INDETERMINATE
    assert fit_noise_scale(_measurements(_norms(1, blocks=(6,)))).status is Status.INDETERMINATE


def test_zero_gradients_say_so():
    norms = norms_of(np.zeros((24, 3)), micro_batch_size=2, block_counts=(3,) * 4)

    assert fit_snapshot(norms).noise_scale.status is Status.NO_GRADIENT
    assert fit_noise_scale(_measurements(norms)).status is Status.NO_GRADIENT


@pytest.mark.parametrize(
    ("problem", "status", "remedy"),
    [
        (NoiseProblem.NON_FINITE_LOSS, Status.NON_FINITE, "lower the learning rate"),
        (NoiseProblem.ZERO_GRADIENT, Status.NO_GRADIENT, "require gradients"),
        (NoiseProblem.DATASET_TOO_SMALL, Status.INDETERMINATE, "more training samples"),
        (NoiseProblem.OUT_OF_MEMORY, Status.INDETERMINATE, "free memory"),
    ],
)
def test_problem_gives_its_status_and_remedy(problem, status, remedy):
    estimate = fit_noise_scale(_measurements(problem=problem))

    assert estimate.status is status
    assert estimate.value is None
    assert remedy in estimate.remarks[0]


def test_memory_that_ends_after_a_snapshot_leaves_an_estimate():
    estimate = fit_noise_scale(_measurements(_norms(1), problem=NoiseProblem.OUT_OF_MEMORY))

    assert estimate.status is Status.OK
    assert estimate.value is not None


def test_decided_when_the_interval_is_within_the_factor():
    assert is_decided(_norms(1, blocks=(6,) * 40))
    assert not is_decided(_norms(1, blocks=(1,) * 6))
    assert not is_decided(_norms(1, blocks=(6,) * 40), factor=1.01)


@pytest.mark.parametrize(("half_scale", "verdict", "words"), [(50.0, "agree", "the same noise"), (300.0, "differ", "another noise scale")])
def test_normalisation_over_half_the_size_is_compared_and_said(half_scale, verdict, words):
    usual, half = _norms(1, blocks=(6,) * 20), _norms(2, noise_scale=half_scale, blocks=(6,) * 20)
    measurements = _measurements(usual, batch_norm=True).model_copy(update={"half_size": half})

    assert compare_ghosts(usual, half) == verdict
    assert any(words in remark for remark in fit_noise_scale(measurements).remarks)


def test_micro_batch_sizes_without_coupling_are_told_apart_in_few_cases():
    rng, differ = np.random.default_rng(16), 0
    for _ in range(400):
        draws = [gaussian_gradients(rng, samples=160, noise_scale=50.0, dimension=40) for _ in range(2)]
        usual = norms_of(draws[0], micro_batch_size=8, block_counts=(1,) * 20)
        half = norms_of(draws[1], micro_batch_size=4, block_counts=(1,) * 40)
        differ += compare_ghosts(usual, half) == "differ"

    assert differ / 400 < 0.08  # 5 % and 3 standard errors


def test_a_size_that_says_nothing_is_not_compared():
    assert compare_ghosts(_norms(1), _norms(1, blocks=(6,))) == "unknown"
    measurements = _measurements(_norms(1), batch_norm=True).model_copy(update={"half_size": _norms(1, blocks=(6,))})
    assert len(fit_noise_scale(measurements).remarks) == 1


def test_batch_norm_and_missing_pilot_are_said():
    estimate = fit_noise_scale(_measurements(_norms(1), pilot_samples=0, batch_norm=True))

    assert any("normalisation over 4 samples" in remark for remark in estimate.remarks)
    assert any("no pilot" in remark for remark in estimate.remarks)
