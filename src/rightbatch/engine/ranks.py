"""The processes that train together: how they come to one answer, and how the failure of one reaches the others.

Everything goes through the key-value store at which the processes met, and nothing through collectives: a rank that waits can look for
the others' failures meanwhile, a wait that is given up leaves nothing pending, and the user's process groups are not touched.
Importing this module does not import torch, and a program that runs alone never does because of it.
"""

import base64
import contextlib
import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rightbatch.errors import RightbatchError
from rightbatch.records.measurements import MemoryLimit

if TYPE_CHECKING:
    from rightbatch.engine.rig import Rig

WAIT_S = 600.0
"""A rank is waited for so long: another may be in a long probe."""
_FAREWELL_S = 30.0
"""After a failure the ranks wait so long for one another: a launcher ends them all as soon as one of them exits, and one that loads its
workload or runs a probe hears of the failure only after it."""
_POLL_S = 0.05
_PIECE_BYTES = 2**20
"""Stores refuse values of more than a few MiB."""
_FAILURE = "failure"
_SHARED_SOURCES = ("MemAvailable", "cgroup")
_RENDEZVOUS_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_meetings = itertools.count()
"""Each meeting of the ranks gets a number, the same on all of them as all run the same program: its keys are its own."""


class RankError(RightbatchError):
    """Another rank failed, or did not come; the message names it, its stage and its reason."""


@runtime_checkable
class Store(Protocol):
    """What is needed of ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def get(self, key: str, /) -> bytes:
        """Read a value that is there."""

    def check(self, keys: list[str], /) -> bool:
        """Return whether all keys are there."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Write unless something else than expected is there."""


@runtime_checkable
class Ranks(Protocol):
    """The processes that train together. All of them call the same methods, with the same stages, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process; 0 decides what is decided once, writes and prints."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def local_world_size(self) -> int:
        """Processes on this machine; they share its processors and, where they train on the CPU, its memory."""

    def agree_min(self, value: int, *, stage: str) -> int:
        """Return the smallest of all ranks' values, on every rank.

        Raises:
            RankError: Another rank failed, is elsewhere, or does not come in time.
        """

    def share_text(self, produce: Callable[[], str], *, stage: str) -> str:
        """Return on every rank what ``produce`` returned on rank 0, the only one that calls it.

        Raises:
            RankError: Another rank failed, is elsewhere, or does not come in time.
        """

    def fail(self, reason: str) -> None:
        """Tell the other ranks that this one gives up; each raises a ``RankError`` at its next call, or in the one it waits in."""

    def close(self) -> None:
        """Leave. The rank that holds the store leaves last."""


class SingleRank:
    """A process on its own: agrees with itself."""

    rank = 0
    world_size = 1
    local_world_size = 1

    def agree_min(self, value: int, *, stage: str) -> int:  # noqa: ARG002  # nobody else to tell where this one is
        """Return the value."""
        return value

    def share_text(self, produce: Callable[[], str], *, stage: str) -> str:  # noqa: ARG002
        """Return what ``produce`` returns."""
        return produce()

    def fail(self, reason: str) -> None:
        """Tell nobody."""

    def close(self) -> None:
        """Leave nobody."""


class TorchRanks:
    """Ranks that meet at a ``torch.distributed`` store.

    Args:
        store: Where the ranks meet; keys of this meeting only.
        rank: Number of this process.
        world_size: Number of processes.
        local_world_size: Processes on this machine.
        wait_s: Longest wait for another rank, in seconds.
        clock_s: Clock of the waits, in seconds.
        pause: Waits so many seconds between two looks at the store.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        local_world_size: int,
        wait_s: float = WAIT_S,
        clock_s: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_world_size = local_world_size
        self._store = store
        self._wait_s = wait_s
        self._clock_s = clock_s
        self._pause = pause
        self._step = 0
        self._stage = "starting"
        self._has_left = False

    def agree_min(self, value: int, *, stage: str) -> int:
        """Return the smallest of all ranks' values, on every rank."""
        step = self._enter(stage)
        self._post(step, {"value": value})
        return min(int(self._entry(step, rank)["value"]) for rank in range(self.world_size))

    def share_text(self, produce: Callable[[], str], *, stage: str) -> str:
        """Return on every rank what ``produce`` returned on rank 0, the only one that calls it."""
        step = self._enter(stage)
        if self.rank != 0:
            pieces = int(self._entry(step, 0)["pieces"])
            packed = b"".join(self._read(f"{step}/piece/{index}") for index in range(pieces))
            return zlib.decompress(base64.b64decode(packed)).decode()
        text = produce()
        packed = base64.b64encode(zlib.compress(text.encode()))
        starts = range(0, len(packed), _PIECE_BYTES)
        for index, start in enumerate(starts):
            self._write(f"{step}/piece/{index}", packed[start : start + _PIECE_BYTES].decode())
        self._post(step, {"pieces": len(starts)})
        return text

    def fail(self, reason: str) -> None:
        """Tell the other ranks, then wait some seconds until they have heard it: a launcher ends them all once one has exited."""
        if self._has_left:
            return
        words = json.dumps({"rank": self.rank, "stage": self._stage, "reason": reason})
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_FAILURE, "", words)
        self._leave(range(self.world_size))

    def close(self) -> None:
        """Leave; rank 0, which may hold the store, waits some seconds until the others have."""
        self._leave(range(self.world_size) if self.rank == 0 else ())

    def _leave(self, waited_for: Sequence[int]) -> None:
        if self._has_left:
            return
        self._has_left = True
        end_s = self._clock_s() + _FAREWELL_S
        with contextlib.suppress(RuntimeError):  # the rank that held the store has gone: nobody is left to wait for
            self._store.set(f"left/{self.rank}", "")
            while not self._store.check([f"left/{rank}" for rank in waited_for]) and self._clock_s() < end_s:
                self._pause(_POLL_S)

    def _enter(self, stage: str) -> int:
        self._stage = stage
        self._step += 1
        self._raise_failure()
        return self._step

    def _post(self, step: int, entry: dict[str, int]) -> None:
        self._write(f"{step}/{self.rank}", json.dumps({"stage": self._stage} | entry))

    def _entry(self, step: int, rank: int) -> dict[str, Any]:
        """Wait for what a rank posted at a step."""
        key = f"{step}/{rank}"
        end_s = self._clock_s() + self._wait_s
        while not self._has(key):
            self._raise_failure()
            if self._clock_s() >= end_s:
                raise RankError(
                    f"every rank must come to the stage {self._stage!r}; rank {rank} did not come to it within {self._wait_s:.0f} s of "
                    f"rank {self.rank}; does it still run, and does its program make the same calls?"
                )
            self._pause(_POLL_S)
        entry: dict[str, Any] = json.loads(self._read(key))
        if entry["stage"] != self._stage:
            raise RankError(
                f"all ranks must do the same; rank {self.rank} is in the stage {self._stage!r} and rank {rank} in {entry['stage']!r}; "
                "give all of them the same workload and options."
            )
        return entry

    def _raise_failure(self) -> None:
        if not self._has(_FAILURE):
            return
        failure = json.loads(self._read(_FAILURE))
        self._leave(range(self.world_size))
        raise RankError(
            f"all ranks must finish; rank {failure['rank']} gave up in the stage {failure['stage']!r}: {failure['reason']} "
            f"Rank {self.rank} stops with it; see the output of rank {failure['rank']}."
        )

    def _has(self, key: str) -> bool:
        with _store_needed():
            return self._store.check([key])

    def _read(self, key: str) -> bytes:
        with _store_needed():
            return self._store.get(key)

    def _write(self, key: str, value: str) -> None:
        with _store_needed():
            self._store.set(key, value)


@contextlib.contextmanager
def _store_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"the store at which the ranks meet must answer; got {(str(error).splitlines() or [''])[0]}; has rank 0 or the launcher ended?"
        ) from error


@contextlib.contextmanager
def failure_told(ranks: Ranks) -> Iterator[None]:
    """Tell the other ranks of whatever is raised within, then leave."""
    try:
        yield
    except BaseException as error:  # an interruption too: the others would wait for what does not come
        ranks.fail(f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}")
        raise
    finally:
        ranks.close()


def is_one_of_many() -> bool:
    """Whether a launcher started this process as one of several, or the program has joined others itself; does not import torch."""
    if _own_distributed() is not None:
        return True
    return all(os.environ.get(name) for name in _RENDEZVOUS_VARIABLES) and _number("WORLD_SIZE") > 1


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal():
        raise RankError(f"{variable} must be a number, as a launcher sets it; got {text!r}; start with torchrun, or unset the variable.")
    return int(text)


def is_lead() -> bool:
    """Whether this process writes and prints: it is alone, or rank 0; does not import torch."""
    dist = _own_distributed()
    return dist.get_rank() == 0 if dist is not None else not is_one_of_many() or os.environ["RANK"] == "0"


def ranks_from_environment(wait_s: float = WAIT_S) -> Ranks:
    """Join the ranks that ``torchrun``, or another launcher that sets the same variables, started; alone without one.

    Where the program has already initialised ``torch.distributed``, its ranks and its store are taken.

    Args:
        wait_s: Longest wait for another rank, in seconds.

    Raises:
        RankError: The ranks cannot be met.
    """
    if not is_one_of_many():
        return SingleRank()
    for name in ("RANK", "MASTER_PORT"):
        _number(name)
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
    from torch.distributed.rendezvous import rendezvous

    with _store_needed():
        if _own_distributed() is not None:
            store, rank, world_size = _get_default_store(), dist.get_rank(), dist.get_world_size()
        else:
            store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=wait_s)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return TorchRanks(
        PrefixStore(f"rightbatch/{attempt}/{next(_meetings)}", store),
        rank=rank,
        world_size=world_size,
        local_world_size=min(world_size, _number("LOCAL_WORLD_SIZE") if os.environ.get("LOCAL_WORLD_SIZE") else 1),
        wait_s=wait_s,
    )


def local_device(name: str) -> str:
    """Return the device of this rank: ``auto`` and ``cuda`` become the GPU of its ``LOCAL_RANK``, any other name stays.

    They stay, too, where this rank sees no such GPU: there is none, or the launcher shows each rank its own.

    Args:
        name: What the user asked for.
    """
    local_rank = os.environ.get("LOCAL_RANK", "")
    if name not in {"auto", "cuda"} or not local_rank.isdigit() or not is_one_of_many():
        return name
    import torch

    return f"cuda:{local_rank}" if int(local_rank) < torch.cuda.device_count() else name


def share_of_limit(limit: MemoryLimit, ranks: Ranks) -> MemoryLimit:
    """Return what of a limit one rank may use: ranks on one machine share its memory, but neither a GPU's nor what the user allows each.

    Args:
        limit: What one process alone might use.
        ranks: The processes that train together.
    """
    if not limit.source.startswith(_SHARED_SOURCES):
        return limit
    return limit.model_copy(update={"limit_bytes": limit.limit_bytes // ranks.local_world_size})


def bucket_bytes(rig: "Rig") -> int:
    """Return the bytes of the gradient buckets that ``DistributedDataParallel`` keeps beside the gradients, by default, on each rank.

    Together the buckets are a copy of every trained parameter's gradient; the first, smaller bucket is one of them.
    """
    return sum(parameter.nbytes for parameter in rig.new_trainee(compiled=False).parameters)


def _own_distributed() -> Any:
    """``torch.distributed`` if the program has joined more than one process with it already."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist
