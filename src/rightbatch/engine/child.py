"""What runs in the child process: it builds the rig that the parent sent, and answers the parent's calls."""

import contextlib
import gc
import os
import select
import signal
import threading
from multiprocessing.connection import Connection

import cloudpickle

from rightbatch.engine.in_process import attempt, users_errors
from rightbatch.engine.isolation import Completed
from rightbatch.engine.rig import Rig
from rightbatch.errors import RightbatchError


def serve(connection: Connection) -> None:
    """Build the rig that the parent sent, then run probes until the parent hangs up."""
    volunteer_for_the_oom_killer()
    threading.Thread(target=end_with_the_parent, args=(connection.fileno(),), daemon=True).start()
    rig: Rig | None = None
    while True:
        try:
            payload = connection.recv_bytes()
        except EOFError:
            os._exit(0)
        _settle_garbage()
        try:
            if rig is None:
                with users_errors():
                    rig = cloudpickle.loads(payload)()
                rig.say = lambda line: connection.send_bytes(cloudpickle.dumps(("say", line)))
                outcome: object = Completed(None)
            else:
                probe, args, kwargs = cloudpickle.loads(payload)
                outcome = attempt(probe, rig, args, kwargs)
            answer = ("outcome", outcome)
        except RightbatchError as error:
            error.__traceback__ = error.__cause__ = error.__context__ = None
            answer = ("error", error)
        connection.send_bytes(cloudpickle.dumps(answer))


def _settle_garbage() -> None:
    """Collect once, and take what is left for permanent: probes collect often, and each time all of torch would be walked through.

    Before every call, because torch loads more of itself as it is used.
    """
    gc.collect()
    gc.freeze()


def end_with_the_parent(descriptor: int) -> None:
    """Wait until the other end is closed, then end this process and its own children, even in the middle of a probe."""
    poller = select.poll()
    poller.register(descriptor, 0)  # hanging up is always reported
    poller.poll()
    os.killpg(0, signal.SIGKILL)


def volunteer_for_the_oom_killer() -> None:
    """Make this process the kernel's first choice when memory runs out."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123  # a kernel file, not a path
        score.write("1000")
