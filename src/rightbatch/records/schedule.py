"""Batch schedules: the global batch size by samples seen, what moves with it, and what a schedule is forecast to gain."""

import itertools
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.record import Record


class BatchSetting(Record):
    """What one optimizer step trains with; factors and powers are against the optimizer as it was built, for the plan's size."""

    global_batch_size: PositiveInt
    lr_factor: PositiveFloat = 1.0
    """The rate is multiplied with it."""
    beta_power: PositiveFloat = 1.0
    """Each of Adam's betas is raised to it; momentum stays."""
    weight_decay_factor: PositiveFloat = 1.0
    """A weight decay apart from the gradient (AdamW's) is multiplied with it; 1 for one inside the gradient."""
    clip_factor: PositiveFloat = 1.0
    """The largest norm of the gradient is multiplied with it."""


class SizeCoupling(Record):
    """How the learning rate and its company follow the size (fits/lr_scaling.py and fits/lr_company.py hold the rules)."""

    base_batch_size: PositiveInt
    """The size at which the optimizer's settings hold as they are: the plan's."""
    optimizer: str
    """Class name of the optimizer, which decides the rule."""
    noise_scale_samples: PositiveFloat | None = None
    """Noise scale at which the rule saturates; none when it is not known."""


class _Schedule(Record):
    coupling: SizeCoupling | None = None
    """None keeps the rate and its company the same at all sizes."""


class ConstantSize(_Schedule):
    """The same size from the first sample to the last."""

    kind: Literal["constant"] = "constant"
    global_batch_size: PositiveInt


class MilestoneSizes(_Schedule):
    """A new size at each milestone."""

    kind: Literal["milestones"] = "milestones"
    milestones: tuple[tuple[NonNegativeInt, PositiveInt], ...] = Field(min_length=1)
    """(samples seen, size from there on), ascending; the first at 0."""

    @model_validator(mode="after")
    def _ascend_from_zero(self) -> "MilestoneSizes":
        positions = [samples for samples, _ in self.milestones]
        if positions[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(positions)):
            raise ValueError(f"milestones must ascend in samples and begin at 0; got {', '.join(map(str, positions))}.")
        return self


class _Growth(_Schedule):
    start: PositiveInt
    """Size at the first sample."""
    stop: PositiveInt
    """Size from ``over_samples`` on; may be smaller than ``start``."""
    over_samples: PositiveInt


class LinearGrowth(_Growth):
    """By as many samples a step with every sample seen, in friendly sizes."""

    kind: Literal["linear"] = "linear"


class GeometricGrowth(_Growth):
    """By the same factor with every sample seen, in friendly sizes."""

    kind: Literal["geometric"] = "geometric"


class GrowthForDecay(_Schedule):
    """The batch grows by a factor where the rate would have been divided by it; the rate stays.

    Beyond ``largest`` the rate is divided after all, by what the size does not take: rate over size is what the decay would have made it.

    Source:
        Smith et al. 2018, Don't decay the learning rate, increase the batch size, arXiv:1711.00489.
    """

    kind: Literal["grow"] = "grow"
    start: PositiveInt
    factor: float = Field(gt=1)
    at_samples: tuple[PositiveInt, ...] = Field(min_length=1)
    """Samples seen where the rate would have been divided, ascending."""
    largest: PositiveInt

    @model_validator(mode="after")
    def _ascend(self) -> "GrowthForDecay":
        if any(later <= earlier for earlier, later in itertools.pairwise(self.at_samples)):
            raise ValueError(f"at_samples must ascend; got {', '.join(map(str, self.at_samples))}.")
        if self.largest < self.start:
            raise ValueError(f"largest must be at least start; got {self.largest} and {self.start}.")
        return self


class NoiseAdaptive(_Schedule):
    """The size follows the measured gradient noise: b = sqrt(c B b_half)."""

    kind: Literal["noise"] = "noise"
    start: PositiveInt
    """Size until the first decision."""
    smallest: PositiveInt
    largest: PositiveInt
    half_saturation: PositiveFloat
    """b_half = t0 * tau of the step time, in samples."""
    calibration: PositiveFloat
    """c = B_crit / B."""
    hysteresis: NonNegativeFloat = 0.05
    """A size that differs by no more than this fraction is not worth a change."""
    most_growth: float = Field(default=2.0, gt=1)
    """Largest factor up or down of one decision."""

    @model_validator(mode="after")
    def _start_is_within_bounds(self) -> "NoiseAdaptive":
        if not self.smallest <= self.start <= self.largest:
            raise ValueError(f"start must lie between smallest and largest; got {self.start}, {self.smallest} and {self.largest}.")
        return self


BatchSchedule: TypeAlias = Annotated[
    ConstantSize | MilestoneSizes | LinearGrowth | GeometricGrowth | GrowthForDecay | NoiseAdaptive, Field(discriminator="kind")
]
ScheduleKind: TypeAlias = Literal["constant", "milestones", "linear", "geometric", "grow", "noise"]


class SizeDecision(Record):
    """A size that a noise-adaptive schedule went over to."""

    samples_seen: NonNegativeInt
    """Where it begins."""
    global_batch_size: PositiveInt
    noise_scale_samples: PositiveFloat | None = None
    """Noise scale that it rests on."""


class ScheduleForecast(Record):
    """What a schedule is predicted to gain over the best fixed size, before it is offered."""

    status: Status
    """``indeterminate`` when the noise or the step time is unknown: nothing is forecast then."""
    relative_time: Estimate
    """Time to the target over that of the best fixed size, draw by draw: mean and 90 % interval."""
    relative_samples: Estimate
    """Samples to the target over those of the best fixed size, likewise."""
    worth_it: bool
    """Whether the expected ratio is 0.95 or less."""
    best_fixed_size: PositiveInt | None
    """Fixed size of least expected time, or the size that growth instead of decay begins with; none when nothing is forecast."""
    first_size: PositiveInt | None
    """Median size that the schedule begins with."""
    last_size: PositiveInt | None
    """Median size that it ends with."""
    noise_growth: Estimate
    """Noise scale at the run's end over that at its beginning; unknown where the forecast does not rest on it."""
    reasons: tuple[str, ...]
    """Why it is worth it or not, in sentences."""
