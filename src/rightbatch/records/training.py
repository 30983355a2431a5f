"""What training at several batch sizes showed: raw numbers, nothing concluded."""

from enum import StrEnum

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rightbatch.records.gradient_norms import GradientNorms
from rightbatch.records.record import Record


class ProbeOutcome(StrEnum):
    """How one training probe ended."""

    REACHED = "reached"
    """It reached the target."""
    STOPPED = "stopped"
    """It was stopped before the target, because it could not win any more."""
    FAILED = "failed"
    """It diverged, or ended without the target after all the samples that it could have had."""


class TrainingProbe(Record):
    """One training run at one global batch size, towards a target that all probes share."""

    global_batch_size: PositiveInt
    lr: PositiveFloat | None = None
    lr_over_rule: PositiveFloat = 1.0
    """Its learning rate over the one that couples to its size by the rule."""
    seed: int = 0
    outcome: ProbeOutcome
    samples: PositiveFloat
    """Samples to the target when it was reached; samples that were trained on without reaching it otherwise."""
    log_error: NonNegativeFloat = 0.0
    """Standard error of log samples from reading them off a noisy curve, apart from the scatter between seeds."""


class SweepEvidence(Record):
    """What a finished sweep of the same workload showed: one probe a size, at its tuned rate, the mean over seeds."""

    target: str
    """In words, such as ``accuracy >= 0.97``."""
    folder: str
    """Where the sweep is kept."""
    probes: tuple[TrainingProbe, ...]
    """In ascending order of size; all reached the target."""


class BranchPlan(Record):
    """How to train one branch."""

    micro_batch_size: PositiveInt
    accumulation_steps: PositiveInt
    lr_factor: PositiveFloat
    """Learning rate over the workload's own."""
    lr_over_rule: PositiveFloat = 1.0
    """The part of that factor which is not the rule's for this size."""
    most_samples: PositiveInt
    """Where to stop without the target."""

    @property
    def global_batch_size(self) -> int:
        """Samples of one step."""
        return self.micro_batch_size * self.accumulation_steps


class BranchProbe(Record):
    """One branch: training from the common checkpoint at one size, with the learning rate coupled to it."""

    micro_batch_size: PositiveInt
    accumulation_steps: PositiveInt
    result: TrainingProbe
    """Its target is the loss that the first branch came to near its end."""
    losses: tuple[tuple[PositiveInt, float], ...]
    """(samples since the checkpoint, loss on the same held-out samples)."""


class BranchMeasurements(Record):
    """Training probes from one checkpoint, on the same samples in the same order."""

    checkpoint_samples: NonNegativeInt
    """Samples trained on before the branches part."""
    checkpoint_batch_size: PositiveInt
    evaluated_samples: NonNegativeInt
    """Held-out samples on which the loss is evaluated."""
    target_loss: float | None
    """None when no branch could be trained."""
    probes: tuple[BranchProbe, ...]
    checkpoint_norms: GradientNorms | None = None
    """Gradient noise at the checkpoint; none where it could not be measured."""
    remark: str = ""
