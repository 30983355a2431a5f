"""Several ranks of one program on this machine: as ``torchrun`` starts them, or the same from a process that has imported torch already."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

LAUNCHERS_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
LONGEST_S = 150
"""Only a hang takes longer, even on a machine with much else to do."""
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch._dynamo", "torch.nn.parallel"])  # what an optimizer and the wrapper of ranks import, too


@dataclass(frozen=True)
class Ended:
    """How all ranks together ended.

    Attributes:
        code: Zero when every rank succeeded.
        err: What they wrote to stderr.
    """

    code: int
    err: str


Launch = Callable[..., Ended]
"""Runs a file of a folder, with words, on ``count`` ranks."""


def torchrun(folder: Path, program: str, *words: str, count: int = 2) -> Ended:
    """Let torch's own launcher start the ranks; ``torchrun`` is the same module."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), program, *words]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_VARIABLES} | _variables()
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            _, err = launcher.communicate(timeout=LONGEST_S)
        finally:
            launcher.terminate()  # ends its ranks; killed, it would leave them behind
    return Ended(launcher.returncode, err)


def forked(folder: Path, program: str, *words: str, count: int = 2) -> Ended:
    """Give forked processes the variables that ``torchrun`` sets, and a store to meet at that outlives them, as its own does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [_forks.Process(target=_be_rank, args=(rank, count, store.port, folder, program, words)) for rank in range(count)]
    try:
        for rank in ranks:
            rank.start()
        end_s = time.monotonic() + LONGEST_S
        for rank in ranks:
            rank.join(end_s - time.monotonic())
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    codes = [rank.exitcode or 0 for rank in ranks]
    return Ended(next((code for code in codes if code), 0), "".join(_err_of(folder, rank).read_text() for rank in range(count)))


def _variables() -> dict[str, str]:
    tests = str(Path(__file__).parent)
    return {"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}


def _err_of(folder: Path, rank: int) -> Path:
    return folder / f"stderr-{rank}"


def _be_rank(rank: int, count: int, port: int, folder: Path, program: str, words: tuple[str, ...]) -> None:
    """Run the program as one rank."""
    os.chdir(folder)
    with _err_of(folder, rank).open("w") as err:
        os.dup2(err.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    meeting = {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in (place | meeting | _variables()).items()})
    sys.argv = [program, *words]
    sys.path.insert(0, str(folder))
    runpy.run_path(program, run_name="__main__")
