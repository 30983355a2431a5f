"""What is asked of a sweep; imports nothing heavy, so that the command line can build one before torch is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rightbatch.errors import UsageError
from rightbatch.records.request import RunRequest
from rightbatch.records.sweep import SweepResult, TrialResult, TrialSpec
from rightbatch.records.training_log import TrainingTarget

MOST_EPOCHS = 100
"""Of a trial, unless the user says otherwise."""
_RANGE = re.compile(r"\s*([0-9]+)\s*\.\.\s*([0-9]+)\s*")


@dataclass(frozen=True, kw_only=True)
class SweepRequest(RunRequest):
    """Everything that changes what a sweep trains, or where it is kept.

    Raises:
        UsageError: A number is not positive.
    """

    target: TrainingTarget
    sizes: tuple[int, ...] | None = None
    """Global batch sizes, ascending; none takes factors of two around the plan, or around the size that the rate was tuned at."""
    seeds: int = 3
    where: str = "local"
    """``local``, ``ray``, ``ray:ADDRESS`` or ``slurm``."""
    jobs: int | None = None
    """Trials at once; none lets the executor choose."""
    most_samples: int | None = None
    """Most samples of a trial; none allows 100 epochs."""
    budget_s: float | None = None
    """Seconds after which no trial goes on; none sets no end."""
    plan: Path | None = None
    """A run of `find` whose plan is judged; none takes the latest run of the same workload below ``rightbatch-runs``."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "most_samples", "budget_s", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} must be positive; got {value}.")
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise UsageError(f"batch sizes must be positive integers; got {self.sizes}.")


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read ``8..512``, by factors of two from the first to the last, or ``8,16,64``.

    Raises:
        UsageError: It is of another form, or holds no size.
    """
    match = _RANGE.fullmatch(text)
    try:
        if match is not None:
            low, high = int(match[1]), int(match[2])
            sizes = {low * 2**power for power in range(64) if low * 2**power <= high} if low > 0 else set()
        else:
            sizes = {int(word) for word in text.split(",")}
    except ValueError:
        sizes = set()
    if not sizes or min(sizes) < 1:
        raise UsageError(f"batch sizes are written like 8..512 (8, 16, ... 512) or 8,16,64; got {text!r}.")
    return tuple(sorted(sizes))


@dataclass(frozen=True, kw_only=True)
class SweepStage:
    """How a sweep goes.

    Attributes:
        running: Trials in the making.
        ended: Trials with a result.
        expected: Trials in all, as far as one can tell.
        best: The answer so far, in words; empty at the start.
        left_s: Seconds left, as far as one can tell; none before the first trial has ended.
        news: What has just happened, in words; empty when nothing did.
    """

    running: tuple[TrialSpec, ...] = ()
    ended: int = 0
    expected: int = 0
    best: str = ""
    left_s: float | None = None
    news: str = ""


class SweepProgress(Protocol):
    """Where a sweep says how it goes."""

    def update(self, stage: SweepStage) -> None:
        """Show it."""


class SilentSweep:
    """Says nothing."""

    def update(self, stage: SweepStage) -> None:
        """Ignore it."""


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """What came out, and where it is kept.

    Attributes:
        result: All conclusions.
        trials: Every trial that has ended.
        folder: The sweep's folder.
        ended_by_budget: Whether the time budget ended it.
    """

    result: SweepResult
    trials: tuple[TrialResult, ...]
    folder: Path
    ended_by_budget: bool
