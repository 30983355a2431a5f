"""``rb.find`` in a program or a notebook: interrupted, gone on with, and shown meanwhile."""

import io
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import rightbatch as rb
from cases import vectors
from rightbatch.errors import InterruptedRunError, UsageError
from rightbatch.tuner.measuring import Measuring


def made(size: int = 300) -> rb.Workload:
    return rb.Workload(model=lambda: nn.Linear(6, 3), train=vectors(size), loss=functional.cross_entropy, num_workers=0, lr_batch_size=16,
                       optimizer=lambda params: torch.optim.SGD(params, lr=0.1))  # fmt: skip


def found(workload: rb.Workload, **options: object) -> rb.FoundPlan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rb.RightbatchWarning)  # that the machine is busy is no concern of these tests
        return rb.find(workload, budget="1s", isolation="in-process", **options)


def interrupt_at_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Measuring, "gradient_noise", interrupted)


def test_an_interrupted_find_goes_on_with_what_was_measured(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_the_noise(patch)
        with pytest.raises(InterruptedRunError, match=r"measured so far: memory, step time, loader; go on with resume=True\."):
            found(made(), out=tmp_path / "run")

    plan = found(made(), out=tmp_path / "run", resume=True)

    assert plan.findings.reused_parts == ("memory", "step_time", "loader")


def test_an_interrupted_find_without_a_folder_says_that_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at_the_noise(monkeypatch)

    with pytest.raises(InterruptedRunError, match=r"loader; nothing was kept, because out was not given\."):
        found(made())


def test_another_workload_is_not_mixed_with_what_was_measured(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_the_noise(patch)
        with pytest.raises(InterruptedRunError):
            found(made(), out=tmp_path / "run")

    with pytest.raises(UsageError, match=r"holds parts of Linear \(21 parameters, 300 training samples, SGD at 0.1.*200 training samples"):
        found(made(200), out=tmp_path / "run", resume=True)


def test_going_on_needs_a_folder() -> None:
    with pytest.raises(UsageError, match="needs its folder; got none; say which with out"):
        rb.find(made(), resume=True)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_what_is_measured_unless_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch, *, quiet: bool) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    found(made(), quiet=quiet)

    assert ("gradient noise" in terminal.getvalue()) is not quiet


def test_a_pipe_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found(made())

    assert capsys.readouterr() == ("", "")
