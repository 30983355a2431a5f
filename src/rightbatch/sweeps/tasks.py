"""What is sent to the processes of trials. Importing this module does not import torch; running a task does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rightbatch.records.environment import Environment
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.sweep import TrialResult, TrialSpec
from rightbatch.records.training_log import TrainingTarget


@dataclass(frozen=True, kw_only=True)
class WorkerSetting:
    """Where and how a process of the sweep runs the workload; can be pickled.

    Attributes:
        load: Returns the workload; runs the user's code.
        device: ``auto``, ``cpu``, ``cuda``, ...
        precision: Replaces the workload's own; none keeps it.
        threads: Threads torch computes with; none keeps torch's default.
    """

    load: Callable[[], Any]
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16", "fp64"] | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class DescribeTask:
    """The question what the workload is.

    Attributes:
        setting: Where and how.
        target: What trials will have to reach.
        code_files: Tells the files of the user's code once it is loaded.
    """

    setting: WorkerSetting
    target: TrainingTarget
    code_files: Callable[[], tuple[tuple[str, str], ...]]


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a sweep needs to know of its workload before the first trial.

    Attributes:
        workload: In numbers.
        environment: Where it runs.
        code_files: (path, SHA-256) of every file of the user's code.
    """

    workload: WorkloadSummary
    environment: Environment
    code_files: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """One trial.

    Attributes:
        setting: Where and how.
        spec: What decides how it ends.
        target: What it has to reach.
        largest_micro_batch: Memory ceiling, in samples; none: whatever fits, found by running out of memory.
    """

    setting: WorkerSetting
    spec: TrialSpec
    target: TrainingTarget
    largest_micro_batch: int | None = None


def describe(task: DescribeTask) -> Described:
    """Say what the workload is; see ``sweeps.trial.describe``."""
    from rightbatch.sweeps import trial

    return trial.describe(task)


def run_trial(task: TrialTask) -> TrialResult:
    """Run a trial; see ``sweeps.trial.run_trial``."""
    from rightbatch.sweeps import trial

    return trial.run_trial(task)
