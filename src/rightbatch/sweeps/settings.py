"""From what is asked and what the workload is to the settings of a sweep: sizes, where the search begins, limits. Pure."""

import hashlib
import json
import math

from rightbatch.errors import UsageError
from rightbatch.fits.lr_scaling import couple_lr, known_noise_scale
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import BatchPlan, Findings
from rightbatch.records.sweep import SweepSettings
from rightbatch.sweeps.design import Rule
from rightbatch.sweeps.request import MOST_EPOCHS, SweepRequest

AROUND = 3
"""Doublings above and below the plan's size that are swept where no sizes are named."""
UNPLANNED_SIZE = 64
STAND_IN_LR = 1e-3
"""Of the Adam that stands in where the workload names no optimizer."""
LARGEST_SHARE_OF_DATASET = 4
"""Sizes that nobody named stay below a quarter of the training set: an epoch of fewer than four steps."""
_MANY_SLOTS = 4
"""With more slots all sizes are climbed at once, which trains a little more and takes far less time."""


def settings_of(request: SweepRequest, workload: WorkloadSummary, findings: Findings | None, *, slots: int) -> SweepSettings:
    """Return the settings of a sweep.

    Args:
        request: What is asked.
        workload: What is trained.
        findings: What `find` said of it; none when it was not asked.
        slots: Trials that run at once.

    Raises:
        UsageError: A size exceeds the training set.
    """
    plan = None if findings is None else findings.recommendation.plan
    sizes = request.sizes or _sizes_around(_middle(workload, plan), workload.train_size)
    if max(sizes) > workload.train_size:
        raise UsageError(
            f"a batch cannot exceed the training set of {workload.train_size} samples; got {max(sizes)}; leave it out of --batches."
        )
    noise = None if findings is None else known_noise_scale(findings.noise_scale)
    base_size = workload.lr_batch_size or _middle(workload, plan)
    first_size = min(sizes, key=lambda size: (abs(math.log(size / base_size)), size))
    factor = scaling_rule(workload, noise)(base_size, first_size) if workload.lr_batch_size is not None else 1.0
    base_lr = workload.lr or STAND_IN_LR
    return SweepSettings(
        target=request.target,
        sizes=sizes,
        first_size=first_size,
        first_lr=float(f"{base_lr * 2.0 ** round(math.log2(factor)):.6g}"),
        seeds=request.seeds,
        most_samples=request.most_samples or MOST_EPOCHS * workload.train_size,
        order="at once" if slots > _MANY_SLOTS else "outward",
        noise_scale=noise,
        largest_micro_batch=None if findings is None or findings.memory is None else findings.memory.ceiling,
    )


def scaling_rule(workload: WorkloadSummary, noise_scale: float | None) -> Rule:
    """Return how the learning rate follows the size, by the optimizer's family."""

    def rule(tuned: int, other: int) -> float:
        return couple_lr(workload.model_copy(update={"lr_batch_size": tuned}), noise_scale, other).factor

    return rule


def digest_of(request: SweepRequest, spec: str, arguments: tuple[str, ...]) -> str:
    """Return the digest of everything that decides what a sweep trains; where it runs, and how fast, is not part of it."""
    asked = [
        spec,
        list(arguments),
        request.target.model_dump(mode="json"),
        None if request.sizes is None else list(request.sizes),
        request.seeds,
        request.most_samples,
        request.device,
        request.precision,
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _middle(workload: WorkloadSummary, plan: BatchPlan | None) -> int:
    if plan is not None:
        return plan.global_batch_size
    return workload.lr_batch_size or UNPLANNED_SIZE


def _sizes_around(middle: int, train_size: int) -> tuple[int, ...]:
    """Factors of two around a size, as a power of two, within the training set."""
    power = round(math.log2(middle))
    largest = max(1, train_size // LARGEST_SHARE_OF_DATASET)
    sizes = [2**exponent for exponent in range(max(power - AROUND, 0), power + AROUND + 1) if 2**exponent <= largest]
    return tuple(sizes) or (largest,)
