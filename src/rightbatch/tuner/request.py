"""What is asked of the tuner; imports nothing heavy, so that the command line can build one before torch is loaded."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import Constraints, Objective
from rightbatch.records.request import RunRequest


class Part(StrEnum):
    """One question that a probe answers; also the stem of its file in the run folder."""

    MEMORY = "memory"
    STEP_TIME = "step_time"
    LOADER = "loader"
    GRADIENT_NOISE = "gradient_noise"
    LR_RANGE = "lr_range"
    """A range test of learning rates; where no tuned rate is known, or when it is asked for."""
    BRANCHES = "branches"
    """The check of the answer by training; only when it is asked for."""


STANDARD_PARTS = frozenset(Part) - {Part.LR_RANGE, Part.BRANCHES}
"""What every answer rests on."""


@dataclass(frozen=True, kw_only=True)
class Request(RunRequest):
    """Everything that changes what is measured or decided."""

    parts: frozenset[Part] = STANDARD_PARTS
    """Questions to answer; the recommendation says what it lacks when some are left out."""
    lr_range_if_untuned: bool = False
    """Whether to add the learning-rate range test for a workload that does not say where its rate was tuned."""
    objective: Objective = field(default_factory=Objective)
    constraints: Constraints = field(default_factory=Constraints)
    max_batch: int | None = None
    """Largest micro-batch to consider."""
    limit_bytes: int | None = None
    """Most memory that training may use; none takes what the device has free."""
    budget_s: float = 120.0
    """Seconds that all probes together may take."""
    seed: int = 0
    isolation: Literal["child", "in-process"] = "child"
    """``child`` measures in a spawned process; ``in-process`` snapshots and restores this one."""
    malloc: Literal["default", "tight"] = "default"
    """How glibc allocates in the child: ``default`` as training will; ``tight`` gives freed memory back at once."""
    certify: bool = False
    """Whether to prove the ceiling by one sample more, which must fail."""
    alternatives: bool = False
    """Whether to trace what another precision, optimizer or checkpointing would need."""
    save: bool = True
    """Whether to write a run folder at all."""


def parts_of(request: Request, workload: WorkloadSummary | None) -> frozenset[Part]:
    """The questions of a request for a workload, as far as it is known: the range test may have to be added."""
    if request.lr_range_if_untuned and workload is not None and workload.lr_batch_size is None:
        return request.parts | {Part.LR_RANGE}
    return request.parts


class Progress(Protocol):
    """Where the tuner says what it is doing."""

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Show a stage (``memory``, ``step time``, ...), the fraction of the budget that is used, and one line of detail."""


class SilentProgress:
    """Shows nothing."""

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Ignore the report."""
