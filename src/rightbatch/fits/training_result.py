"""What a training came to, from its log alone; and what it should have taken by the plan's findings."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from rightbatch.records.training_log import EvaluationLine, EventLine, LogEvent, LogLine, StepLine
from rightbatch.records.training_run import PredictedStep, TrainingManifest, TrainingResult

T = TypeVar("T")


def training_result(manifest: TrainingManifest, lines: Sequence[LogLine]) -> TrainingResult:
    """Sum up a training.

    Args:
        manifest: What was asked, and how it ended.
        lines: Its log.
    """
    steps = [line for line in lines if isinstance(line, StepLine)]
    evaluations = [line for line in lines if isinstance(line, EvaluationLine)]
    events = [line.event for line in lines if isinstance(line, EventLine)]
    last = max(lines, key=lambda line: line.step, default=None)
    samples, training_s = (0, 0.0) if last is None else (last.samples, last.training_s)
    target = manifest.target
    return TrainingResult(
        state=manifest.state,
        workload_name=manifest.workload_name,
        plan=manifest.plan,
        plan_source=manifest.plan_source,
        schedule=manifest.schedule,
        forecast=manifest.forecast,
        target=target,
        steps=0 if last is None else last.step,
        samples=samples,
        samples_asked=manifest.samples,
        epochs=samples / manifest.samples_per_epoch,
        training_s=training_s,
        predicted_s=predicted_seconds(steps, manifest.predicted_steps),
        samples_per_s=samples / training_s if samples and training_s else None,
        batch_sizes=batch_sizes(steps),
        train_loss=steps[-1].loss if steps else None,
        evaluation=evaluations[-1] if evaluations else None,
        best=_best(evaluations),
        reached=next((line for line in evaluations if target is not None and target.is_met_by(line)), None),
        resumes=events.count(LogEvent.RESUMED),
        out_of_memory=events.count(LogEvent.OUT_OF_MEMORY),
    )


def batch_sizes(steps: Sequence[StepLine]) -> tuple[tuple[int, int], ...]:
    """Return (samples trained on before, global batch size) wherever the size of the log's steps changes."""
    changes: list[tuple[int, int]] = []
    before = 0
    for line in steps:
        if not changes or changes[-1][1] != line.global_batch_size:
            changes.append((before, line.global_batch_size))
        before = line.samples
    return tuple(changes)


def predicted_seconds(steps: Sequence[StepLine], predicted: Sequence[PredictedStep]) -> float | None:
    """Return the seconds that the steps of a log should have taken, from step times at some sizes.

    A step between two sizes of known time takes what the straight line between them says: step times are nearly affine in the size.

    Args:
        steps: The log's lines, in order.
        predicted: Step times by size.

    Returns:
        Seconds; none without steps, or when a size lies outside the known ones.
    """
    curve = predicted_curve(steps, predicted)
    return curve[-1] if curve else None


def predicted_curve(steps: Sequence[StepLine], predicted: Sequence[PredictedStep]) -> tuple[float, ...]:
    """Return the predicted seconds up to each line of the log; empty when they cannot be told: see ``predicted_seconds``."""
    known = sorted(predicted, key=lambda one: one.global_batch_size)
    sizes = [one.global_batch_size for one in known]
    if not steps or not known or not all(sizes[0] <= line.global_batch_size <= sizes[-1] for line in steps):
        return ()
    samples = np.diff([0, *(line.samples for line in steps)])
    batch = np.array([line.global_batch_size for line in steps])
    step_time_s = np.interp(batch, sizes, [one.step_time_s for one in known])
    return tuple(np.cumsum(samples / batch * step_time_s).tolist())


def thinned(steps: Sequence[StepLine], most: int) -> tuple[StepLine, ...]:
    """Return at most so many lines of a long log, each joining neighbours: losses averaged by samples, the rest from the last of them.

    Args:
        steps: The log's lines, in order.
        most: How many to return, at least 1.
    """
    if len(steps) <= most:
        return tuple(steps)
    bounds = np.linspace(0, len(steps), most + 1).astype(int).tolist()
    starts = [0, *(line.samples for line in steps)]
    return tuple(_joined(steps[start:stop], starts[start : stop + 1]) for start, stop in pairwise(bounds))


def evenly(items: Sequence[T], most: int) -> tuple[T, ...]:
    """Return at most so many items of a long sequence, evenly spread, the last one among them.

    Args:
        items: In order.
        most: How many to return, at least 1.
    """
    if len(items) <= most:
        return tuple(items)
    places = np.linspace(len(items) / most - 1, len(items) - 1, most).round().astype(int).tolist()
    return tuple(items[place] for place in places)


def _joined(steps: Sequence[StepLine], bounds: Sequence[int]) -> StepLine:
    weights = np.diff(bounds)
    losses = [line.loss for line in steps]
    finite = [loss for loss in losses if loss is not None]
    loss = float(np.average(finite, weights=weights)) if len(finite) == len(losses) and weights.sum() > 0 else None
    noise = next((line.noise_scale for line in reversed(steps) if line.noise_scale is not None), None)
    return steps[-1].model_copy(update={"loss": loss, "noise_scale": noise})


def _best(evaluations: Sequence[EvaluationLine]) -> EvaluationLine | None:
    with_metric = [line for line in evaluations if line.metric is not None]
    if with_metric:
        return max(with_metric, key=lambda line: line.metric or 0.0)
    with_loss = [line for line in evaluations if line.loss is not None]
    return min(with_loss, key=lambda line: line.loss or 0.0, default=None)
