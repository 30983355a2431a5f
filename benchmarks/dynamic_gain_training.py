"""Training by a batch schedule to a target loss: the sizes of the steps on the way, from which any clock gives the seconds."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Subset

import rightbatch as rb
from live_regret_training import COARSE_RATIO, FINE_RATIO, FIRST_EVALUATION, Crossing, Trainer
from rightbatch.engine.step import Trainee, apply_update, clear_gradients
from rightbatch.records.schedule import BatchSetting
from rightbatch.training.batch_schedule import DynamicBatch

EVALUATED = 2_000
"""Training samples on which the loss is evaluated, at most."""
MEASURE_EVERY, DECIDE_EVERY = 2, 8
"""Steps between measurements of the noise, and between decisions."""
MICRO_BATCH = 32
"""Samples of a micro-batch in measured steps: the more of them a step has, the better its noise is known."""
NEAR_LOSS = 1.5
"""Near the target: the loss is within this factor."""
MOST_DIVERGED = 20.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One training.

    Attributes:
        steps: (global batch size, steps of that size) until the target was crossed.
        samples: Samples at the crossing; none when it never came.
    """

    steps: tuple[tuple[int, int], ...]
    samples: float | None

    @classmethod
    def of(cls, sizes: Sequence[int], samples: float | None) -> "Trained":
        """Keep what was trained up to the crossing, from the size of every step."""
        if samples is not None:
            sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), samples)) + 1]
        return cls(steps=tuple((size, len(list(run))) for size, run in itertools.groupby(sizes)), samples=samples)

    def seconds(self, step_time_s: Callable[[float], float]) -> float:
        """Seconds to the crossing on a device whose steps take so long; the last step counts in part, and infinitely many without one."""
        if self.samples is None:
            return math.inf
        last = self.steps[-1][0]
        past = (sum(size * count for size, count in self.steps) - self.samples) / last
        return sum(count * step_time_s(size) for size, count in self.steps) - past * step_time_s(last)


def to_loss(workload: rb.Workload) -> rb.Workload:
    """The workload with the loss on its own training samples, negative, as the metric: what the law of the trade-off is about."""
    held = Subset(workload.train, range(min(EVALUATED, len(workload.train))))
    return replace(workload, valid=held, metric=lambda scores, labels: -functional.cross_entropy(scores, labels).item())


class ScheduleTrainer:
    """Trains a workload by a schedule until its loss on the training set reaches a target.

    Args:
        workload: With the loss as the metric, from ``to_loss``.
        target_loss: What has to be reached.
        lr: Rate at the size where the schedule's coupling is neutral.
    """

    def __init__(self, workload: rb.Workload, target_loss: float, lr: float) -> None:
        self.trainer = Trainer(workload, -target_loss)
        self._target_loss, self._lr = target_loss, lr

    def __call__(self, schedule: DynamicBatch, seed: int, most_samples: float) -> Trained:
        """Train a fresh model; the seed sets weights and order.

        Args:
            schedule: Fresh; an adaptive one decides from the noise of this very training.
            seed: Of everything random.
            most_samples: Where to give up.
        """
        crossing, sizes = Crossing(-self._target_loss), []
        due = FIRST_EVALUATION * self.trainer.rig().train_size
        seen = 0
        for trainee, size in self._steps(schedule, seed):
            sizes.append(size)
            seen += size
            if seen < due and seen < most_samples:
                continue
            value = self.trainer.metric(trainee)
            reached = crossing.add(seen, value)
            due = seen * (FINE_RATIO if value >= -NEAR_LOSS * self._target_loss else COARSE_RATIO)
            if reached is not None or seen >= most_samples or not -value < MOST_DIVERGED:
                return Trained.of(sizes, reached)
        raise AssertionError("steps never end")

    def _steps(self, schedule: DynamicBatch, seed: int) -> Iterator[tuple[Trainee, int]]:
        rig = self.trainer.rig(seed)
        trainee = rig.new_trainee()
        monitor = None
        if schedule.is_adaptive:
            monitor = rb.NoiseMonitor(trainee.model, trainee.optimizer, every=MEASURE_EVERY, dataset_size=rig.train_size)
        samples, drawn = Samples(rig.train_size, seed), 0
        for step in itertools.count(1):
            setting = schedule.setting_at(drawn)
            x, y = self.trainer.batch(rig, samples.take(setting.global_batch_size))
            is_measured = monitor is not None and (step - 1) % MEASURE_EVERY == 0
            _step(trainee, x.split(MICRO_BATCH if is_measured else len(x)), y, self._lr, setting, monitor)
            drawn += setting.global_batch_size
            if monitor is not None and step % DECIDE_EVERY == 0:
                schedule.decide(monitor.noise_scale)
            yield trainee, setting.global_batch_size


class Samples:
    """Indices of samples in the order of epochs that follow each other without a gap.

    Args:
        train_size: Samples of an epoch.
        seed: Of the order.
    """

    def __init__(self, train_size: int, seed: int) -> None:
        self._train_size, self._generator = train_size, np.random.default_rng([seed, 1])
        self._order = self._generator.permutation(train_size)

    def take(self, size: int) -> np.ndarray:
        """Return the next ones."""
        while len(self._order) < size:
            self._order = np.concatenate([self._order, self._generator.permutation(self._train_size)])
        taken, self._order = self._order[:size], self._order[size:]
        return taken


def _step(trainee: Trainee, parts: Sequence[Tensor], y: Tensor, lr: float, setting: BatchSetting, monitor: rb.NoiseMonitor | None) -> None:
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr * setting.lr_factor
    clear_gradients(trainee)
    for x_part, y_part in zip(parts, y.split([len(part) for part in parts]), strict=True):
        share = len(x_part) / len(y)
        with contextlib.nullcontext() if monitor is None else monitor.micro_batch(len(x_part), weight=share):
            (share * functional.cross_entropy(trainee.model(x_part), y_part)).backward()
    apply_update(trainee)
