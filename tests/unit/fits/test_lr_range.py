"""Which rates are compared, which wins, and every status that the range test can end with."""

import math

import numpy as np
import pytest

from oracles.oracle_curves import workload
from rightbatch.fits.lr_range import contenders, first_rates, fit_lr_range, next_rate, with_tested_rate
from rightbatch.records.estimates import Status
from rightbatch.records.lr_range_measurements import LrRangeMeasurements, LrRangePoint, LrRangeRound

START = 2.3


def swept(losses, *, lowest=1e-4, factor=10**0.25, diverges=True):
    """A sweep with planted smoothed losses; its last step diverges."""
    return tuple(
        LrRangePoint(lr=lowest * factor**step, smoothed_loss=loss, samples=32 * (step + 1), diverged=diverges and step == len(losses) - 1)
        for step, loss in enumerate(losses)
    )


def run(lr, loss, *, noise=0.0, seed=0):
    """A run that ends at a planted loss (none: it diverged); the batches' own noise is shared, ``noise`` is the run's."""
    if loss is None:
        return LrRangePoint(lr=lr, smoothed_loss=None, samples=64, diverged=True)
    shared = np.random.default_rng(99).normal(0, 0.3, 16)
    own = np.random.default_rng((seed, round(1e6 * lr))).normal(0, noise, 16) if noise else 0.0
    tail = tuple(float(value) for value in loss + shared + own)
    return LrRangePoint(lr=lr, smoothed_loss=float(np.mean(tail)), samples=640, diverged=False, tail_losses=tail)


def round_of(losses, **noise):
    still = run(1.0, START).tail_losses
    return LrRangeRound(still_losses=still, runs=tuple(run(lr, loss, **noise) for lr, loss in losses.items()))


def measured(*rounds, sweep=(), stopped_by="decided", remark=""):
    return LrRangeMeasurements(
        batch_size=64, optimizer="SGD", pilot_samples=0, sweep=sweep, rounds=rounds, stopped_by=stopped_by, remark=remark
    )


def test_grid_lies_between_the_steepest_fall_and_half_the_edge():
    sweep = swept([2.3, 2.3, 2.3, 2.28, 2.0, 1.2, 0.9, 0.85, 0.85, 3.0, 9.0])
    rates = first_rates(sweep)

    edge = sweep[-1].lr
    assert len(rates) == 5
    assert sorted(rates) == pytest.approx([rates[0] * 2.0**power for power in (-2, -1, 0, 1, 2)])
    assert sweep[4].lr < rates[0] < edge / 2


def test_grid_lies_around_the_steepest_fall_where_nothing_diverged():
    sweep = swept([2.3, 2.3, 2.3, 2.28, 2.0, 1.2, 0.9, 0.85, 0.85, 0.85], diverges=False)
    assert sweep[3].lr < first_rates(sweep)[0] < sweep[7].lr


def test_sweep_that_never_falls_gives_no_grid():
    assert first_rates(swept([2.3, 2.3, 2.3, 2.4, 2.6, 9.0])) == ()
    assert first_rates(()) == ()


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({0.1: 1.5, 0.2: 1.0, 0.4: 1.2}, None),
        ({0.1: 1.5, 0.2: 1.2, 0.4: 1.0}, 0.8),
        ({0.1: 1.0, 0.2: 1.2, 0.4: 1.5}, 0.05),
        ({0.1: 1.5, 0.2: 1.0, 0.4: None}, None),
        ({0.1: None, 0.2: None, 0.4: None}, 0.05),
        ({0.1 * 2**k: 2.0 - 0.1 * k for k in range(9)}, None),
    ],
)
def test_neighbour_beyond_the_best_end_of_the_grid_is_tried_next(losses, expected):
    assert next_rate(round_of(losses)) == (None if expected is None else pytest.approx(expected))


def test_contenders_are_the_tied_rates_and_their_neighbours():
    first = round_of({0.05: 1.9, 0.1: 1.5, 0.2: 1.0, 0.4: 1.001, 0.8: 1.6, 1.6: 2.0, 3.2: None})
    assert contenders(first) == (0.1, 0.2, 0.4, 0.8)
    assert contenders(round_of({0.1: None})) == ()


def test_interior_best_is_ok_with_an_interval_of_half_a_step():
    answer = fit_lr_range(measured(round_of({0.1: 1.5, 0.2: 1.0, 0.4: 1.2, 0.8: 1.6, 1.6: None})))

    assert (answer.status, answer.value, answer.batch_size) == (Status.OK, 0.2, 64)
    assert (answer.low, answer.high) == (pytest.approx(0.2 / math.sqrt(2)), pytest.approx(0.2 * math.sqrt(2)))
    assert answer.divergence_edge == 1.6
    assert answer.n == 4 * 640 + 64
    assert [verdict.is_tied for verdict in answer.verdicts] == [False, True, False, False, False]


def test_tie_goes_to_the_larger_rate():
    answer = fit_lr_range(measured(round_of({0.1: 1.5, 0.2: 1.0, 0.4: 1.005, 0.8: 1.6, 1.6: None})))

    assert answer.value == 0.4
    assert (answer.low, answer.high) == (pytest.approx(0.2 / math.sqrt(2)), pytest.approx(0.4 * math.sqrt(2)))


def test_tie_does_not_go_to_the_neighbour_of_a_rate_that_diverged():
    answer = fit_lr_range(measured(round_of({0.1: 1.5, 0.2: 1.0, 0.4: 1.005, 0.8: None})))

    assert answer.value == 0.2
    assert answer.high == pytest.approx(0.4 * math.sqrt(2))


def test_noise_of_the_runs_decides_what_ties():
    losses = {0.1: 1.5, 0.2: 1.0, 0.4: 1.1, 0.8: 1.6, 1.6: None}

    assert fit_lr_range(measured(round_of(losses, noise=0.01))).value == 0.2
    assert fit_lr_range(measured(round_of(losses, noise=0.5))).value == 0.4


def test_further_rounds_settle_what_one_could_not():
    losses = {0.1: 1.5, 0.2: 1.0, 0.4: 1.2, 0.8: 1.6}
    noisy = [round_of(losses, noise=0.35, seed=seed) for seed in range(3)]

    widths = [fit_lr_range(measured(*noisy[:count])).verdicts[2].excess for count in (1, 3)]

    assert widths[1].high - widths[1].low < widths[0].high - widths[0].low
    assert widths[1].low < 0.2 < widths[1].high


def test_rate_is_never_above_half_the_divergence_edge():
    answer = fit_lr_range(measured(round_of({0.1: 1.5, 0.2: 1.2, 0.4: 1.0}), sweep=swept([2.3, 9.0], lowest=0.06, factor=10)))

    assert answer.divergence_edge == pytest.approx(0.6)
    assert answer.value == pytest.approx(0.3)
    assert answer.high == pytest.approx(0.4 * math.sqrt(2))
    assert "half of its edge" in answer.remarks[0]


def test_best_at_the_upper_end_without_divergence_is_a_lower_bound():
    answer = fit_lr_range(measured(round_of({0.1: 1.5, 0.2: 1.2, 0.4: 1.0}), stopped_by="budget"))

    assert (answer.status, answer.value, answer.high) == (Status.AT_LEAST, 0.4, None)
    assert answer.low == pytest.approx(0.4 / math.sqrt(2))


def test_smallest_rate_that_only_ties_leaves_the_lower_end_open():
    answer = fit_lr_range(measured(round_of({0.1: 1.001, 0.2: 1.0, 0.4: 1.5})))

    assert (answer.status, answer.value, answer.low) == (Status.OK, 0.2, None)


@pytest.mark.parametrize(
    ("measurement", "words"),
    [
        (measured(stopped_by="failure", remark="The loss was NaN."), "found nothing. The loss was NaN."),
        (measured(stopped_by="budget"), "ended the range test after 0 fixed rates"),
        (measured(round_of({0.1: 1.5, 0.2: 1.0}), stopped_by="budget"), "after 2 fixed rates"),
        (measured(sweep=swept([2.3])), "ended the range test after 0 fixed rates"),
        (measured(sweep=swept([2.3, 2.3, 2.3, 2.3, 9.0])), "No rate lowered the loss in the sweep"),
        (measured(round_of({0.1: None, 0.2: None, 0.4: None})), "Every rate diverged"),
        (measured(round_of({0.1: START, 0.2: START, 0.4: START})), "by more than its noise"),
        (measured(round_of({0.1: 1.0, 0.2: 1.2, 0.4: 1.5})), "The smallest rate that was tried, 0.100, was the best"),
    ],
)
def test_no_rate_is_named_without_evidence(measurement, words):
    answer = fit_lr_range(measurement)

    assert (answer.status, answer.value, answer.low, answer.high) == (Status.INDETERMINATE, None, None, None)
    assert words in answer.remarks[0]


def test_tested_rate_plays_the_part_of_a_tuned_one_only_where_there_is_none():
    tested = fit_lr_range(measured(round_of({0.1: 1.5, 0.2: 1.0, 0.4: 1.2})))
    untuned = workload(lr_batch_size=None)

    used = with_tested_rate(untuned, tested)

    assert (used.lr, used.lr_batch_size, used.lr_is_tested) == (0.2, 64, True)
    assert with_tested_rate(workload(), tested) == workload()
    assert with_tested_rate(untuned, None) == untuned
    assert with_tested_rate(untuned, fit_lr_range(measured(stopped_by="budget"))) == untuned
