"""What runs in the template process: it forks a fresh process for every trial. It imports once for all, and computes nothing itself."""

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import NoReturn

import cloudpickle
import torch

import rightbatch.sweeps.trial  # noqa: F401  # imported once, for all trials
from rightbatch.engine.child import end_with_the_parent, volunteer_for_the_oom_killer
from rightbatch.engine.in_process import users_errors
from rightbatch.errors import RightbatchError
from rightbatch.sweeps.executors.local import IMPORT

_DEEPEST = 2
"""Dots and one of the names of modules that are told: packages import what lies below themselves."""


def serve(connection: Connection) -> NoReturn:
    """Do what the parent asks for, until it hangs up."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    gc.collect()
    gc.freeze()  # what is imported stays shared between all processes
    with socket.socket(fileno=os.dup(connection.fileno())) as channel:
        while True:
            asked, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
            if not asked:
                os._exit(0)
            if asked == IMPORT:
                connection.send_bytes(cloudpickle.dumps(_import_all(cloudpickle.loads(connection.recv_bytes()))))
                continue
            if os.fork() == 0:
                channel.close()
                connection.close()
                _keep(descriptors[0])
            os.close(descriptors[0])


def _import_all(modules: Iterable[str]) -> bool:
    """Import installed packages; return whether this process may still be forked: no thread was started, no GPU touched."""
    for name in modules:
        with contextlib.suppress(Exception):  # whatever a package raises, the trial that needs it will meet again
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    return len(os.listdir("/proc/self/task")) == 1 and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # noqa: PTH208


def _imported_since(before: frozenset[str]) -> tuple[str, ...]:
    """Names of installed modules that were imported since, none of the user's own among them."""
    found = []
    for name, module in tuple(sys.modules.items()):
        place = getattr(module, "__file__", None) or ""
        if name not in before and name.count(".") < _DEEPEST and ("site-packages" in place or "dist-packages" in place):
            found.append(name)
    return tuple(found)


def _keep(descriptor: int) -> NoReturn:
    """Fork the process of the trial, wait for it, say how it ended, and end what it may have left running."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker = os.fork()
    if worker == 0:
        _work(Connection(descriptor))
    _, status = os.waitpid(worker, 0)
    with contextlib.suppress(OSError):
        Connection(descriptor).send_bytes(cloudpickle.dumps(("ended", os.waitstatus_to_exitcode(status))))
    os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _work(connection: Connection) -> NoReturn:
    """Receive variables, a function and its argument; answer with what it returns or raises."""
    volunteer_for_the_oom_killer()
    threading.Thread(target=end_with_the_parent, args=(connection.fileno(),), daemon=True).start()
    try:
        os.environ.update(cloudpickle.loads(connection.recv_bytes()))
        work = connection.recv_bytes()
    except EOFError:
        os._exit(0)
    before = frozenset(sys.modules)
    try:
        with users_errors():
            function, params = cloudpickle.loads(work)
            answer = ("value", function(params))
    except RightbatchError as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        answer = ("error", error)
    connection.send_bytes(cloudpickle.dumps(("imported", _imported_since(before))))
    connection.send_bytes(cloudpickle.dumps(answer))
    os._exit(0)
