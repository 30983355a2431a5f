"""Where a trial reaches its target and holds it, and when it cannot arrive any more. Pure: evaluations in, a verdict out."""

import math
from dataclasses import dataclass

from rightbatch.records.training_log import TrainingTarget

HOLD = 5
"""The mean of so many evaluations in a row has to reach the target: one lucky evaluation does not."""
FIRST_EVALUATION = 0.1
"""Epochs before the first evaluation."""
COARSE_RATIO, FINE_RATIO = 1.2, 1.05
"""Samples seen at one evaluation over those at the one before: far from the target, and near it."""
NEAR = 0.15
"""Near: the metric is within this fraction of the target."""
PATIENCE = 2.0
"""A trial is given up when even gaining so many times faster than over the last doubling would not bring it to the target in time."""
FEWEST_EPOCHS, FEWEST_STEPS = 4.0, 200
"""Before so many epochs and steps nothing is given up: with momentum the first tens of steps overshoot and come back."""
FEWEST_PROGRESS = 0.5
"""Nor before so large a share of the way to the target: plateaus at the start end, and what is learnt late is learnt."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation.

    Attributes:
        samples: Trained on until then.
        steps: Optimizer steps until then.
        training_s: Seconds of training until then.
        value: The smoothed metric or loss.
    """

    samples: int
    steps: int
    training_s: float
    value: float


@dataclass(frozen=True)
class Crossing:
    """Where the smoothed metric crossed the target, between two evaluations: linear in the logarithm of the samples.

    Attributes:
        samples: To the target.
        steps: To the target.
        training_s: Seconds to the target.
    """

    samples: float
    steps: float
    training_s: float


class Course:
    """The evaluations of one trial.

    Args:
        target: What has to be reached.
        epoch_samples: Samples of the training set.
        most_samples: Where the trial ends in any case.
    """

    def __init__(self, target: TrainingTarget, *, epoch_samples: int, most_samples: int) -> None:
        self._sign = -1.0 if target.is_loss else 1.0
        self._target = self._sign * target.value
        self._epoch_samples = epoch_samples
        self._most_samples = most_samples
        self._raw: list[float] = []
        self.evaluations: list[Evaluated] = []
        self.due = max(1.0, FIRST_EVALUATION * epoch_samples)
        """Samples at which to evaluate next."""

    def add(self, samples: int, steps: int, training_s: float, value: float) -> None:
        """Take one evaluation of the metric or the loss in, and say when the next one is due."""
        self._raw.append(value)
        recent = self._raw[-HOLD:]
        self.evaluations.append(Evaluated(samples, steps, training_s, sum(recent) / len(recent)))
        is_near = self._sign * value >= self._target - NEAR * abs(self._target)
        self.due = samples * (FINE_RATIO if is_near else COARSE_RATIO)

    @property
    def crossing(self) -> Crossing | None:
        """Where the target was reached and held; none so far."""
        if len(self._raw) < HOLD or not self._has_arrived(self.evaluations[-1]):
            return None
        after = self.evaluations[-1]
        before = self.evaluations[-2] if len(self._raw) > HOLD else after
        gained = self._sign * (after.value - before.value)
        share = (self._target - self._sign * before.value) / gained if gained > 0 else 1.0
        samples = math.exp(math.log(before.samples) + share * math.log(after.samples / before.samples))
        part = (samples - before.samples) / (after.samples - before.samples) if after.samples > before.samples else 1.0
        return Crossing(
            samples=samples,
            steps=before.steps + part * (after.steps - before.steps),
            training_s=before.training_s + part * (after.training_s - before.training_s),
        )

    @property
    def is_flat(self) -> bool:
        """Whether it will not arrive in time: the asymptote check.

        Near its asymptote a training gains less over every further doubling of samples. Once it does, the gain g over the last doubling
        bounds what is to come: a distance d to the target takes d / g doublings more at least. ``PATIENCE`` is the doubt left in that.
        """
        if not self.evaluations:
            return False
        last = self.evaluations[-1]
        if last.samples < FEWEST_EPOCHS * self._epoch_samples or last.steps < FEWEST_STEPS:
            return False
        before, earlier = self._at(last.samples / 2), self._at(last.samples / 4)
        if before is None or earlier is None or last.samples >= self._most_samples:
            return False
        distance = self._target - self._sign * last.value
        progress = self._sign * (last.value - self.evaluations[0].value)
        gain, gain_before = (self._sign * (later.value - sooner.value) for later, sooner in ((last, before), (before, earlier)))
        slows_down = gain < gain_before and progress >= FEWEST_PROGRESS * (progress + distance)
        return slows_down and distance > PATIENCE * max(gain, 0.0) * math.log2(self._most_samples / last.samples)

    def _at(self, samples: float) -> Evaluated | None:
        """The last evaluation before so many samples; none while too few were made for their mean to be smooth."""
        before = [evaluated for evaluated in self.evaluations if evaluated.samples <= samples]
        return before[-1] if len(before) >= HOLD else None

    def _has_arrived(self, evaluated: Evaluated) -> bool:
        return self._sign * evaluated.value >= self._target
