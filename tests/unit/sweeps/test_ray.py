"""Trials on Ray, with a Ray that is played: what is asked of it, and what its errors come to."""

import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from rightbatch.errors import ClusterError, UserCodeError, WorkerKilledError
from rightbatch.sweeps.executors import ExecutorSetting, remote
from rightbatch.sweeps.executors.placement import Placement
from rightbatch.sweeps.executors.ray import MOST_LOSSES, RayExecutor, open_executor


class RayError(Exception):
    pass


_NAMES = (
    "NodeDiedError",
    "LocalRayletDiedError",
    "ObjectLostError",
    "WorkerCrashedError",
    "OutOfMemoryError",
    "TaskCancelledError",
    "RayTaskError",
    "RuntimeEnvSetupError",
)
ERRORS = SimpleNamespace(RayError=RayError, **{name: type(name, (RayError,), {}) for name in _NAMES})


class PlayedRay:
    """Runs tasks at once, in this process; those whose turn is planned end as planned."""

    exceptions = ERRORS

    def __init__(self, *planned: BaseException | None, refusal: Exception | None = None) -> None:
        self.planned = list(planned)
        self.refusal = refusal
        self.options: dict[str, object] = {}
        self.asked: dict[str, object] = {}
        self.tasks = 0
        self.is_down = False

    def init(self, address, **asked):
        self.asked = {"address": address, **asked, "token": os.environ.get("RAY_AUTH_TOKEN")}
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.refusal is not None:
            raise self.refusal

    def shutdown(self):
        self.is_down = True

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address=self.asked["address"])

    def remote(self, **options):
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda work: self._start(function, work))

    def _start(self, function, work) -> "Future[object]":
        self.tasks += 1
        reference: Future[object] = Future()
        plan = self.planned.pop(0) if self.planned else None
        if plan is not None:
            reference.set_exception(plan)
        elif function is not None:
            kind, value = _run_here(work)
            reference.set_result((kind, value))
        return reference

    def wait(self, references, timeout):
        return ([one for one in references if one.done()], [])

    def get(self, reference):
        return reference.result()

    def cancel(self, reference, *, force):
        reference.set_exception(ERRORS.TaskCancelledError())


def _run_here(work):
    import cloudpickle

    from rightbatch.errors import RightbatchError

    try:
        return "value", remote._run_pickled(work)
    except RightbatchError as error:
        return "error", cloudpickle.dumps(error)


@pytest.fixture
def port():
    """A port of this machine at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _executor(ray: PlayedRay, **settings) -> RayExecutor:
    return RayExecutor(ray, Placement(cpus=1, gpus=0, slots=2), head=None, clean_up=ray.shutdown, **settings)


def _raise_user_error(_):
    raise UserCodeError("the metric is none", "frames")


def test_a_trial_comes_back_and_gets_what_was_placed() -> None:
    ray = PlayedRay()
    executor = RayExecutor(ray, Placement(cpus=6, gpus=1, slots=3), head=None, clean_up=ray.shutdown)

    assert executor.submit(abs, -3).result() == 3
    assert (executor.slots, executor.threads) == (3, 6)
    assert ray.options == {"num_cpus": 6, "num_gpus": 1, "max_retries": 0, "max_calls": 0}
    executor.close()
    assert ray.is_down


def test_what_the_trial_raised_is_raised_here() -> None:
    executor = _executor(PlayedRay())

    with pytest.raises(UserCodeError, match="the metric is none") as caught:
        executor.submit(_raise_user_error, None).result()
    assert caught.value.user_traceback == "frames"
    executor.close()


@pytest.mark.parametrize("error", [ERRORS.NodeDiedError("gone"), ERRORS.LocalRayletDiedError(), ERRORS.ObjectLostError()])
def test_a_trial_whose_node_is_lost_runs_again(error: RayError) -> None:
    ray = PlayedRay(error, error)
    executor = _executor(ray)

    assert executor.submit(abs, -3).result() == 3
    assert ray.tasks == 3
    executor.close()


def test_a_trial_that_loses_node_after_node_is_given_up() -> None:
    ray = PlayedRay(*[ERRORS.NodeDiedError("gone")] * MOST_LOSSES)
    executor = _executor(ray)

    with pytest.raises(ClusterError, match=f"{MOST_LOSSES} times"):
        executor.submit(abs, -3).result()
    assert ray.tasks == MOST_LOSSES
    executor.close()


@pytest.mark.parametrize("error", [ERRORS.WorkerCrashedError("died"), ERRORS.OutOfMemoryError("full")])
def test_a_killed_worker_is_for_the_driver_to_judge(error: RayError) -> None:
    ray = PlayedRay(error)
    executor = _executor(ray)

    with pytest.raises(WorkerKilledError):
        executor.submit(abs, -3).result()
    assert ray.tasks == 1
    executor.close()


def test_a_node_that_lacks_what_trials_need_is_named_with_the_remedy() -> None:
    executor = _executor(PlayedRay(ERRORS.RayTaskError("frames\nModuleNotFoundError: No module named 'torch'")))

    with pytest.raises(ClusterError, match=r"No module named 'torch'; .*pip install rightbatch"):
        executor.submit(abs, -3).result()
    executor.close()


def test_an_error_of_another_kind_keeps_its_words() -> None:
    executor = _executor(PlayedRay(RayError("the moon is full")))

    with pytest.raises(ClusterError, match="the moon is full"):
        executor.submit(abs, -3).result()
    executor.close()


def test_closing_ends_what_runs() -> None:
    ray = PlayedRay()
    started, endless = threading.Event(), Future()

    def start(function, work):
        started.set()
        return endless

    def wait(references, timeout):
        endless.exception()  # until it is cancelled
        return references, []

    ray._start, ray.wait = start, wait
    executor = _executor(ray)
    running, waiting = executor.submit(abs, 1), [executor.submit(abs, 2) for _ in range(4)]
    started.wait()

    executor.close()

    with pytest.raises(WorkerKilledError):
        running.result()
    assert all(one.cancelled() or isinstance(one.exception(), WorkerKilledError) for one in waiting)
    assert ray.is_down


def test_a_head_that_is_gone_ends_the_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = server.getsockname()
    ray = PlayedRay()
    ray._start = lambda function, work: Future()
    seconds = iter(range(0, 10_000, 20))
    executor = RayExecutor(
        ray, Placement(cpus=1, gpus=0, slots=1), head=nobody, clean_up=ray.shutdown, clock_s=lambda: float(next(seconds))
    )

    with pytest.raises(ClusterError, match="head of the Ray cluster no longer answers"):
        executor.submit(abs, -3).result()
    executor.close()


def test_connecting_sends_the_code_and_keeps_the_handler_of_sigterm(monkeypatch: pytest.MonkeyPatch, tmp_path, port: int) -> None:
    ray = PlayedRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    executor = open_executor(ExecutorSetting(address=f"127.0.0.1:{port}"))

    assert executor.slots == 2, "the dead node lends nothing"
    code = ray.asked["runtime_env"]
    assert code["working_dir"] == str(tmp_path)
    assert code["py_modules"][0].endswith("rightbatch")
    assert "rightbatch-runs" in code["excludes"]
    assert ray.asked["token"] is None, "the token of a cluster is the user's"
    assert signal.getsignal(signal.SIGTERM) is before
    executor.close()


def test_a_cluster_of_ours_is_behind_a_token_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    ray = PlayedRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    executor = open_executor(ExecutorSetting(device="cpu"))

    assert ray.asked["address"] == "local"
    assert len(ray.asked["token"]) == 64
    assert ray.asked["include_dashboard"] is False
    assert Path(ray.asked["_temp_dir"]).is_dir()
    executor.close()
    assert ray.is_down
    assert not Path(ray.asked["_temp_dir"]).exists()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        (ConnectionError("Unauthenticated: InvalidAuthToken"), "RAY_AUTH_TOKEN"),
        (RuntimeError("Version mismatch: The cluster was started with: Ray: 2.9.0"), "runs another Ray or Python.*2.9.0"),
        (ValueError("Package size (900.00MiB) exceeds the maximum size of 500.00MiB"), ".rayignore"),
        (ValueError("Ray Client requires pip package `ray[client]`"), "rightbatch.ray."),
        (RuntimeError("no node_ip_address.json"), "ray:ray://HOST:10001"),
    ],
)
def test_a_cluster_that_refuses_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, port: int, refusal: Exception, remedy: str
) -> None:
    ray = PlayedRay(refusal=refusal)
    monkeypatch.setitem(sys.modules, "ray", ray)

    with pytest.raises(ClusterError, match=remedy) as caught:
        open_executor(ExecutorSetting(address=f"127.0.0.1:{port}"))
    assert caught.value.exit_code == 6
    assert ray.is_down


def test_an_address_at_which_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = PlayedRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = server.getsockname()[1]

    with pytest.raises(ClusterError, match="ray start --head"):
        open_executor(ExecutorSetting(address=f"127.0.0.1:{nobody}"))
    with pytest.raises(ClusterError, match="HOST:PORT"):
        open_executor(ExecutorSetting(address="somewhere"))
    assert ray.asked == {}
