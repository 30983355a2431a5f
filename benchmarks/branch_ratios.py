"""What branches from one checkpoint say of a size and a rate, beside whole trainings to the target.

Run: python benchmarks/branch_ratios.py [--data cifar10_jpeg.npz] [--only NAME ...]

The workloads of live_regret.py, and its kept trainings. The size that the rate was tuned at, half and twice it, each at 0.71, 1 and 1.41
times the rate of the rule: the logarithm of the samples that a branch needs over those of the first one, read off at one loss and as the
mean over ten losses, and the same of whole trainings. Mean and standard deviation over twelve seeds. The rule saturates where the rates of
the sweep do.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean, stdev

import torch

import live_regret
from live_regret import SCORED_SEEDS, Question
from live_regret_scoring import rate_saturation
from live_regret_truth import MOST_OVER_FEWEST, Tuned
from rightbatch.engine.provenance import environment
from rightbatch.fits import branch as branch_fit
from rightbatch.fits.lr_scaling import saturating_gain
from rightbatch.probes import branch
from rightbatch.records.gradient_norms import GradientNorms
from rightbatch.records.training import BranchMeasurements, BranchPlan, BranchProbe, TrainingProbe

SEEDS = range(12)
RATES = (1.0, 2**-0.5, 2**0.5)
CHECKPOINT_SHARE, BRANCH_SHARE = 0.6, 0.6
"""Samples of the checkpoint and of a branch over those that the sweep needs there to its target."""
_MICRO_BATCH = 32
_NO_LIMIT_S = 1e6


@dataclass(frozen=True)
class Script:
    """Trains a list of branches, each to its end."""

    plans: tuple[BranchPlan, ...]

    def next_branch(self, measured: BranchMeasurements) -> BranchPlan | None:
        """Return the next of the list."""
        return self.plans[len(measured.probes)] if len(measured.probes) < len(self.plans) else None

    def is_beyond(self, losses: Sequence[tuple[int, float]], target_loss: float) -> bool:  # noqa: ARG002
        """No branch is stopped early."""
        return False

    def conclude(self, probe: BranchProbe, measured: BranchMeasurements) -> tuple[TrainingProbe, float | None]:  # noqa: ARG002
        """Conclude nothing."""
        return probe.result, None


def _at_once(norms: GradientNorms) -> bool:  # noqa: ARG001
    """The noise at the checkpoint is not what is asked."""
    return True


def settings_of(question: Question, tuned: Sequence[Tuned]) -> tuple[tuple[int, float, float], ...]:
    """(size, rate, rate over the rule's), the first branch first."""
    saturation = rate_saturation(tuned)
    base_size, base = question.base_size, question.trainer.base_lr
    sizes = [size for size in (base_size, base_size // 2, 2 * base_size) if size in {entry.size for entry in tuned}]
    return tuple((size, base * saturating_gain(saturation, base_size, size) * over, over) for size in sizes for over in RATES)


def branch_ratios(
    question: Question, settings: Sequence[tuple[int, float, float]], fewest: float, seed: int
) -> list[tuple[float | None, float | None]]:
    """Log ratios of one seed: (at one loss, mean over losses) of every setting."""
    base = question.trainer.base_lr
    plans = tuple(
        BranchPlan(
            micro_batch_size=size, accumulation_steps=1, lr_factor=lr / base, lr_over_rule=over, most_samples=int(BRANCH_SHARE * fewest)
        )
        for size, lr, over in settings
    )
    measured = branch.measure(
        question.trainer.rig(seed),
        checkpoint=plans[0].model_copy(update={"most_samples": int(CHECKPOINT_SHARE * fewest)}),
        design=Script(plans),
        budget_s=_NO_LIMIT_S,
        noise_micro_batch_size=_MICRO_BATCH,
        is_decided=_at_once,
    )
    first = measured.probes[0].losses
    target = branch_fit.target_loss(first)
    found = []
    for probe in measured.probes:
        crossing = None if target is None else branch_fit.samples_to_loss(probe.losses, target)
        reference = None if target is None else branch_fit.samples_to_loss(first, target)
        found.append((math.log(crossing / reference) if crossing and reference else None, branch_fit.log_ratio(probe.losses, first)))
    return found


def whole_ratios(question: Question, settings: Sequence[tuple[int, float, float]], fewest: float) -> list[list[float]]:
    """Log ratios of whole trainings, one list a setting; seeds that miss the target are left out."""
    samples = [
        [training.samples_to_target for training in question.truth.seeds(size, lr, SCORED_SEEDS, MOST_OVER_FEWEST * fewest)]
        for size, lr, _ in settings
    ]
    return [[math.log(own / first) for own, first in zip(row, samples[0], strict=False) if own and first] for row in samples]


def _shown(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):+6.2f} {stdev(known):5.2f} {len(known):3d}" if len(known) > 1 else f"{'-':>16s}"


def show(question: Question) -> None:
    """Print the table of one workload."""
    tuned = question.sweep()
    settings = settings_of(question, tuned)
    fewest = mean(next(entry.samples for entry in tuned if entry.size == settings[0][0]))
    by_seed = [branch_ratios(question, settings, fewest, seed) for seed in SEEDS]
    whole = whole_ratios(question, settings, fewest)
    print(f"{question.name}, {question.target}: log of samples over those of the first; mean, standard deviation, seeds")
    print("    size      rate  over the rule     one loss          ten losses        whole trainings")
    for place, (size, lr, over) in enumerate(settings):
        columns = ([row[place][0] for row in by_seed], [row[place][1] for row in by_seed], whole[place])
        print(f"  {size:6d} {lr:9.4g} {over:14.2f}  " + "  ".join(map(_shown, columns)), flush=True)


def main() -> int:
    torch.set_num_threads(1)
    asked = live_regret.questions(live_regret.parser_of(__doc__).parse_args())
    for question in asked:
        show(question)
    place = environment(asked[0].trainer.rig(), "in-process")
    print(f"device {place.device_name} · versions {dict(place.versions)} · date {datetime.now(UTC).date()} · threads {place.threads}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
