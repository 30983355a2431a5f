"""Probes in this process, with everything put back; and how an attempt is judged, here as in a child."""

import contextlib
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

import torch

from rightbatch.engine.isolation import Completed, Killed, OutOfMemory
from rightbatch.engine.out_of_memory import is_out_of_memory
from rightbatch.engine.process_state import preserved_process_state, process_state, restore_process_state
from rightbatch.engine.rig import Rig
from rightbatch.errors import RightbatchError, UserCodeError

T = TypeVar("T")
P = ParamSpec("P")

_OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120  # compared with frames' file names


class InProcessHost:
    """Runs probes in this process and leaves it as it was: generators, modes, switches.

    Models are never shared with the user: the rig builds copies.

    Args:
        build: Builds the rig.
        say: Receives progress.
    """

    def __init__(self, build: Callable[[], Rig], say: Callable[[str], None]) -> None:
        with preserved_process_state(), users_errors():
            self._rig = build()
            self._state = process_state()
        self._rig.say = say

    def call(self, probe: Callable[Concatenate[Rig, P], T], *args: P.args, **kwargs: P.kwargs) -> Completed[T] | OutOfMemory | Killed:
        """Run a probe with the threads and switches that building the rig set; running out of memory is an outcome."""
        with preserved_process_state():
            restore_process_state(self._state)
            return attempt(probe, self._rig, args, kwargs)

    def renew(self) -> None:
        """Do nothing: this process cannot be replaced."""

    def close(self) -> None:
        """Drop the rig."""
        gc.collect()


def attempt(probe: Callable[..., T], rig: Rig, args: tuple[object, ...], kwargs: dict[str, object]) -> Completed[T] | OutOfMemory | Killed:
    """Run a probe; turn running out of memory into a value, and any other stranger's error into a ``UserCodeError``."""
    message = ""
    try:
        with users_errors():
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
def users_errors() -> Iterator[None]:
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
