"""SIGINT and SIGTERM end a training after its current step; a second one ends the process at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_HEEDED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Within, notes the first signal to stop. Outside the main thread signals stay as they are.

    Attributes:
        received: Name of the signal; none so far.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _HEEDED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._put_back()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            return
        self._put_back()
        os.kill(os.getpid(), number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def outlive_first_signal(_worker: int) -> None:
    """Let a worker of a data loader end at the second signal of a kind, as the training itself: its present step still needs the samples.

    Terminals, cluster schedulers and ``torchrun`` send a signal to the whole process group.

    Args:
        _worker: Number of the worker, as ``worker_init_fn`` is told.
    """
    for number in _HEEDED:
        signal.signal(number, _end_at_the_next)


def _end_at_the_next(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
