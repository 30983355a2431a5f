"""What is asked of SLURM, through submitit and SLURM's own commands: which nodes there are, to run a job, how jobs are, to end them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rightbatch.errors import ClusterError
from rightbatch.sweeps.executors.placement import Node, Placement
from rightbatch.sweeps.executors.remote import Outcome, run_in_this_process

JOB_NAME = "rightbatch-trial"
MOST_MINUTES = 24 * 60
"""What a job asks for where its partition allows more."""
LEAST_MINUTES = 10
"""With less, submitit takes a preempted job for one that has run out of time, and gives it up."""
_COMMAND_S = 60.0
_USABLE = {"idle", "mix", "alloc", "comp", "plnd"}
_GPUS = re.compile(r"gpu(?::[^:,()]+)?(?::(\d+))?(?:\([^)]*\))?(?:,|$)")
_LIMIT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


class Job(Protocol):
    """A job that was submitted; submitit's."""

    @property
    def job_id(self) -> str:
        """Its number, as SLURM gave it."""

    @property
    def paths(self) -> Any:  # submitit.core.utils.JobPaths
        """Where its files are."""

    def result(self) -> Outcome:
        """Return what it returned; raise what submitit makes of what it raised."""


class Queue(Protocol):
    """Where jobs wait and run."""

    def submit(self, work: bytes) -> Job:
        """Let ``run_in_this_process`` run with this work.

        Raises:
            ClusterError: It is not accepted.
        """

    def states(self, jobs: Sequence[Job]) -> Mapping[str, str] | None:
        """Return the state of each job by its number, those left out that are not known any more; none without an answer."""

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The nodes that jobs are sent to.

    Attributes:
        name: Of the partition.
        nodes: Those that can be used.
        most_minutes: How long a job may take there; none without a limit.
    """

    name: str
    nodes: tuple[Node, ...]
    most_minutes: int | None


def read_partition(name: str) -> Partition:
    """Return a partition; the default one when the name is empty.

    Raises:
        ClusterError: SLURM is not here, does not answer, or has no such partition.
    """
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        raise ClusterError("there is no SLURM on this machine (sbatch, sinfo); run the command on a login node, or use --on local.")
    ended = _run("sinfo", "--noheader", "--Node", "--format=%P|%c|%G|%t|%l", *([f"--partition={name}"] if name else []))
    if ended is None or ended.returncode != 0:
        reason = "no answer" if ended is None else " ".join(ended.stderr.split())
        raise ClusterError(f"SLURM must answer; sinfo said: {reason}; try `sinfo` yourself, or use --on local.")
    return parse_partition(ended.stdout, name)


def parse_partition(text: str, name: str) -> Partition:
    """Read what ``sinfo --Node --format=%P|%c|%G|%t|%l`` printed.

    Raises:
        ClusterError: There is no such partition, no default one, or none of its nodes can be used.
    """
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 4]  # five columns
    chosen = [row for row in rows if (row[0].rstrip("*") == name if name else row[0].endswith("*"))]
    if not chosen:
        wanted = f"no partition {name!r}" if name else "no default partition"
        raise ClusterError(f"SLURM has {wanted}; `sinfo --summarize` lists what there is: name one with --on slurm:PARTITION.")
    nodes = tuple(Node(int(cpus), _gpus(gres)) for _, cpus, gres, state, _ in chosen if state.rstrip("*~#!%$@^-+") in _USABLE)
    if not nodes:
        states = ", ".join(sorted({row[3] for row in chosen}))
        raise ClusterError(
            f"a trial needs a node; all of partition {chosen[0][0].rstrip('*')} are {states}; `sinfo --list-reasons` says why."
        )
    return Partition(name=chosen[0][0].rstrip("*"), nodes=nodes, most_minutes=_minutes(chosen[0][4]))


def _gpus(gres: str) -> int:
    return sum(int(count or 1) for count in _GPUS.findall(gres))


def _minutes(limit: str) -> int | None:
    """Read ``2-00:00:00``, ``1:00:00``, ``30:00``; none for ``infinite``."""
    match = _LIMIT.fullmatch(limit)
    if match is None:
        return None
    days, hours, minutes = (int(part or 0) for part in match.groups()[:3])
    return (days * 24 + hours) * 60 + minutes


class SlurmQueue:
    """Submits through submitit, one job a trial.

    Args:
        partition: Where jobs go.
        placement: What each gets.
        folder: Where submitit keeps the files of jobs; every node must see it.

    Raises:
        ClusterError: The partition allows too little time.
    """

    def __init__(self, partition: Partition, placement: Placement, folder: Path) -> None:
        minutes = min(partition.most_minutes or MOST_MINUTES, MOST_MINUTES)
        if minutes < LEAST_MINUTES:
            raise ClusterError(f"a job needs {LEAST_MINUTES} minutes; partition {partition.name} allows {minutes}; name another one.")
        self._submitter = import_module("submitit").SlurmExecutor(folder=folder / "%j")  # a folder for every job
        self._submitter.update_parameters(
            job_name=JOB_NAME,
            partition=partition.name,
            time=minutes,
            cpus_per_task=max(1, placement.cpus),
            stderr_to_stdout=True,
            **({"gpus_per_node": placement.gpus} if placement.gpus else {}),
        )

    def submit(self, work: bytes) -> Job:
        """Run ``sbatch``."""
        try:
            job: Job = self._submitter.submit(run_in_this_process, work)
        except Exception as error:
            words = str(error).strip()
            raise ClusterError(
                f"SLURM did not take the job of a trial: {words[-300:]}; SBATCH_ACCOUNT, SBATCH_QOS, SBATCH_TIMELIMIT and "
                "sbatch's other variables are passed on."
            ) from error
        return job

    def states(self, jobs: Sequence[Job]) -> Mapping[str, str] | None:
        """Run ``squeue`` once for all; it also knows jobs that ended in the last minutes, with or without accounting."""
        ended = _run("squeue", "--noheader", "--states=all", "--format=%i|%T", f"--jobs={_numbers(jobs)}")
        if ended is None:
            return None
        if ended.returncode != 0:
            return {} if "Invalid job id" in ended.stderr else None
        return dict(line.strip().split("|", 1) for line in ended.stdout.splitlines() if "|" in line)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Run ``scancel`` once for all."""
        if jobs:
            _run("scancel", "--quiet", *_numbers(jobs).split(","))


def _numbers(jobs: Iterable[Job]) -> str:
    return ",".join(job.job_id for job in jobs)


def _run(*command: str) -> "subprocess.CompletedProcess[str] | None":
    """Run one of SLURM's commands; none when it does not come back."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False, env={**os.environ, "LC_ALL": "C"})  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
