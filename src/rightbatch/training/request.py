"""What is asked of a training; imports nothing heavy, so that the command line can build one before torch is loaded."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rightbatch.errors import UsageError
from rightbatch.records.plan import BatchPlan
from rightbatch.records.request import RunRequest
from rightbatch.records.schedule import BatchSchedule, ScheduleForecast
from rightbatch.records.training_log import EvaluationLine, TrainingTarget
from rightbatch.records.training_run import PredictedStep

KeepGoing = Callable[[EvaluationLine], bool]
"""Says after an evaluation whether the training goes on, as a search over many trainings needs."""


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(RunRequest):
    """Everything that changes how a training goes, or where it is kept.

    Raises:
        UsageError: Not exactly one of ``epochs`` and ``samples`` is given, or one is not positive and finite.
    """

    plan: BatchPlan
    plan_source: str = "the caller"
    """Where the plan comes from, in words."""
    epochs: float | None = None
    samples: int | None = None
    """How long to train: epochs, or samples over all epochs and ranks."""
    target: TrainingTarget | None = None
    """Ends the training as soon as an evaluation meets it."""
    schedule: BatchSchedule | None = None
    """How the batch size changes; none keeps the plan's."""
    schedule_words: str = "constant"
    schedule_asked: str = ""
    """The word that it was asked for with."""
    forecast: ScheduleForecast | None = None
    """What the schedule was predicted to gain."""
    predicted_steps: tuple[PredictedStep, ...] = ()
    """Step times from the plan's findings, to compare the realised time with."""
    noise_every: int | None = None
    """Measure the gradient noise on every so many steps; 0 never; none where it costs and changes next to nothing."""
    seed: int = 0
    resume: bool = False
    """Whether to go on from the last checkpoint in the folder; from the start when there is none."""
    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints; one more is written at the end."""
    evaluate_every: int | None = None
    """Samples between evaluations; none evaluates after each epoch. One more is made at the end."""
    log_every_s: float = 0.2
    """Seconds between lines of the log; one more is written before each evaluation and checkpoint."""
    command: tuple[str, ...] = ()
    """The command that asks for this."""

    def __post_init__(self) -> None:
        lengths = [length for length in (self.epochs, self.samples) if length is not None]
        if len(lengths) != 1 or not 0 < lengths[0] < math.inf:
            raise UsageError(
                f"a training needs a positive, finite number of epochs or of samples; got epochs {self.epochs} and samples {self.samples}; "
                "give one, such as --epochs 10."
            )
        for name in ("evaluate_every", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1; got {value}.")
        if self.noise_every is not None and self.noise_every < 0:
            raise UsageError(f"noise_every must be at least 1, or 0 not to measure; got {self.noise_every}.")
        if (self.resume or self.fresh) and self.out is None:
            raise UsageError("going on with a training, or starting it again, needs its folder; got none; say which with out.")
        if self.resume and self.fresh:
            raise UsageError("a training either goes on (resume) or starts again (fresh); got both; drop one.")


class TrainingProgress(Protocol):
    """Where a training says how it goes."""

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Show a stage (``training``, ``evaluation``), the fraction of the samples that is trained on, and one line of detail."""


class SilentTraining:
    """Says nothing."""

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Ignore the report."""
