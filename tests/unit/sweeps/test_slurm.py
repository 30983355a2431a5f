"""Trials on SLURM: jobs that submitit runs on this machine, and a SLURM that is played; what each end of a job comes to."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest
import submitit

from rightbatch.errors import ClusterError, UsageError, UserCodeError, WorkerKilledError
from rightbatch.sweeps.executors import ExecutorSetting, slurm_queue
from rightbatch.sweeps.executors.placement import Node, Placement
from rightbatch.sweeps.executors.remote import run_in_this_process
from rightbatch.sweeps.executors.slurm import MOST_LOSSES, SlurmExecutor, open_executor
from rightbatch.sweeps.executors.slurm_queue import LEAST_MINUTES, MOST_MINUTES, Partition, SlurmQueue, parse_partition, read_partition

PLACEMENT = Placement(cpus=1, gpus=0, slots=2)
SINFO = (
    "pair*|4|(null)|idle|infinite\npair*|4|(null)|mix~|infinite\npair*|4|(null)|down*|infinite\nshort|2|gpu:a100:2(S:0),gpu:1|alloc|30:00\n"
)


class LocalQueue:
    """Jobs of submitit's local executor: processes of this machine, with the files of real ones."""

    def __init__(self, folder: Path) -> None:
        self._submitter = submitit.LocalExecutor(folder / "%j")

    def submit(self, work: bytes):
        return self._submitter.submit(run_in_this_process, work)

    def states(self, jobs: Sequence) -> Mapping[str, str]:
        return {job.job_id: "RUNNING" if job.state == "RUNNING" else "FAILED" for job in jobs}

    def cancel(self, jobs: Sequence) -> None:
        for job in jobs:
            job.cancel()


class PlayedQueue:
    """Jobs that end as planned: in a state without a result, or with the result."""

    def __init__(self, folder: Path, *planned: str, log: str = "") -> None:
        self._folder = folder
        self._planned = list(planned)
        self._log = log
        self._states: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.submitted = threading.Semaphore(0)
        self.count = 0

    def submit(self, work: bytes):
        self.count += 1
        job_id = str(self.count)
        folder = self._folder / job_id
        folder.mkdir()
        paths = SimpleNamespace(folder=folder, result_pickle=folder / "result.pkl", stdout=folder / "log.out")
        if self._log:
            paths.stdout.write_text(self._log)
        state = self._planned.pop(0) if self._planned else "COMPLETED"
        if state == "COMPLETED":
            paths.result_pickle.write_bytes(cloudpickle.dumps(run_in_this_process(work)))
        if state != "forgotten":
            self._states[job_id] = state
        self.submitted.release()
        return SimpleNamespace(job_id=job_id, paths=paths, result=lambda: cloudpickle.loads(paths.result_pickle.read_bytes()))

    def states(self, jobs: Sequence) -> Mapping[str, str] | None:
        return {job.job_id: self._states[job.job_id] for job in jobs if job.job_id in self._states}

    def cancel(self, jobs: Sequence) -> None:
        self.cancelled = [job.job_id for job in jobs]


@pytest.fixture
def opened(tmp_path: Path):
    """Open an executor on a queue, and close it in the end."""
    executors: list[SlurmExecutor] = []

    def open_on(queue) -> SlurmExecutor:
        executors.append(SlurmExecutor(queue, PLACEMENT, poll_s=0.01, ask_s=0.02))
        return executors[-1]

    yield open_on
    for executor in executors:
        executor.close()


def _kill_this_process(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(_: object) -> None:
    raise ValueError("no")


def test_jobs_run_in_processes_of_their_own_and_leave_no_files(opened: Callable, tmp_path: Path) -> None:
    executor = opened(LocalQueue(tmp_path))

    futures = [executor.submit(lambda number: (number, os.getpid()), number) for number in range(2)]
    results = [future.result(timeout=100) for future in futures]

    assert [number for number, _ in results] == [0, 1]
    assert len({os.getpid(), *(process for _, process in results)}) == 3
    assert {entry.name for entry in tmp_path.iterdir()} <= {"%j"}, "an empty folder of submitit's local executor"


def test_what_the_users_code_raised_is_raised_here_and_its_log_is_kept(opened: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="ValueError: no"):
        opened(LocalQueue(tmp_path)).submit(_raise, None).result(timeout=100)
    assert len(list(tmp_path.glob("*/*_log.out"))) == 1


def test_a_job_that_was_killed_is_for_the_driver_to_judge(opened: Callable, tmp_path: Path) -> None:
    with pytest.raises(WorkerKilledError, match="FAILED"):
        opened(LocalQueue(tmp_path)).submit(_kill_this_process, None).result(timeout=100)


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "forgotten", "FAILED"])
def test_a_job_whose_node_is_lost_or_that_never_began_is_submitted_again(opened: Callable, tmp_path: Path, state: str) -> None:
    queue = PlayedQueue(tmp_path, state, state)

    assert opened(queue).submit(abs, -3).result(timeout=10) == 3
    assert queue.count == 3


def test_nodes_that_are_lost_again_and_again_end_the_sweep(opened: Callable, tmp_path: Path) -> None:
    queue = PlayedQueue(tmp_path, *["NODE_FAIL"] * MOST_LOSSES)

    with pytest.raises(ClusterError, match="lost its node"):
        opened(queue).submit(abs, -3).result(timeout=10)
    assert queue.count == MOST_LOSSES


@pytest.mark.parametrize("log", ["", "srun: error: python: No such file or directory\n"])
def test_jobs_that_never_begin_end_the_sweep_with_the_reason(opened: Callable, tmp_path: Path, log: str) -> None:
    queue = PlayedQueue(tmp_path, *["FAILED"] * MOST_LOSSES, log=log)

    with pytest.raises(ClusterError, match="No such file or directory" if log else "must share the folder"):
        opened(queue).submit(abs, -3).result(timeout=10)


@pytest.mark.parametrize("state", ["OUT_OF_MEMORY", "CANCELLED"])
def test_a_job_that_slurm_ended_is_for_the_driver_to_judge(opened: Callable, tmp_path: Path, state: str) -> None:
    with pytest.raises(WorkerKilledError, match=state):
        opened(PlayedQueue(tmp_path, state)).submit(abs, -3).result(timeout=10)


def test_a_job_without_enough_time_ends_the_sweep_with_the_remedy(opened: Callable, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="SBATCH_TIMELIMIT") as caught:
        opened(PlayedQueue(tmp_path, "TIMEOUT")).submit(abs, -3).result(timeout=10)
    assert caught.value.exit_code == 6


def test_slurm_that_stays_silent_ends_the_sweep(opened: Callable, tmp_path: Path) -> None:
    queue = PlayedQueue(tmp_path, "RUNNING")
    queue.states = lambda jobs: None

    with pytest.raises(ClusterError, match="SLURM has not answered"):
        opened(queue).submit(abs, -3).result(timeout=10)


def test_closing_cancels_the_jobs(tmp_path: Path) -> None:
    queue = PlayedQueue(tmp_path, "RUNNING", "PENDING")
    executor = SlurmExecutor(queue, PLACEMENT, poll_s=0.01, ask_s=0.02)
    futures = [executor.submit(abs, 1) for _ in range(2)]
    for _ in futures:
        assert queue.submitted.acquire(timeout=10)

    executor.close()

    assert queue.cancelled == ["1", "2"]
    assert all(isinstance(future.exception(), WorkerKilledError) for future in futures)


def test_a_folder_goes_with_its_executor_unless_a_log_is_left(tmp_path: Path) -> None:
    for name, leaves in (("empty", False), ("left", True)):
        folder = tmp_path / "jobs" / name
        folder.mkdir(parents=True)
        executor = SlurmExecutor(PlayedQueue(folder), PLACEMENT, folder=folder, poll_s=0.01)
        if leaves:
            with pytest.raises(UserCodeError):
                executor.submit(_raise, None).result(timeout=10)
        executor.close()
        assert folder.exists() == leaves


def test_a_partition_is_read_with_its_usable_nodes_and_its_limit() -> None:
    assert parse_partition(SINFO, "") == Partition(name="pair", nodes=(Node(4, 0), Node(4, 0)), most_minutes=None)
    assert parse_partition(SINFO, "short") == Partition(name="short", nodes=(Node(2, 3),), most_minutes=30)


def test_limits_are_read_as_slurm_writes_them() -> None:
    assert [slurm_queue._minutes(text) for text in ("2-01:30:00", "1:00:00", "30:00", "infinite")] == [2970, 60, 30, None]


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        (SINFO, "long", "no partition 'long'"),
        ("short|2|(null)|idle|30:00\n", "", "no default partition"),
        ("pair*|2|(null)|drain|30:00\n", "", "are drain"),
    ],
)
def test_a_partition_that_cannot_be_used_is_refused(text: str, name: str, reason: str) -> None:
    with pytest.raises(ClusterError, match=reason):
        parse_partition(text, name)


def test_a_machine_without_slurm_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ClusterError, match="no SLURM on this machine"):
        open_executor(ExecutorSetting())


def test_two_different_partitions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "short")

    with pytest.raises(UsageError, match="--on names long and SBATCH_PARTITION short"):
        open_executor(ExecutorSetting(address="long"))


def _play_commands(monkeypatch: pytest.MonkeyPatch, folder: Path, **scripts: str) -> None:
    """Put commands of these names, and only these, before all others."""
    for name, script in scripts.items():
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_slurm_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _play_commands(monkeypatch, tmp_path, sbatch="exit 0", sinfo="printf 'error: no route\\nfatal: no controller\\n' >&2; exit 1")

    with pytest.raises(ClusterError, match="sinfo said: error: no route fatal: no controller; try `sinfo` yourself, or use --on local"):
        read_partition("")


def test_a_job_asks_for_what_was_placed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _play_commands(monkeypatch, tmp_path, srun="", sbatch=f'cp "$1" {tmp_path}/script; echo Submitted batch job 7')
    partition = Partition(name="short", nodes=(), most_minutes=30)

    job = SlurmQueue(partition, Placement(cpus=6, gpus=1, slots=1), tmp_path / "jobs").submit(b"work")

    script = (tmp_path / "script").read_text()
    assert job.job_id == "7"
    for asked in ("--partition=short", "--time=30", "--cpus-per-task=6", "--gpus-per-node=1", "--job-name=rightbatch-trial"):
        assert f"#SBATCH {asked}\n" in script
    assert sys.executable in script


def test_a_job_that_is_not_accepted_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _play_commands(monkeypatch, tmp_path, srun="", sbatch="echo Invalid account >&2; exit 1")
    queue = SlurmQueue(Partition(name="short", nodes=(), most_minutes=None), PLACEMENT, tmp_path / "jobs")

    with pytest.raises(ClusterError, match=r"Invalid account.*SBATCH_ACCOUNT"):
        queue.submit(b"work")


def test_states_are_asked_for_all_jobs_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _play_commands(
        monkeypatch, tmp_path, srun="", squeue=f'echo "$@" >> {tmp_path}/asked; echo "7|RUNNING"', scancel=f'echo "$@" > {tmp_path}/ended'
    )
    queue = SlurmQueue(Partition(name="short", nodes=(), most_minutes=None), PLACEMENT, tmp_path / "jobs")
    jobs = [SimpleNamespace(job_id="7"), SimpleNamespace(job_id="8")]

    assert queue.states(jobs) == {"7": "RUNNING"}
    queue.cancel(jobs)

    assert (tmp_path / "asked").read_text().splitlines() == ["--noheader --states=all --format=%i|%T --jobs=7,8"]
    assert (tmp_path / "ended").read_text().split() == ["--quiet", "7", "8"]


def test_jobs_that_slurm_has_forgotten_are_told_from_a_slurm_that_is_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = "slurm_load_jobs error: Invalid job id specified"
    _play_commands(monkeypatch, tmp_path, srun="", squeue=f"echo {words} >&2; exit 1")
    queue = SlurmQueue(Partition(name="short", nodes=(), most_minutes=None), PLACEMENT, tmp_path / "jobs")

    assert queue.states([SimpleNamespace(job_id="7")]) == {}
    _play_commands(monkeypatch, tmp_path, squeue="echo Unable to contact slurm controller >&2; exit 1")
    assert queue.states([SimpleNamespace(job_id="7")]) is None


def test_a_partition_with_too_little_time_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _play_commands(monkeypatch, tmp_path, srun="")

    with pytest.raises(ClusterError, match=f"{LEAST_MINUTES} minutes"):
        SlurmQueue(Partition(name="tiny", nodes=(), most_minutes=LEAST_MINUTES - 1), PLACEMENT, tmp_path)
    assert MOST_MINUTES > LEAST_MINUTES
