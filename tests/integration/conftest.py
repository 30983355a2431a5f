"""A folder with a user's code in it, and the command line run on it as a user would."""

import contextlib
import os
import shutil
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


QUICK = ("--isolation", "in-process", "--budget", "2s", "--quiet", "--out", "run")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that holds ``train.py``; what it puts into this process is taken out again."""
    for name in [name for name in os.environ if name.startswith("RIGHTBATCH_")]:
        monkeypatch.delenv(name)
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    with _imports_forgotten(tmp_path):
        yield tmp_path


@contextlib.contextmanager
def _imports_forgotten(folder: Path) -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def measured_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Measure the project with a command, once for all tests; return where it lies, which its records remember, and a copy of it."""
    known: dict[str, tuple[Path, Path]] = {}

    def measured(command: str) -> tuple[Path, Path]:
        if command not in known:
            folder, copy = tmp_path_factory.mktemp(command), tmp_path_factory.mktemp("copies") / command
            (folder / "train.py").write_text(TRAIN)
            with contextlib.chdir(folder), _imports_forgotten(folder):
                assert main((command, "train.py:workload", *QUICK)) in {0, 5}
            known[command] = folder, shutil.copytree(folder, copy)
        return known[command]

    return measured


@pytest.fixture
def measured(project: Path, measured_once, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Go to a project as a command left it, in its folder ``run``: what one test does there, no other sees."""
    with contextlib.ExitStack() as stack:

        def go(command: str) -> Path:
            folder, copy = measured_once(command)
            shutil.rmtree(folder)
            shutil.copytree(copy, folder)
            monkeypatch.chdir(folder)
            stack.enter_context(_imports_forgotten(folder))
            return folder

        yield go


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
    return subprocess.Popen(
        command,
        cwd=cwd,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


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
