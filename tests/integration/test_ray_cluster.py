"""Trials on a real Ray cluster: two nodes on the loopback device of this machine, behind a token. Skipped where Ray is not installed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:  # not imported yet: Ray keeps the token that it finds then
    pytest.skip("Ray is not installed", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings are not ours to keep out

from rightbatch.errors import UserCodeError, WorkerKilledError  # noqa: E402
from rightbatch.sweeps.executors import Executor, open_executor  # noqa: E402
from sweep_cluster_ray import Pair, ray_pair  # noqa: E402

UNREACHABLE = """
import sys
from rightbatch.errors import ClusterError
from rightbatch.sweeps.executors import open_executor
try:
    open_executor(sys.argv[1], jobs=None, device="cpu")
except ClusterError as error:
    sys.exit(f"{error.exit_code}: {error}")
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("working-folder")
    (folder / "words.txt").write_text("sent along")
    with ray_pair() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.variables.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        yield started


@pytest.fixture(scope="module")
def executor(pair: Pair) -> Iterator[Executor]:
    opened = open_executor(pair.where, jobs=None, device="cpu")
    yield opened
    opened.close()


def test_trials_run_on_both_nodes_in_processes_of_their_own(executor: Executor) -> None:
    def place(_: int) -> tuple[int, int]:
        time.sleep(1)  # long enough for the other node to take the next one
        return os.getpid(), os.getppid()

    places = [future.result(timeout=120) for future in [executor.submit(place, number) for number in range(6)]]

    assert executor.slots == 2
    assert len({process for process, _ in places}) == 6


def test_the_working_folder_is_there(executor: Executor) -> None:
    assert executor.submit(lambda name: Path(name).read_text(), "words.txt").result(timeout=60) == "sent along"


def test_a_trial_ends_as_it_would_here(executor: Executor) -> None:
    def fail(_: None) -> None:
        raise ValueError("no")

    with pytest.raises(UserCodeError, match="ValueError: no"):
        executor.submit(fail, None).result(timeout=60)
    with pytest.raises(WorkerKilledError, match="SIGKILL"):
        executor.submit(lambda _: os.kill(os.getpid(), signal.SIGKILL), None).result(timeout=60)


def test_another_token_is_refused_with_the_remedy(pair: Pair) -> None:
    other = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", UNREACHABLE, pair.where], env=other, capture_output=True, text=True, check=False)

    assert "6: the Ray cluster at" in ended.stderr
    assert "RAY_AUTH_TOKEN" in ended.stderr


def test_a_node_that_dies_takes_no_trial_with_it(pair: Pair, executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    def work(number: int) -> int:
        time.sleep(3)
        return number

    futures = [executor.submit(work, number) for number in range(4)]
    while not pair.second_is_busy():
        assert not all(future.done() for future in futures)
        time.sleep(0.05)
    pair.lose_second()

    assert [future.result(timeout=120) for future in futures] == [0, 1, 2, 3]
    assert any("lost its node" in record.message for record in caplog.records)
