import math

import pytest

from rightbatch.records.training_log import TrainingTarget
from rightbatch.sweeps.crossing import COARSE_RATIO, FINE_RATIO, HOLD, Course

ACCURACY = TrainingTarget.parse("accuracy>=0.9")
LOSS = TrainingTarget.parse("loss<=0.5")


def course_of(values, *, target=ACCURACY, most_samples=100_000, epoch=100, every=100):
    course = Course(target, epoch_samples=epoch, most_samples=most_samples)
    for index, value in enumerate(values, start=1):
        course.add(index * every, index, index * 0.5, value)
    return course


def follow(law, *, target=ACCURACY, most_samples=100_000, epoch=1000, batch=1):
    """Evaluate a law of samples whenever an evaluation is due, until the course ends."""
    course = Course(target, epoch_samples=epoch, most_samples=most_samples)
    samples = 0
    while samples < most_samples and course.crossing is None and not course.is_flat:
        samples = min(math.ceil(course.due), most_samples)
        course.add(samples, samples // batch, samples * 0.001, law(samples))
    return course


def test_one_lucky_evaluation_does_not_reach_the_target():
    assert course_of([0.5, 0.6, 0.95, 0.6, 0.6, 0.6]).crossing is None


def test_the_target_is_reached_where_the_smoothed_metric_crosses_it():
    course = course_of([0.88, 0.88, 0.88, 0.88, 0.88, 0.98])  # smoothed: 0.88, then 0.90

    crossing = course.crossing

    assert crossing.samples == pytest.approx(600)
    assert (crossing.steps, crossing.training_s) == pytest.approx((6, 3.0))


def test_between_two_evaluations_the_crossing_is_linear_in_log_samples():
    crossing = course_of([0.88, 0.88, 0.88, 0.88, 0.88, 1.08]).crossing  # smoothed: 0.88, then 0.92: half way

    assert crossing.samples == pytest.approx(math.sqrt(500 * 600))
    assert 5 < crossing.steps < 6
    assert crossing.training_s == pytest.approx(crossing.steps * 0.5)


def test_a_metric_that_is_there_from_the_start_counts_once_it_has_held():
    course = course_of([0.95] * (HOLD - 1))
    assert course.crossing is None

    course.add(500, 5, 2.5, 0.95)
    assert course.crossing.samples == pytest.approx(500)


def test_a_loss_reaches_its_target_from_above():
    assert course_of([0.6, 0.6, 0.6, 0.6, 0.6, 0.0], target=LOSS).crossing is not None
    assert course_of([0.6] * 10, target=LOSS).crossing is None


def test_evaluations_are_close_near_the_target_and_far_apart_elsewhere():
    course = Course(ACCURACY, epoch_samples=1000, most_samples=10_000)
    assert course.due == 100

    course.add(100, 1, 0.1, 0.3)
    assert course.due == pytest.approx(100 * COARSE_RATIO)
    course.add(120, 2, 0.2, 0.8)
    assert course.due == pytest.approx(120 * FINE_RATIO)


def test_a_training_that_nears_an_asymptote_below_the_target_is_given_up():
    course = follow(lambda samples: 0.8 - 0.5 * math.exp(-samples / 3000))

    assert course.is_flat
    assert course.evaluations[-1].samples < 40_000


def test_a_training_that_still_gains_is_not_given_up():
    course = follow(lambda samples: 0.95 - 0.6 * (samples / 1000) ** -0.5, most_samples=1_000_000)

    assert course.crossing is not None


def test_the_first_tens_of_steps_are_not_judged():
    course = follow(lambda samples: 0.8 - 0.5 * math.exp(-samples / 3000), batch=512, most_samples=60_000)

    assert course.evaluations[-1].samples == 60_000


def test_a_training_that_stays_at_chance_runs_to_its_limit():
    course = follow(lambda samples: 0.1 + 0.001 * (samples % 7), most_samples=40_000)

    assert course.evaluations[-1].samples == 40_000


def test_a_plateau_at_the_start_is_not_given_up():
    course = follow(lambda samples: 0.1 if samples < 6000 else 0.1 + 0.85 * (1 - math.exp(-(samples - 6000) / 3000)))

    assert course.crossing is not None
