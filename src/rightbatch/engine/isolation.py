"""Where probes run: in a child process of their own, or in this one with everything put back.

A child that runs out of memory or is killed is an outcome, not a crash; the caller's process is never at risk. Nor does it wait for torch:
this module does not import it, and a child imports it while its parent goes on.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

import cloudpickle

from rightbatch.errors import IsolationError, UserCodeError

if TYPE_CHECKING:
    from rightbatch.engine.in_process import InProcessHost
    from rightbatch.engine.rig import Rig

__all__ = ["ChildHost", "Completed", "Host", "InProcessHost", "Killed", "OutOfMemory"]

T = TypeVar("T")
P = ParamSpec("P")

CRASHES = frozenset({signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGSYS})
"""What a fault of compiled code ends with. Aborts and bus errors are not among them: failed allocations end with those, too."""


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

    def call(self, probe: Callable[Concatenate["Rig", P], T], *args: P.args, **kwargs: P.kwargs) -> Completed[T] | OutOfMemory | Killed:
        """Run a probe; errors of ours and of the user's code are raised here as they were there."""

    def renew(self) -> None:
        """Run the next probe in a fresh process, where probes have one of their own."""

    def close(self) -> None:
        """End what was started."""


def __getattr__(name: str) -> Any:
    """Load ``InProcessHost`` when it is asked for: it needs torch."""
    if name != "InProcessHost":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rightbatch.engine.in_process import InProcessHost

    return InProcessHost


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

    def __init__(self, build: "Callable[[], Rig]", say: Callable[[str], None], *, environment: Mapping[str, str] | None = None) -> None:
        self._say = say
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._build = cloudpickle.dumps(build)
        except Exception as error:
            raise IsolationError(
                f"the workload must be picklable to be measured in a child process; got {type(error).__name__}: {error}; "
                "make locks, open files and connections where they are first used, or pass isolation='in-process'."
            ) from error
        self._start()

    def _start(self) -> None:
        try:
            self._process, self._connection = spawned(_CHILD_PROGRAM, {**os.environ, **self._environment})
        except OSError as error:
            raise _unstarted(str(error)) from error
        self._send(place_of_this_process())
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

    def call(self, probe: Callable[Concatenate["Rig", P], T], *args: P.args, **kwargs: P.kwargs) -> Completed[T] | OutOfMemory | Killed:
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
            elif kind == "unstarted":
                raise _unstarted(value)
            elif kind == "error":
                raise value
            else:
                return value

    def _ended(self) -> Killed:
        assert self._process is not None, "only called while a child runs"  # noqa: S101
        code = self._process.wait()
        if code < 0 and -code not in CRASHES:
            return Killed(signal.Signals(-code).name)
        self.close()
        if code < 0:
            raise UserCodeError(
                f"compiled code that the workload calls must not crash; it ended the child process with {signal.Signals(-code).name}, "
                "which is no lack of memory; where it was is shown above."
            )
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
try:
    if folder is not None:
        os.chdir(folder)
    from rightbatch.engine.child import serve
except BaseException as error:
    connection.send_bytes(pickle.dumps(("unstarted", f"{type(error).__name__}: {error}")))
    raise
serve(connection)
"""


def place_of_this_process() -> bytes:
    """Return, pickled, where this process imports from and works: the path, and the folder; none where that was removed."""
    return pickle.dumps((sys.path, os.getcwd() if os.path.isdir(".") else None))  # noqa: PTH109, PTH112


def spawned(program: str, environment: Mapping[str, str]) -> tuple["subprocess.Popen[bytes]", Connection]:
    """Start a child that shows where it crashes, in a session of its own, with its output on this process's stderr.

    Args:
        program: Python; ``sys.argv[1]`` is the descriptor of its end of the connection.
        environment: All its variables.

    Returns:
        The child, and the connection to it.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                [sys.executable, "-X", "faulthandler", "-c", program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                env=environment,
            )
        except BaseException:
            ours.close()
            raise
    return process, Connection(ours.detach())


def _unstarted(reason: str) -> IsolationError:
    return IsolationError(
        f"a child process must be startable to measure safely; got {reason}; free some processes or memory, "
        "or pass --isolation in-process and accept that running out of memory may end this process."
    )
