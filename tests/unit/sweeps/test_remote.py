"""What a job on another machine does with its work."""

import os
import signal

import cloudpickle
import pytest

from rightbatch.errors import UserCodeError, WorkerKilledError
from rightbatch.sweeps.executors import remote
from rightbatch.sweeps.executors.remote import opened, run_there


@pytest.fixture(autouse=True)
def _processes_end():
    yield
    remote._executor(os.environ.get("CUDA_VISIBLE_DEVICES")).close()
    remote._executor.cache_clear()


def _run(function, params):
    return opened(run_there(cloudpickle.dumps((function, params))))


def test_work_runs_in_a_fresh_process_and_returns() -> None:
    first, second = (_run(lambda number: (number + 1, os.getpid()), 1) for _ in range(2))

    assert first[0] == second[0] == 2
    assert len({first[1], second[1], os.getpid()}) == 3


def test_the_end_of_its_process_is_told_from_an_error_of_its_code() -> None:
    with pytest.raises(WorkerKilledError, match="SIGKILL"):
        _run(lambda _: os.kill(os.getpid(), signal.SIGKILL), None)
    with pytest.raises(UserCodeError, match="ValueError: no"):
        _run(lambda _: (_ for _ in ()).throw(ValueError("no")), None)
    assert _run(lambda number: number, 3) == 3
