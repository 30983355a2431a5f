import math

import numpy as np
import pytest

from oracles.oracle_noise import step_trace_and_sq_norm
from rightbatch.fits.noise_stream import StepWeights, fit_layers, fit_noise_stream, step_moments
from rightbatch.records.estimates import Status
from rightbatch.records.measurements import NoiseBlock, NoiseStream

MICRO, SIZE, DIMENSION = 4, 8, 100
BATCH = MICRO * SIZE


def stream_of(traces, sq_norms, *, layers=("all",), steps_a_block=1, **changes):
    """A stream whose rows are steps, summed up over blocks."""
    traces, sq_norms = (np.atleast_2d(np.asarray(values, dtype=float).T).T.reshape(-1, len(layers)) for values in (traces, sq_norms))
    starts = range(0, len(traces), steps_a_block)
    ends = [min(start + steps_a_block, len(traces)) for start in starts]
    blocks = tuple(
        NoiseBlock(
            steps=end - start,
            micro_batches=MICRO * (end - start),
            samples=BATCH * (end - start),
            samples_seen=BATCH * end,
            trace_sums=tuple(traces[start:end].sum(axis=0).tolist()),
            sq_norm_sums=tuple(sq_norms[start:end].sum(axis=0).tolist()),
        )
        for start, end in zip(starts, ends, strict=True)
    )
    return NoiseStream(layers=layers, blocks=blocks, samples_seen=BATCH * len(traces), batch_norm=False, **changes)


def drawn_steps(rng, true_trace, true_sq_norm):
    """Estimates of S and G of steps with isotropic Gaussian gradients, drawn from their exact distributions."""
    steps = len(true_trace)
    trace = true_trace * rng.chisquare(DIMENSION * (MICRO - 1), steps) / (DIMENSION * (MICRO - 1))
    along = np.sqrt(true_sq_norm) + rng.standard_normal(steps) * np.sqrt(true_trace / DIMENSION / BATCH)
    across = true_trace / DIMENSION / BATCH * rng.chisquare(DIMENSION - 1, steps)
    return trace, along**2 + across - trace / BATCH


def wandering(rng, steps, correlation_steps, spread):
    """A positive process of mean 1 whose logarithm is autoregressive."""
    keep = math.exp(-1 / correlation_steps)
    values = [rng.standard_normal()]
    for shock in rng.standard_normal(steps - 1) * math.sqrt(1 - keep**2):
        values.append(keep * values[-1] + shock)
    return np.exp(spread * np.array(values) - spread**2 / 2)


@pytest.mark.parametrize("weights", [(1.0,) * 4, (3.0, 1.0, 0.5, 2.0)])
@pytest.mark.parametrize("dataset_size", [None, 60])
def test_moments_of_a_step_equal_those_of_pairs_of_micro_batches(weights, dataset_size):
    rng, sizes = np.random.default_rng(2), (3, 1, 5, 2)
    micro = rng.standard_normal((4, 6)) + 0.5
    weighted = np.array(weights)[:, None] * micro
    known = StepWeights(sum(weights), sum(w**2 for w in weights), sum(w**2 / m for w, m in zip(weights, sizes, strict=True)))

    moments = step_moments(np.array([(weighted**2).sum()]), np.array([(weighted.sum(0) ** 2).sum()]), known, dataset_size=dataset_size)

    expected = step_trace_and_sq_norm(micro, sizes, weights, dataset_size or math.inf)
    np.testing.assert_allclose(np.ravel(moments), expected, rtol=1e-10)


def test_moments_of_unequal_weighted_micro_batches_of_a_small_population_are_unbiased():
    rng, sizes, weights = np.random.default_rng(3), (5, 2, 1), np.array([5.0, 2.0, 1.0])
    population = rng.standard_normal((24, 6)) * 2 + 0.5
    truth = np.array([population.var(axis=0, ddof=1).sum(), (population.mean(axis=0) ** 2).sum()])
    known = StepWeights(weights.sum(), (weights**2).sum(), (weights**2 / sizes).sum())
    draws = []
    for _ in range(8000):
        sample = population[rng.permutation(24)[:8]]
        weighted = weights[:, None] * np.array([sample[:5].mean(0), sample[5:7].mean(0), sample[7]])
        draws.append(step_moments((weighted**2).sum(), (weighted.sum(0) ** 2).sum(), known, dataset_size=24))
    error = 4 * np.std(draws, axis=0) / np.sqrt(len(draws))

    assert (np.abs(np.mean(draws, axis=0) - truth) < error).all()
    assert error[1] < truth[0] / 24  # what leaving the population out would cost


@pytest.mark.parametrize("noise_scale", [20.0, 500.0])
def test_intervals_cover_the_long_run_noise_scale_of_a_run_that_wanders(noise_scale):
    rng, covered, repeats = np.random.default_rng(4), 0, 300
    for _ in range(repeats):
        true_trace, true_sq_norm = noise_scale * wandering(rng, 1280, 20, 0.4), wandering(rng, 1280, 20, 0.4)
        estimate = fit_noise_stream(stream_of(*drawn_steps(rng, true_trace, true_sq_norm), steps_a_block=32))
        covered += estimate.low is not None and estimate.low <= noise_scale and (estimate.high is None or estimate.high >= noise_scale)

    assert 0.92 <= covered / repeats <= 1.0


def test_intervals_of_a_steady_run_are_not_too_wide():
    rng, covered, repeats = np.random.default_rng(5), 0, 500
    for _ in range(repeats):
        estimate = fit_noise_stream(stream_of(*drawn_steps(rng, np.full(64, 100.0), np.ones(64))))
        covered += estimate.low <= 100 and (estimate.high is None or estimate.high >= 100)

    assert 0.92 <= covered / repeats <= 0.98


def test_the_value_is_the_weighted_average_along_the_run():
    """Two halves with noise scales 16 and 320 and gradients of very different length, without sampling noise."""
    traces, sq_norms = np.repeat([1600.0, 32.0], 32), np.repeat([100.0, 0.1], 32)
    weights = 1 / (1 + np.array([16.0, 320.0]) / BATCH)

    estimate = fit_noise_stream(stream_of(traces, sq_norms))

    assert estimate.value == pytest.approx(weights @ [16.0, 320.0] / weights.sum(), rel=1e-12)


def test_the_last_snapshot_is_the_most_recent_part():
    traces, sq_norms = np.repeat([1600.0, 32.0], 32), np.repeat([100.0, 0.1], 32)

    snapshots = fit_noise_stream(stream_of(traces, sq_norms)).snapshots

    assert [snapshot.samples_seen for snapshot in snapshots] == [BATCH * 8 * (part + 1) for part in range(8)]
    assert snapshots[0].noise_scale.value == pytest.approx(16.0)
    assert snapshots[-1].noise_scale.value == pytest.approx(320.0)
    assert snapshots[-1].grad_sq_norm.value == pytest.approx(0.1)
    assert snapshots[-1].grad_noise_trace.value == pytest.approx(32.0)
    assert (snapshots[-1].micro_batch_size, snapshots[-1].micro_batch_count) == (SIZE, 32)


def test_correlated_blocks_widen_the_interval():
    noise = np.random.default_rng(6).standard_normal(64)
    walk = np.convolve(noise, np.ones(8) / math.sqrt(8), mode="same")
    shuffled = np.random.default_rng(7).permutation(walk)

    wide, narrow = (fit_noise_stream(stream_of(100 + 20 * values, np.ones(64))) for values in (walk, shuffled))

    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_every_status_is_reached():
    rng = np.random.default_rng(8)
    steady, weak = (drawn_steps(rng, np.full(40, scale), np.ones(40)) for scale in (50.0, 6000.0))
    nothing = ([], [])
    found = {
        "ok": fit_noise_stream(stream_of(*steady)),
        "weak": fit_noise_stream(stream_of(*weak)),
        "few": fit_noise_stream(stream_of(steady[0][:7], steady[1][:7])),
        "one": fit_noise_stream(stream_of(steady[0][:1], steady[1][:1])),
        "noise alone": fit_noise_stream(stream_of(rng.standard_normal(40), rng.standard_normal(40))),
        "zero": fit_noise_stream(stream_of(np.zeros(20), np.zeros(20))),
        "infinite": fit_noise_stream(stream_of(*nothing, non_finite_steps=3)),
        "empty": fit_noise_stream(stream_of(*nothing)),
    }

    assert {name: estimate.status for name, estimate in found.items()} == {
        "ok": Status.OK,
        "weak": Status.AT_LEAST,
        "few": Status.INDETERMINATE,
        "one": Status.INDETERMINATE,
        "noise alone": Status.INDETERMINATE,
        "zero": Status.NO_GRADIENT,
        "infinite": Status.NON_FINITE,
        "empty": Status.INDETERMINATE,
    }
    assert found["few"].value == pytest.approx(steady[0][:7].sum() / steady[1][:7].sum())
    assert (found["few"].low, found["few"].high) == (None, None)
    assert 0 < found["weak"].low < 6000
    assert "at least" in found["weak"].remarks[0]
    assert "at least 28 are needed" in found["few"].remarks[0]


def test_layers_have_their_own_noise_scales():
    rng = np.random.default_rng(9)
    quiet, loud = (drawn_steps(rng, np.full(64, scale), np.ones(64)) for scale in (10.0, 100.0))

    layers = fit_layers(stream_of(np.column_stack([quiet[0], loud[0]]), np.column_stack([quiet[1], loud[1]]), layers=("quiet", "loud")))

    assert list(layers) == ["quiet", "loud"]
    assert layers["quiet"].low < 10 < layers["quiet"].high < layers["loud"].low < 100 < layers["loud"].high
    assert fit_layers(stream_of([], [], layers=("quiet",)))["quiet"].status is Status.INDETERMINATE


@pytest.mark.parametrize(
    ("count", "words"),
    [("non_finite_steps", "not finite"), ("single_steps", "one micro-batch"), ("inconsistent_steps", "clear gradients"),
     ("dropped_steps", "without an optimizer step")],
)  # fmt: skip
def test_steps_left_out_are_said(count, words):
    assert any(words in remark and remark.startswith("5 ") for remark in fit_noise_stream(stream_of([], [], **{count: 5})).remarks)
