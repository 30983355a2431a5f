"""Where probes run: in a child process of their own, or in this one with everything put back.

A child that runs out of memory or is killed is an outcome, not a crash; the caller's process is never at risk.
"""

import contextlib
import gc
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

import cloudpickle
import numpy as np
import torch

from rightbatch.engine.out_of_memory import is_out_of_memory
from rightbatch.engine.rig import Rig
from rightbatch.errors import IsolationError, RightbatchError, UserCodeError

T = TypeVar("T")
P = ParamSpec("P")

_OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120  # compared with frames' file names


@dataclass(frozen=True)
class Completed(Generic[T]):
    """The probe returned."""

    value: T


@dataclass(frozen=True)
class OutOfMemory:
    """Memory ran out; ``message`` is the first line of what the allocator said."""

    message: str


@dataclass(frozen=True)
class Killed:
    """The child was ended by a signal, most often by the kernel because the machine ran out of memory."""

    signal_name: str


@runtime_checkable
class Host(Protocol):
    """Runs probes on a rig."""

    def call(self, probe: Callable[Concatenate[Rig, P], T], *args: P.args, **kwargs: P.kwargs) -> Completed[T] | OutOfMemory | Killed:
        """Run a probe; errors of ours and of the user's code are raised here as they were there."""

    def renew(self) -> None:
        """Run the next probe in a fresh process, where probes have one of their own."""

    def close(self) -> None:
        """End what was started."""


class InProcessHost:
    """Runs probes in this process and leaves it as it was: generators, modes, switches.

    Models are never shared with the user: the rig builds copies.

    Args:
        build: Builds the rig.
        say: Receives progress.
    """

    def __init__(self, build: Callable[[], Rig], say: Callable[[str], None]) -> None:
        with preserved_process_state(), _users_errors():
            self._rig = build()
            self._state = _process_state()
        self._rig.say = say

    def call(self, probe: Callable[Concatenate[Rig, P], T], *args: P.args, **kwargs: P.kwargs) -> Completed[T] | OutOfMemory | Killed:
        """Run a probe with the threads and switches that building the rig set; running out of memory is an outcome."""
        with preserved_process_state():
            _restore_process_state(self._state)
            return _attempt(probe, self._rig, args, kwargs)

    def renew(self) -> None:
        """Do nothing: this process cannot be replaced."""

    def close(self) -> None:
        """Drop the rig."""
        gc.collect()


class ChildHost:
    """Runs probes in a spawned process that is started again after it was killed.

    The child starts from a fresh interpreter, so it shares no state with this process and needs no ``__main__`` guard. It is the kernel's
    first choice when memory runs out, it does not see Ctrl-C, and it ends with this process.

    Args:
        build: Builds the rig, in the child; sent with cloudpickle, so lambdas and notebook classes work.
        say: Receives progress.
        environment: Variables set for the child beside this process's own.

    Raises:
        IsolationError: The child cannot be started, or the workload cannot be sent to it.
    """

    def __init__(self, build: Callable[[], Rig], say: Callable[[str], None], *, environment: Mapping[str, str] | None = None) -> None:
        self._say = say
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._build = cloudpickle.dumps(build)
        except Exception as error:
            raise IsolationError(
                f"the workload must be picklable to be measured in a child process; got {type(error).__name__}: {error}; "
                "give a file.py:function instead, or pass isolation='in-process'."
            ) from error
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                [sys.executable, "-c", _CHILD_PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                env={**os.environ, **self._environment},
            )
        except OSError as error:
            ours.close()
            raise IsolationError(
                f"a child process must be startable to measure safely; got {error}; free some processes or memory, "
                "or pass --isolation in-process and accept that running out of memory may end this process."
            ) from error
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        self._send(cloudpickle.dumps((sys.path, os.getcwd())) if os.path.isdir(".") else cloudpickle.dumps((sys.path, None)))  # noqa: PTH109, PTH112
        self._send(self._build)
        try:
            outcome = self._receive()
        except BaseException:
            self.close()
            raise
        if not isinstance(outcome, Completed):
            self.close()
            raise IsolationError(
                f"the child process must load the workload before it measures; it ended with {outcome.signal_name}; is memory short?"
            )

    def call(self, probe: Callable[Concatenate[Rig, P], T], *args: P.args, **kwargs: P.kwargs) -> Completed[T] | OutOfMemory | Killed:
        """Run a probe in the child; being killed or running out of memory is an outcome."""
        if self._process is None:
            self._start()
        self._send(cloudpickle.dumps((probe, args, kwargs)))
        outcome: Completed[T] | OutOfMemory | Killed = self._receive()
        if isinstance(outcome, Killed):
            self.close()
        return outcome

    def _send(self, payload: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(payload)

    def _receive(self) -> Any:  # whatever the probe returns
        while True:
            try:
                kind, value = cloudpickle.loads(self._connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                return self._ended()
            if kind == "say":
                self._say(value)
            elif kind == "error":
                raise value
            else:
                return value

    def _ended(self) -> Killed:
        assert self._process is not None, "only called while a child runs"  # noqa: S101
        code = self._process.wait()
        if code < 0:
            return Killed(signal.Signals(-code).name)
        self.close()
        raise IsolationError(f"the child process must answer; it exited with status {code}; its last words are above.")

    def renew(self) -> None:
        """End the child; the next probe starts another."""
        self.close()

    def close(self) -> None:
        """End the child and every process it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._process = None


_CHILD_PROGRAM = """\
import os, pickle, sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv.pop(1)))
sys.path[:], folder = pickle.loads(connection.recv_bytes())
if folder is not None:
    os.chdir(folder)
from rightbatch.engine.isolation import serve
serve(connection)
"""


def serve(connection: Connection) -> None:
    """Build the rig that the parent sent, then run probes until the parent hangs up."""
    _volunteer_for_the_oom_killer()
    threading.Thread(target=_end_with_the_parent, args=(connection.fileno(),), daemon=True).start()
    rig: Rig | None = None
    while True:
        try:
            payload = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            if rig is None:
                with _users_errors():
                    rig = cloudpickle.loads(payload)()
                rig.say = lambda line: connection.send_bytes(cloudpickle.dumps(("say", line)))
                outcome: object = Completed(None)
            else:
                probe, args, kwargs = cloudpickle.loads(payload)
                outcome = _attempt(probe, rig, args, kwargs)
            answer = ("outcome", outcome)
        except RightbatchError as error:
            error.__traceback__ = error.__cause__ = error.__context__ = None
            answer = ("error", error)
        connection.send_bytes(cloudpickle.dumps(answer))


def _end_with_the_parent(descriptor: int) -> None:
    """Wait until the other end is closed, then end this process and its own children, even in the middle of a probe."""
    poller = select.poll()
    poller.register(descriptor, 0)  # hanging up is always reported
    poller.poll()
    os.killpg(0, signal.SIGKILL)


def _volunteer_for_the_oom_killer() -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123  # a kernel file, not a path
        score.write("1000")


def _attempt(probe: Callable[..., T], rig: Rig, args: tuple[object, ...], kwargs: dict[str, object]) -> Completed[T] | OutOfMemory | Killed:
    """Run a probe; turn running out of memory into a value, and any other stranger's error into a ``UserCodeError``."""
    message = ""
    try:
        with _users_errors():
            return Completed(probe(rig, *args, **kwargs))
    except UserCodeError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
        message = (str(error.__cause__).splitlines() or [type(error.__cause__).__name__])[0]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return OutOfMemory(message)


@contextlib.contextmanager
def _users_errors() -> Iterator[None]:
    """Raise what is not ours as a ``UserCodeError`` with a traceback of the user's frames."""
    try:
        yield
    except RightbatchError:
        raise
    except Exception as error:
        raise UserCodeError(f"the workload's code raised {type(error).__name__}: {error}", user_traceback(error)) from error


def user_traceback(error: BaseException) -> str:
    """Return the traceback of an error without the frames of rightbatch."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OWN_FOLDER)]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)] if frames else []
    return "".join([*lines, *traceback.format_exception_only(error)])


@contextlib.contextmanager
def preserved_process_state() -> Iterator[None]:
    """Put back everything process-wide that a probe may change: generators, gradient mode, precision and backend switches, threads."""
    state = _process_state()
    with warnings.catch_warnings(), torch.set_grad_enabled(True):
        try:
            yield
        finally:
            _restore_process_state(state)


@dataclass(frozen=True)
class _ProcessState:
    python_rng: object
    numpy_rng: Any
    torch_rng: torch.Tensor
    cuda_rng: list[torch.Tensor]
    threads: int
    dtype: torch.dtype
    deterministic: bool
    deterministic_warn_only: bool
    matmul_precision: str
    cudnn: tuple[bool, bool, bool]


def _process_state() -> _ProcessState:
    cudnn = torch.backends.cudnn
    return _ProcessState(
        python_rng=random.getstate(),
        numpy_rng=np.random.get_state(),  # noqa: NPY002
        torch_rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        threads=torch.get_num_threads(),
        dtype=torch.get_default_dtype(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        deterministic_warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        matmul_precision=torch.get_float32_matmul_precision(),
        cudnn=(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
    )


def _restore_process_state(state: _ProcessState) -> None:
    random.setstate(state.python_rng)  # type: ignore[arg-type]
    np.random.set_state(state.numpy_rng)  # noqa: NPY002
    torch.set_rng_state(state.torch_rng)
    if state.cuda_rng:
        torch.cuda.set_rng_state_all(state.cuda_rng)
    if torch.get_num_threads() != state.threads:
        torch.set_num_threads(state.threads)
    torch.set_default_dtype(state.dtype)
    torch.use_deterministic_algorithms(state.deterministic, warn_only=state.deterministic_warn_only)
    torch.set_float32_matmul_precision(state.matmul_precision)
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = state.cudnn
