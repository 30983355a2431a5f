"""Trials on a Ray cluster: Ray places them and ships the code; each runs in a fresh process of its node.

The working folder goes to the nodes, as Ray uploads it, and with it this very version of rightbatch. Both go by value of their files: the
driver never imports the user's code, so it could not pickle what that defines, and a node may hold another version, or none.

Ray does not retry by itself, because it would not tell a lost node from a process that memory killed. A trial whose node was lost is
submitted again here; one whose process was killed is the driver's to judge.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from rightbatch.errors import ClusterError, WorkerKilledError
from rightbatch.sweeps.executors import ExecutorSetting, packed
from rightbatch.sweeps.executors.placement import Node, Placement, place
from rightbatch.sweeps.executors.remote import Outcome, opened, run_there

_log = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")

MOST_LOSSES = 5
"""Nodes that may be lost under one trial."""
_PACKAGE = Path(__file__).resolve().parents[2]
_CLIENT = "ray://"
_ANSWER_S = 5.0
"""How long a machine may take to accept a connection."""
_PULSE_S = 10.0
"""How often it is asked whether the head of the cluster is still there."""
_MOST_MISSED = 3
"""Answers in a row that the head may miss. Ray itself ends the process after 60 s without it."""
_NOT_SENT = [".git", ".venv", "rightbatch-runs", "__pycache__"]
_PATIENCE = {"RAY_NUM_REDIS_GET_RETRIES": "2"}
"""Read by Ray when it is imported: a wrong token is known after 2 s rather than 20."""


def open_executor(setting: ExecutorSetting) -> "RayExecutor":
    """Connect to the cluster that is named, or to the one that runs here; without one, start one on this machine.

    Raises:
        ClusterError: The cluster cannot be reached, or it refuses.
    """
    address = setting.address or os.environ.get("RAY_ADDRESS") or _cluster_here()
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _own_token(), "RAY_USAGE_STATS_ENABLED": "0"}
    with _environment(_PATIENCE if address else {**_PATIENCE, **own}), _signals_kept():
        ray = import_module("ray")
        if address:
            _check_address(address)
            _connect(ray, address)
            return RayExecutor(ray, _placed(ray, setting), head=_head(ray, address), clean_up=ray.shutdown)
        return _started_here(ray, setting)


def _started_here(ray: Any, setting: ExecutorSetting) -> "RayExecutor":
    """Start a cluster of one node that is ours: only on the loopback device, behind a token that nobody else has."""
    folder = tempfile.mkdtemp(prefix="rb-")  # short: sockets lie below it, whose paths are limited to 107 characters

    def clean_up() -> None:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    try:
        ray.init(
            "local",
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        return RayExecutor(ray, _placed(ray, setting), head=None, clean_up=clean_up)
    except Exception as error:
        clean_up()
        if isinstance(error, ClusterError):
            raise
        raise ClusterError(
            f"Ray could not be started on this machine ({_first_line(error)}); use --on local, or name a cluster."
        ) from error


@cache
def _own_token() -> str:
    """One for this process: Ray keeps the first that it reads."""
    return secrets.token_hex(32)


def _connect(ray: Any, address: str) -> None:
    """Connect and send the code.

    Raises:
        ClusterError: The cluster does not let us in, or cannot take the code.
    """
    code = {"working_dir": str(Path.cwd()), "py_modules": [str(_PACKAGE)], "excludes": _NOT_SENT}
    try:
        ray.init(address, runtime_env=code, logging_level="ERROR")
    except Exception as error:
        ray.shutdown()
        raise ClusterError(_refusal(address, error)) from error


def _refusal(address: str, error: BaseException) -> str:
    """What it means that connecting failed, and what to do."""
    words = _all_words(error)
    if "auth" in words.lower():
        return (
            f"the Ray cluster at {address} refused our token; it must be the same on every node and here: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
    if "version mismatch" in words.lower() or "versions" in words.lower():
        return f"the cluster at {address} runs another Ray or Python, and both must be the same here: {' '.join(words.split())[:300]}"
    if "package size" in words.lower() or "exceeds" in words.lower():
        return (
            f"the working folder is sent to the cluster and is too large ({_first_line(error)}); name data and results in .rayignore or "
            ".gitignore, and keep data where every node can read it."
        )
    if "ray[client]" in words:
        return f"{address} needs Ray's client, which is not installed here; run: pip install 'rightbatch[ray]'."
    remedy = "check that it is the port of Ray's client server (10001)"
    if not address.startswith(_CLIENT):
        remedy = "from a machine that is not one of its nodes use --on ray:ray://HOST:10001"
    return f"the Ray cluster at {address} did not let us in ({_first_line(error)}); {remedy}."


def _all_words(error: BaseException | None) -> str:
    """The messages of an error and of what caused it."""
    said = []
    while error is not None:
        said.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(said)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cluster_here() -> str:
    """``auto`` when a cluster was started on this machine and still answers, else nothing."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # noqa: S108  # where Ray leaves it
    try:
        address = note.read_text().strip()
    except OSError:
        return ""
    return "auto" if address and _answers(_host_and_port(address)) else ""


def _check_address(address: str) -> None:
    """Refuse an address at which nothing listens; Ray would try for minutes.

    Raises:
        ClusterError: Nothing does, or it is no address.
    """
    if address == "auto":
        return
    place = _host_and_port(address)
    if place is None:
        raise ClusterError(f"a Ray cluster is named by HOST:PORT or ray://HOST:PORT; got {address!r}.")
    if not _answers(place):
        raise ClusterError(
            f"no Ray cluster answers at {address}; start one there with `ray start --head`, and let the port through the firewall, or use "
            "--on local."
        )


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix(_CLIENT).rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _answers(place: tuple[str, int] | None) -> bool:
    if place is None:
        return False
    try:
        socket.create_connection(place, timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def _head(ray: Any, address: str) -> tuple[str, int] | None:
    """Where the head can be asked whether it is still there."""
    return _host_and_port(address if address.startswith(_CLIENT) else ray.get_runtime_context().gcs_address)


def _placed(ray: Any, setting: ExecutorSetting) -> Placement:
    lent = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return place([Node(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in lent], device=setting.device, jobs=setting.jobs)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, for as long as Ray reads them."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class RayExecutor:
    """Runs functions on the nodes of a cluster that this process is connected to.

    Args:
        ray: The module ``ray``, connected.
        placement: What a trial gets.
        head: Where to ask whether the cluster is still there; none does not ask.
        clean_up: Disconnects; what was started for this process ends with it.
        clock_s: Clock of the questions to the head, in seconds.
    """

    def __init__(
        self,
        ray: Any,
        placement: Placement,
        *,
        head: tuple[str, int] | None,
        clean_up: Callable[[], None],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = placement.slots
        self.threads: int | None = max(1, placement.cpus)
        self.device: str | None = None
        self._ray = ray
        self._remote = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=0, max_calls=0)(run_there)
        self._pulse = _Pulse(head, clock_s)
        self._clean_up = clean_up
        self._lock = threading.Lock()
        self._live: set[Any] = set()
        self._is_closed = False
        self._pool = ThreadPoolExecutor(placement.slots, thread_name_prefix="rightbatch-ray")

    def submit(self, function: Callable[[P], R], params: P) -> "Future[R]":
        """Run a function on some node, in a process of its own; again elsewhere when its node is lost."""
        return self._pool.submit(self._run, packed(function, params))

    def close(self) -> None:
        """Kill what still runs, and disconnect."""
        with self._lock:
            self._is_closed = True
            for reference in self._live:
                with contextlib.suppress(Exception):  # the cluster may be gone
                    self._ray.cancel(reference, force=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._clean_up()

    def _run(self, work: bytes) -> Any:  # whatever the function returns
        for _ in range(MOST_LOSSES):
            try:
                return opened(self._outcome(work))
            except _NodeLostError as error:
                _log.warning("a trial lost its node and is run again elsewhere: %s", _first_line(error))
        raise ClusterError(
            f"a trial lost the node it ran on {MOST_LOSSES} times; `ray status` shows which nodes are left. "
            "Every trial that had ended is kept: repeat the command to go on."
        )

    def _outcome(self, work: bytes) -> Outcome:
        with self._lock:
            if self._is_closed:
                raise WorkerKilledError("the executor was closed before the trial ended")
            reference = self._remote.remote(work)
            self._live.add(reference)
        try:
            while not self._ray.wait([reference], timeout=_PULSE_S)[0]:
                self._pulse.check()
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise self._meaning(error) from error
        finally:
            with self._lock:
                self._live.discard(reference)
        return outcome

    def _meaning(self, error: Exception) -> Exception:
        """What an error of Ray's means for the trial."""
        known = self._ray.exceptions
        if isinstance(error, known.NodeDiedError | known.LocalRayletDiedError | known.ObjectLostError):
            return _NodeLostError(str(error))
        if isinstance(error, known.WorkerCrashedError | known.OutOfMemoryError | known.TaskCancelledError):
            return WorkerKilledError("its Ray worker was killed; Ray does that when the memory of a node runs out")
        if isinstance(error, known.RayTaskError | known.RuntimeEnvSetupError):
            return ClusterError(
                f"a node of the cluster cannot run trials: {_last_line(error)}; it needs this Python, torch, and what rightbatch depends "
                "on: run `pip install rightbatch` there."
            )
        return ClusterError(f"Ray gave a trial up: {_first_line(error)}. Every trial that had ended is kept: repeat the command to go on.")


class _NodeLostError(Exception):
    """The node of a trial is gone; the trial can run elsewhere."""


class _Pulse:
    """Whether the head of the cluster is still there; asked seldom, however many wait."""

    def __init__(self, head: tuple[str, int] | None, clock_s: Callable[[], float]) -> None:
        self._head = head
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._asked_s = clock_s()
        self._missed = 0

    def check(self) -> None:
        """Ask, when the last answer is old.

        Raises:
            ClusterError: There was none several times in a row.
        """
        with self._lock:
            if self._head is not None and self._clock_s() - self._asked_s >= _PULSE_S:
                self._missed = 0 if _answers(self._head) else self._missed + 1
                self._asked_s = self._clock_s()
            if self._missed >= _MOST_MISSED:
                raise ClusterError(
                    "the head of the Ray cluster no longer answers. Every trial that had ended is kept: start the cluster again, and "
                    "repeat the command to go on."
                )


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
