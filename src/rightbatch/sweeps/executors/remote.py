"""What a job on another machine does: it runs a function there, in a process that has run none before. All that travels is bytes."""

import os
from functools import cache
from typing import Any, Literal

import cloudpickle

from rightbatch.errors import RightbatchError
from rightbatch.sweeps.executors.local import LocalExecutor

Outcome = tuple[Literal["value", "error"], bytes]
"""What a function returned, or one of our errors that it came to; pickled."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def run_in_this_process(work: bytes) -> Outcome:
    """Run a pickled function with its pickled argument, in a process that was started for it.

    Args:
        work: A pair of both, by cloudpickle.

    Returns:
        Whether it returned or raised, and what.
    """
    from rightbatch.engine.in_process import users_errors

    try:
        with users_errors():
            return "value", _run_pickled(work)
    except RightbatchError as error:
        return "error", cloudpickle.dumps(error)


def run_there(work: bytes) -> Outcome:
    """Run a pickled function as the local executor does, in a process forked for it: for workers that are given one trial after another.

    Args:
        work: A pair of the function and its argument, by cloudpickle.

    Returns:
        Whether it returned or raised, or how its process ended.
    """
    executor = _executor(os.environ.get(_VISIBLE))
    try:
        return "value", executor.submit(_run_pickled, work).result()
    except RightbatchError as error:
        return "error", cloudpickle.dumps(error)


def opened(outcome: Outcome) -> Any:  # whatever the function returned
    """Return what the function returned, or raise what it raised."""
    kind, content = outcome
    value = cloudpickle.loads(content)
    if kind == "error":
        raise value
    return value


@cache
def _executor(visible_gpus: str | None) -> LocalExecutor:
    """The executor of this process for the GPUs that it was lent."""
    return LocalExecutor([{} if visible_gpus is None else {_VISIBLE: visible_gpus}])


def _run_pickled(work: bytes) -> bytes:
    function, params = cloudpickle.loads(work)
    result: bytes = cloudpickle.dumps(function(params))
    return result
