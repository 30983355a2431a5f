"""Trials in processes of their own on this machine: one a GPU, or side by side on the processor's cores.

Every trial gets a fresh process, which starts at once: it is forked from a template that has imported torch and computed nothing. Once the
first process has told which installed packages the workload imports, the template imports them too; if that started a thread, another one
takes its place. None of the user's own code runs in a template. The processes end with this one, whatever ends this one.
"""

import contextlib
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import cloudpickle

from rightbatch.engine.isolation import CRASHES, place_of_this_process, spawned
from rightbatch.errors import IsolationError, RightbatchError, UsageError, UserCodeError, WorkerKilledError
from rightbatch.sweeps.executors import ExecutorSetting, packed

P = TypeVar("P")
R = TypeVar("R")

MOST_SIDE_BY_SIDE = 4
"""Trials at once on a processor, unless ``--jobs`` says otherwise: each holds a model and its data."""
FORK, IMPORT = b"f", b"i"
"""What the template may be asked for: a process for the socket that comes along, or to import the modules that follow."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_TEMPLATE_PROGRAM = """\
import ctypes, os, pickle, signal, sys
from multiprocessing.connection import Connection
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even while it imports, it ends with its parent
connection = Connection(int(sys.argv.pop(1)))
sys.path[:], folder = pickle.loads(connection.recv_bytes())
if folder is not None:
    os.chdir(folder)
from rightbatch.sweeps.executors.template import serve
serve(connection)
"""


def open_executor(setting: ExecutorSetting) -> "LocalExecutor":
    """Return an executor for this machine: a trial a GPU, or a few on the cores that this process may use.

    Raises:
        UsageError: The GPU that was named is not here.
    """
    gpus = () if setting.device in {"cpu", "mps"} else visible_gpus()
    if gpus:
        if setting.device not in {"auto", "cuda"}:
            return LocalExecutor([{_VISIBLE: _named(setting.device, gpus)}], device="cuda")  # its process sees this one alone
        return LocalExecutor([{_VISIBLE: gpu} for gpu in gpus[: setting.jobs or len(gpus)]])
    cores = len(os.sched_getaffinity(0))
    return LocalExecutor([{}] * (setting.jobs or min(cores, MOST_SIDE_BY_SIDE)))


def _named(device: str, gpus: Sequence[str]) -> str:
    """The GPU that ``cuda:1`` means among those that this process sees, as the variable names it."""
    number = device.rpartition(":")[2]
    if not number.isdecimal() or int(number) >= len(gpus):
        last = f" to cuda:{len(gpus) - 1}" if len(gpus) > 1 else ""
        raise UsageError(f"--device must name a GPU of this machine; got {device}; use cuda:0{last}, or cpu.")
    return gpus[int(number)]


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the CUDA devices that a process here would see, as the variable names them; none without a driver."""
    if _VISIBLE in environment:
        return tuple(name.strip() for name in environment[_VISIBLE].split(",") if name.strip() not in {"", "-1"})
    try:
        import pynvml

        pynvml.nvmlInit()
        return tuple(str(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except Exception:  # noqa: BLE001  # a missing library or driver, each with its own class: no GPU
        return ()


class LocalExecutor:
    """Runs each function in a process that is forked for it.

    Args:
        slots: Variables set for the process in each slot.
        device: Device of a trial as its own process names it; none leaves it as the user named it.

    Raises:
        IsolationError: The template cannot be started.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]], *, device: str | None = None) -> None:
        self._free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self.slots = len(slots)
        self.device = device
        self.threads: int | None = max(1, len(os.sched_getaffinity(0)) // len(slots))
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._is_closed = False
        self._template = _Template()
        self._has_learnt = False
        self._pool = ThreadPoolExecutor(len(slots), thread_name_prefix="rightbatch-trial")

    def submit(self, function: Callable[[P], R], params: P) -> "Future[R]":
        """Run a function in a process of its own, as soon as a slot is free."""
        return self._pool.submit(self._run, packed(function, params))

    def close(self) -> None:
        """Kill what still runs, and the template."""
        with self._lock:
            self._is_closed = True
            for ours in self._live:
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._template.close()

    def _run(self, work: bytes) -> Any:  # whatever the function returns
        slot = self._free.get()
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                if self._is_closed:
                    raise WorkerKilledError("the executor was closed before the trial began.")
                self._live.add(ours)
                self._template.hand_over(theirs)
            return _converse(ours, cloudpickle.dumps(slot), work, self._learn)
        finally:
            with self._lock:
                self._live.discard(ours)
            ours.close()
            self._free.put(slot)

    def _learn(self, modules: tuple[str, ...]) -> None:
        """Let the template import these modules; once, and without them again if it could not be forked any more."""
        with self._lock:
            if self._has_learnt or self._is_closed or not modules:
                return
            self._has_learnt = True
            if not self._template.learn(modules):
                self._template.close()
                self._template = _Template()


class _Template:
    """The process from which those of trials are forked; started again when it was killed.

    Raises:
        IsolationError: It cannot be started.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        try:
            self._process, self._connection = spawned(_TEMPLATE_PROGRAM, os.environ)
            self._connection.send_bytes(place_of_this_process())
        except OSError as error:
            reason = error.strerror or error
            raise IsolationError(f"a process for trials must be startable; got: {reason}; free some processes or memory.") from error

    def learn(self, modules: tuple[str, ...]) -> bool:
        """Let it import modules; return whether it may still be forked then."""
        try:
            self._send(IMPORT)
            self._connection.send_bytes(cloudpickle.dumps(modules))
            return bool(cloudpickle.loads(self._connection.recv_bytes()))
        except (OSError, EOFError):
            return False

    def hand_over(self, theirs: socket.socket) -> None:
        """Let it fork a process that answers on this socket."""
        try:
            self._send(FORK, theirs)
        except OSError:
            self.close()
            self._start()
            self._send(FORK, theirs)

    def _send(self, asked: bytes, *sockets: socket.socket) -> None:
        with socket.socket(fileno=os.dup(self._connection.fileno())) as channel:
            if sockets:
                socket.send_fds(channel, [asked], [own.fileno() for own in sockets])
            else:
                channel.sendall(asked)

    def close(self) -> None:
        """End it; the processes that it forked go on."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _converse(
    ours: socket.socket, slot: bytes, work: bytes, learn: Callable[[tuple[str, ...]], None]
) -> Any:  # whatever the function returns
    """Send the work and wait for the answer.

    Raises:
        WorkerKilledError: The process was killed.
        UserCodeError: Compiled code crashed, or what the function raised.
        IsolationError: The process ended by itself without an answer.
    """
    connection = Connection(os.dup(ours.fileno()))
    code: int | None = None
    with connection:
        with contextlib.suppress(OSError):
            connection.send_bytes(slot)
            connection.send_bytes(work)
        try:
            while True:
                kind, value = cloudpickle.loads(connection.recv_bytes())
                if kind == "imported":
                    learn(value)
                elif kind == "value":
                    return value
                elif kind == "error":
                    raise value
                else:
                    code = value
                    break
        except (EOFError, OSError):
            pass
    raise _ending(code)


def _ending(code: int | None) -> RightbatchError:
    """What it means that a process ended without an answer, by its exit status; none when even that is unknown."""
    if code is None or (code < 0 and -code not in CRASHES):
        name = "a signal" if code is None else signal.Signals(-code).name
        return WorkerKilledError(f"its process was killed ({name}); the kernel does that when memory runs out")
    if code < 0:
        return UserCodeError(
            f"compiled code that the workload calls must not crash; it ended the trial's process with {signal.Signals(-code).name}; "
            "where it was is shown above."
        )
    return IsolationError(f"the process of a trial must answer; it exited with status {code}; its last words are above.")
