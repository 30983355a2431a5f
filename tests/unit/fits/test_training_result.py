"""What a training came to follows from its log alone."""

import pytest

import training_samples as samples
from rightbatch.fits.training_result import evenly, predicted_curve, predicted_seconds, thinned, training_result
from rightbatch.records.training_log import EvaluationLine, StepLine
from rightbatch.records.training_run import PredictedStep, TrainingState


def steps_of(training: samples.Training) -> list[StepLine]:
    return [line for line in training[1] if isinstance(line, StepLine)]


def test_a_training_that_reached_its_target() -> None:
    result = training_result(*samples.good())

    assert (result.steps, result.samples, result.epochs) == (220, 40_000, 4.0)
    assert result.batch_sizes == ((0, 128), (20_000, 256))
    assert result.reached is not None
    assert result.reached.samples == 40_000
    assert result.evaluation == result.best == result.reached


def test_a_target_that_no_evaluation_met() -> None:
    result = training_result(*samples.hostile_names())

    assert result.reached is None
    assert result.best is not None
    assert result.best.samples == 40_000


def test_a_training_that_has_not_begun() -> None:
    result = training_result(samples.manifest(TrainingState.UNFINISHED), ())

    assert (result.steps, result.samples, result.samples_per_s, result.predicted_s, result.batch_sizes) == (0, 0, None, None, ())


def test_the_best_evaluation_without_a_metric_has_the_lowest_loss() -> None:
    made = [EvaluationLine(step=n, samples=n, training_s=n, loss=loss, evaluated_samples=1) for n, loss in ((1, 0.5), (2, 0.2), (3, None))]

    assert training_result(samples.manifest(), made).best == made[1]


def test_predicted_time_is_that_of_the_sizes_that_were_trained() -> None:
    manifest, _ = training = samples.good()
    steps = steps_of(training)

    predicted_s = predicted_seconds(steps, manifest.predicted_steps)

    by_hand = sum(count / size * (0.004 + size * 2e-4) for count, size in ((20_000, 128), (20_000, 256)))
    assert predicted_s == pytest.approx(by_hand)
    assert predicted_curve(steps, manifest.predicted_steps)[-1] == predicted_s


@pytest.mark.parametrize("sizes", [(), (32, 128), (512, 1024)])
def test_a_size_outside_the_known_ones_is_not_predicted(sizes: tuple[int, ...]) -> None:
    known = [PredictedStep(global_batch_size=size, step_time_s=0.1) for size in sizes]

    assert predicted_seconds(steps_of(samples.good()), known) is None


@pytest.mark.parametrize("most", [1, 3, 7])
def test_thinning_keeps_the_mean_loss_and_the_end(most: int) -> None:
    steps = steps_of(samples.good())

    fewer = thinned(steps, most)

    counts = [
        later - earlier for earlier, later in zip([0, *(line.samples for line in fewer)], [line.samples for line in fewer], strict=False)
    ]
    mean = sum(line.loss * count for line, count in zip(fewer, counts, strict=True)) / sum(counts)
    assert len(fewer) == most
    assert fewer[-1].samples == steps[-1].samples
    assert mean == pytest.approx(sum(line.loss for line in steps) / len(steps))


def test_thinning_hides_no_loss_that_was_not_finite() -> None:
    assert thinned(steps_of(samples.diverged()), 1)[0].loss is None


def test_short_logs_are_left_alone() -> None:
    steps = steps_of(samples.good())

    assert thinned(steps, 100) == tuple(steps)


@pytest.mark.parametrize(("count", "most"), [(3, 5), (5, 5), (1000, 7), (10, 1)])
def test_items_are_picked_evenly_up_to_the_last(count: int, most: int) -> None:
    picked = evenly(range(count), most)

    assert len(picked) == min(count, most)
    assert picked[-1] == count - 1
    assert sorted(set(picked)) == list(picked)
