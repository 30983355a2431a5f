"""Where trials run: anything that takes a function and its parameters and gives a future."""

import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, TypeVar

from rightbatch.errors import ClusterError, UsageError

P = TypeVar("P")
R = TypeVar("R")

_WHERE = re.compile(r"([a-z]+)(?::(.+))?")
HOMES = {
    "local": "rightbatch.sweeps.executors.local",
    "ray": "rightbatch.sweeps.executors.ray",
    "slurm": "rightbatch.sweeps.executors.slurm",
}
"""The module of each executor, with a function ``open_executor(setting)``."""
_NEEDS = {"ray": "ray", "slurm": "submitit"}
"""What must be installed for it; the extra has its name."""


class Executor(Protocol):
    """Runs functions in other processes, several at once."""

    @property
    def slots(self) -> int:
        """How many run at once."""

    @property
    def threads(self) -> int | None:
        """Threads that a trial should compute with; none leaves it to torch."""

    @property
    def device(self) -> str | None:
        """Device of a trial as its own process names it; none leaves it as the user named it."""

    def submit(self, function: Callable[[P], R], params: P) -> "Future[R]":
        """Run a function in a process of its own.

        The future raises what the function raised; ``WorkerKilledError`` when its process was killed, ``ClusterError`` when it was lost.

        Args:
            function: Of a module, or anything that cloudpickle takes.
            params: Its only argument.
        """

    def close(self) -> None:
        """End everything that still runs, without waiting for it."""


@dataclass(frozen=True, kw_only=True)
class ExecutorSetting:
    """What an executor needs to know.

    Attributes:
        address: What follows the colon of ``--on``; empty when nothing does.
        jobs: Trials at once; none lets the executor choose.
        device: Device of a trial, as the user named it.
    """

    address: str = ""
    jobs: int | None = None
    device: str = "auto"


def parse_where(where: str) -> tuple[str, str]:
    """Read ``local``, ``ray``, ``ray:ADDRESS``, ``slurm`` or ``slurm:PARTITION``; return the name and what follows the colon.

    Raises:
        UsageError: It is none of these.
        ClusterError: What it needs is not installed.
    """
    match = _WHERE.fullmatch(where.strip())
    if match is None or match[1] not in HOMES or (match[1] == "local" and match[2]):
        raise UsageError(f"--on must be local, ray, ray:ADDRESS, slurm or slurm:PARTITION; got {where!r}.")
    name, needed = match[1], _NEEDS.get(match[1])
    if needed is not None and find_spec(needed) is None:
        raise ClusterError(
            f"--on {name} needs {needed}, which is not installed here; run: pip install 'rightbatch[{name}]'; or use --on local."
        )
    return name, match[2] or ""


def open_executor(where: str, *, jobs: int | None, device: str) -> Executor:
    """Return the executor of ``--on``.

    Raises:
        UsageError: There is none of this name.
        ClusterError: It cannot be reached.
    """
    name, address = parse_where(where)
    opened: Executor = import_module(HOMES[name]).open_executor(ExecutorSetting(address=address, jobs=jobs, device=device))
    return opened


def packed(function: Callable[[P], R], params: P) -> bytes:
    """Return a function and its argument as they are sent to another process.

    Raises:
        UsageError: They cannot be pickled.
    """
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps((function, params)))
    except Exception as error:
        raise UsageError(
            f"the workload must be picklable to be trained in other processes; got {type(error).__name__}: {error}; "
            "make locks, open files and connections where they are first used, or give it as 'FILE.py:FUNCTION'."
        ) from error
