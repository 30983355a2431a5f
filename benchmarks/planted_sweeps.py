"""Trainings that follow a planted law, for tests of the sweep: E(b) is a hyperbola, the best rate saturates with the size."""

import math
from dataclasses import dataclass

import numpy as np

from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.sweep import SweepSettings, TrialPoint, TrialResult, TrialSpec, TrialStatus
from rightbatch.records.training_log import TrainingTarget
from rightbatch.sweeps.design import Rule, next_trials

SIZES = tuple(2**power for power in range(3, 10))
TARGET = TrainingTarget.parse("accuracy>=0.97")


def settings_of(**changes: object) -> SweepSettings:
    base = SweepSettings(target=TARGET, sizes=SIZES, first_size=64, first_lr=0.1, seeds=3, most_samples=200_000)
    return base.model_copy(update=changes)


def summary(**changes: object) -> WorkloadSummary:
    return WorkloadSummary(
        name="Planted",
        train_size=2000,
        valid_size=500,
        parameter_count=10,
        trainable_parameter_count=10,
        batch_norm=False,
        loss_reduction="mean",
        optimizer="SGD",
        optimizer_given=True,
        momentum=0.9,
        lr=0.1,
        lr_batch_size=64,
        num_workers=None,
        precision="fp32",
        channels_last=False,
        compiled=False,
    ).model_copy(update=changes)


def linear_below(first: int, second: int) -> float:
    """The scaling rule where no noise scale is known: linear downwards, the same rate upwards."""
    return min(second / first, 1.0)


@dataclass(frozen=True)
class Law:
    """E(b, rate, seed) = E_min (1 + b / B_crit) 2**(sharpness log2(rate / best)**2) times log-normal noise.

    A rate more than ``hot`` doublings above the best diverges; sizes above ``largest`` never arrive.
    """

    critical: float = 120.0
    fewest: float = 4000.0
    saturation: float = 100.0
    most_lr: float = 0.3
    sharpness: float = 0.35
    noise: float = 0.06
    hot: float = 1.6
    largest: float = math.inf
    draw: int = 0

    def best_lr(self, size: int) -> float:
        return self.most_lr / (1 + self.saturation / size)

    def samples(self, spec: TrialSpec) -> float:
        """Infinite where the training never arrives."""
        off = math.log2(spec.lr / self.best_lr(spec.global_batch_size))
        if off > self.hot or spec.global_batch_size > self.largest:
            return math.inf
        rng = np.random.default_rng([self.draw, spec.global_batch_size, round(1e6 * spec.lr), spec.seed])
        mean = self.fewest * (1 + spec.global_batch_size / self.critical) * 2 ** (self.sharpness * off**2)
        return mean * math.exp(self.noise * rng.standard_normal())

    def train(self, spec: TrialSpec) -> TrialResult:
        needed = self.samples(spec)
        arrives = needed <= spec.most_samples
        samples = max(round(min(needed, spec.most_samples)), 1)
        steps = max(samples // spec.global_batch_size, 1)
        return TrialResult(
            spec=spec,
            status=TrialStatus.COMPLETE if arrives else TrialStatus.ABORTED,
            reason="" if arrives else "it used up its samples",
            steps=steps,
            samples=samples,
            training_s=steps * step_time_s(spec.global_batch_size),
            samples_to_target=needed if arrives else None,
            steps_to_target=needed / spec.global_batch_size if arrives else None,
            seconds_to_target=needed / spec.global_batch_size * step_time_s(spec.global_batch_size) if arrives else None,
            micro_batch_size=spec.global_batch_size,
            history=tuple(
                TrialPoint(samples=max(round(share * samples), 1), training_s=share * steps, value=0.97 * (share if arrives else share / 2))
                for share in np.linspace(0.05, 1.0, 20).tolist()
            ),
        )


def step_time_s(size: int) -> float:
    """An affine law with half-saturation at 64 samples."""
    return 0.001 + size / 64_000


def sweep(law: Law, settings: SweepSettings, rule: Rule = linear_below, *, pick=lambda waiting: waiting[0]) -> list[TrialResult]:
    """Run a whole sweep, one trial at a time, in the order that ``pick`` chooses."""
    results: list[TrialResult] = []
    while waiting := next_trials(settings, rule, results):
        results.append(law.train(pick(waiting)))
    return results
