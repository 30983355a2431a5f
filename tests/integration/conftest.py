"""A folder with a user's code in it, and the command line run on it as a user would."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rightbatch.cli import main

TRAIN = '''
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import rightbatch as rb


def data(size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 8, generator=generator)
    return TensorDataset(x, (x[:, 0] + 0.5 * torch.randn(size, generator=generator) > 0).long())


def net(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def made(size=600, **ingredients):
    given = dict(model=net, train=data(size), loss=F.cross_entropy, optimizer=sgd, lr_batch_size=64, num_workers=0)
    return rb.Workload(**given | ingredients)


def workload(width: int = 16):
    """Two layers on noise."""
    return made(model=lambda: net(width))
'''


@dataclass(frozen=True)
class Ended:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        """Lines of stderr that are ours and no progress."""
        return [line for line in self.err.splitlines() if line.startswith("rightbatch: ")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that holds ``train.py``; what it puts into this process is taken out again."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RIGHTBATCH_")]:
        monkeypatch.delenv(name)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def here(project: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command in this process."""

    def run(*words: str) -> Ended:
        capfd.readouterr()
        code = main(words)
        return Ended(code, *capfd.readouterr())

    return run


def started(*words: str, cwd: Path, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    """Start a command in a process and a process group of its own."""
    command = [sys.executable, "-m", "rightbatch", *words]
    return subprocess.Popen(command, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start commands that end with the test."""
    with contextlib.ExitStack() as stack:

        def run(*words: str) -> "subprocess.Popen[str]":
            process = stack.enter_context(started(*words, cwd=project))
            stack.callback(process.kill)
            return process

        yield run


def read_until(process: "subprocess.Popen[str]", beginning: str) -> str:
    """Read stderr up to and with the line that begins so; without sleeping, and without a limit but the test's own."""
    read = ""
    for line in process.stderr:
        read += line
        if line.startswith(beginning):
            return read
    raise AssertionError(f"the process ended before it said {beginning!r}:\n{read}")
