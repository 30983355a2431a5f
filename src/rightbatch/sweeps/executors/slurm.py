"""Trials as jobs of SLURM: submitit submits them, and one thread looks after all of them.

It looks for results in the shared folder every second, which costs SLURM nothing, and asks SLURM itself with one command for all jobs,
seldom: only a job that ended without a result needs that.
"""

import contextlib
import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rightbatch.errors import ClusterError, RightbatchError, UsageError, WorkerKilledError
from rightbatch.sweeps.executors import ExecutorSetting, packed
from rightbatch.sweeps.executors.placement import Placement, place
from rightbatch.sweeps.executors.remote import opened
from rightbatch.sweeps.executors.slurm_queue import Job, Queue, SlurmQueue, read_partition

_log = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")

FOLDER = Path("rightbatch-runs", "slurm-jobs")
MOST_LOSSES = 5
"""Nodes that may be lost under one trial."""
POLL_S = 1.0
ASK_S = 15.0
"""How often SLURM is asked. A result may appear in a shared folder so much later than its job's end."""
_MOST_MISSED = 20
"""Answers in a row that SLURM may miss: its controller may be restarted while jobs run on."""
_UNDER_WAY = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
}
_LOST = {"NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "LAUNCH_FAILED", ""}
"""The empty state is that of a job which SLURM has forgotten."""
_KILLED = {"OUT_OF_MEMORY", "CANCELLED"}
_LATE = {"TIMEOUT", "DEADLINE"}
_BEGUN = "Loading pickle"
"""What submitit writes to the log of a job when its Python has started."""


def open_executor(setting: ExecutorSetting) -> "SlurmExecutor":
    """Return an executor for a partition: the one named, that of SBATCH_PARTITION, or the default one.

    Raises:
        UsageError: Two different partitions are named.
        ClusterError: SLURM is not here, does not answer, or has no place for trials.
    """
    default = os.environ.get("SBATCH_PARTITION", "")
    if setting.address and default not in {"", setting.address}:  # sbatch would take the variable
        raise UsageError(f"a partition is named once; --on names {setting.address} and SBATCH_PARTITION {default}; drop one of them.")
    partition = read_partition(setting.address or default)
    placement = place(partition.nodes, device=setting.device, jobs=setting.jobs)
    folder = FOLDER / secrets.token_hex(4)  # of its own: another cluster may count its jobs from one, too
    return SlurmExecutor(SlurmQueue(partition, placement, folder), placement, folder=folder)


@dataclass
class _Errand:
    """One function to be run, and the job that does it now.

    Attributes:
        work: The function and its argument, pickled.
        future: Of the result.
        job: The last one submitted for it.
        losses: Jobs of it that were lost.
        was_over: Whether its job had ended without a result when SLURM was asked last.
    """

    work: bytes
    future: "Future[Any]"
    job: Job | None = None
    losses: int = 0
    was_over: bool = False


class SlurmExecutor:
    """Runs each function in a job.

    Args:
        jobs: Where jobs wait and run.
        placement: What each gets.
        folder: Where their files are, to be removed in the end when nothing is left in it; none keeps it.
        poll_s: Seconds between looks into the folder.
        ask_s: Seconds between questions to SLURM.
    """

    def __init__(
        self, jobs: Queue, placement: Placement, *, folder: Path | None = None, poll_s: float = POLL_S, ask_s: float = ASK_S
    ) -> None:
        self.slots = placement.slots
        self.threads: int | None = max(1, placement.cpus)
        self.device: str | None = None
        self._jobs = jobs
        self._folder = folder
        self._poll_s, self._ask_s = poll_s, ask_s
        self._asked_s = time.monotonic()
        self._missed = 0
        self._new: queue.SimpleQueue[_Errand | None] = queue.SimpleQueue()
        self._errands: list[_Errand] = []
        self._thread = threading.Thread(target=self._serve, name="rightbatch-slurm", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[P], R], params: P) -> "Future[R]":
        """Run a function in a job of its own; in another one when its node is lost."""
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()
        self._new.put(_Errand(packed(function, params), future))
        return future

    def close(self) -> None:
        """Cancel the jobs that still wait or run."""
        self._new.put(None)
        self._thread.join()
        self._jobs.cancel([errand.job for errand in self._errands if errand.job is not None])
        for errand in self._errands:
            errand.future.set_exception(WorkerKilledError("the executor was closed before the trial ended"))
        if self._folder is not None:
            with contextlib.suppress(OSError):  # logs of jobs that did not end well stay
                self._folder.rmdir()
                self._folder.parent.rmdir()

    def _serve(self) -> None:
        """Look after all jobs until ``None`` is put in."""
        while self._take_new():
            states = self._ask()
            for errand in self._errands:
                self._look_after(errand, states)
            self._errands = [errand for errand in self._errands if not errand.future.done()]

    def _take_new(self) -> bool:
        """Take in what was put in, waiting a little for the first; return whether to go on."""
        wait_s = self._poll_s
        with contextlib.suppress(queue.Empty):
            while (errand := self._new.get(timeout=wait_s)) is not None:
                self._errands.append(errand)
                wait_s = 0.0
            return False
        return True

    def _ask(self) -> Mapping[str, str] | None:
        """Return the states of all jobs when it is time to ask; none else, or without an answer."""
        jobs = [errand.job for errand in self._errands if errand.job is not None]
        if not jobs or time.monotonic() - self._asked_s < self._ask_s:
            return None
        states = self._jobs.states(jobs)
        self._asked_s = time.monotonic()
        self._missed = self._missed + 1 if states is None else 0
        return states

    def _look_after(self, errand: _Errand, states: Mapping[str, str] | None) -> None:
        """Submit the job of an errand, take its result, or find out why there is none."""
        try:
            if errand.job is None:
                errand.job = self._jobs.submit(errand.work)
            elif _has_result(errand.job):
                errand.future.set_result(_result(errand.job))
            elif self._missed >= _MOST_MISSED:
                raise ClusterError(f"SLURM has not answered {self._missed} times in a row; repeat the command to go on when it is back.")
            elif states is not None:
                self._judge(errand, errand.job, states.get(errand.job.job_id, ""))
        except Exception as error:  # noqa: BLE001  # whatever it is, the one who waits must hear of it
            errand.future.set_exception(error)

    def _judge(self, errand: _Errand, job: Job, state: str) -> None:
        """Decide about a job without a result; one that has ended is given until the next question to show it."""
        if state in _UNDER_WAY:
            errand.was_over = False
        elif not errand.was_over:
            errand.was_over = True
        elif _is_lost(job, state) and errand.losses + 1 < MOST_LOSSES:
            errand.losses += 1
            _log.warning("job %s of a trial was lost (%s) and is submitted again", job.job_id, state or "SLURM no longer knows it")
            errand.job, errand.was_over = None, False
        else:
            raise _ending(job, state)


def _is_lost(job: Job, state: str) -> bool:
    """Whether a job without a result came to nothing through no doing of its trial: its node went, or it never began."""
    return state in _LOST or (state not in _KILLED | _LATE and not _has_begun(job))


def _has_begun(job: Job) -> bool:
    log = job.paths.stdout
    return bool(log.exists() and _BEGUN in log.read_text(errors="replace"))


def _has_result(job: Job) -> bool:
    folder = job.paths.folder
    with contextlib.suppress(OSError):
        folder.chmod(folder.stat().st_mode)  # lets a network file system look again
    return bool(job.paths.result_pickle.exists())


def _result(job: Job) -> Any:  # whatever the function returned
    """Return what the function returned, and remove the job's folder; or raise what it raised, and keep its log."""
    try:
        outcome = job.result()
    except Exception as error:
        if "timed-out" in str(error):
            raise _ending(job, "TIMEOUT") from error
        raise ClusterError(f"the job of a trial failed: {_last_words(str(error))}; its log is {job.paths.stdout}.") from error
    value = opened(outcome)
    folder = job.paths.folder
    shutil.rmtree(folder, ignore_errors=True)
    for link in folder.parent.glob(".submission_file_*.sh"):  # submitit's, to what has just been removed
        if not link.exists():
            link.unlink(missing_ok=True)
    return value


def _ending(job: Job, state: str) -> RightbatchError:
    """What it means that a job ended in this state, without a result, and is not submitted again."""
    log = job.paths.stdout
    if state in _LATE:
        return ClusterError(
            f"job {job.job_id} of a trial did not end within its time ({state}); name a partition that allows more with "
            "--on slurm:PARTITION, set SBATCH_TIMELIMIT, or train less with --max-samples."
        )
    if not _is_lost(job, state):
        return WorkerKilledError(
            f"job {job.job_id} of a trial was ended ({state}), as SLURM does when its memory runs out; its log is {log}"
        )
    if state in _LOST:
        return ClusterError(f"a trial lost its node {MOST_LOSSES} times ({state or 'SLURM no longer knows the job'}); see `sinfo`.")
    if not log.exists():
        return ClusterError(
            f"{MOST_LOSSES} jobs of a trial ended ({state}) and wrote nothing to {log.parent}; every node must share the folder that the "
            "command is run in."
        )
    words = _last_words(log.read_text(errors="replace"))
    return ClusterError(f"{MOST_LOSSES} jobs of a trial ended ({state}) before it began: {words}; the log is {log}.")


def _last_words(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip(" -")), "it said nothing")[:300]
