"""A saved run is judged and rendered where torch cannot be imported; and what a Python program gets from ``rb.find``."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import rightbatch as rb
from integration.conftest import QUICK
from rightbatch.errors import InconclusiveError, NothingFitsError

BLOCKED = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, NoTorch())
from rightbatch.cli import main
sys.exit(main(sys.argv[1:]))
"""


def blocked(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-W", "error", "-c", BLOCKED, *words], capture_output=True, text=True, check=False)


def test_run_is_shown_judged_again_and_reported_without_torch(measured: Callable[[str], Path]) -> None:
    folder = measured("find")
    findings = json.loads((folder / "run" / "findings.json").read_text())

    shown = blocked("show", "run", "--json")
    judged_again = blocked("show", "run", "--goal", "samples")
    reported = blocked("report", "run", "-o", "page.html")

    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout)["recommendation"] == findings["recommendation"]
    assert (judged_again.returncode, judged_again.stderr) == (0, "")
    assert "The goal is the samples" in judged_again.stdout or "samples to a target" in judged_again.stdout
    assert (reported.returncode, reported.stdout.strip()) == (0, "page.html")
    assert (folder / "page.html").read_text().startswith("<!doctype html>")


def test_ceilings_on_absent_gpus_need_torch_in_the_child_only(project: Path) -> None:
    ended = blocked("memory", "train.py:workload", "--gpu", "t4,10GiB", "--json", "--quiet")

    assert ended.returncode == 0, ended.stderr
    assert [ceiling["gpu"] for ceiling in json.loads(ended.stdout)["forecast"]["ceilings"]] == ["t4", "10GiB"]


def test_measuring_without_torch_fails_so_the_block_works(project: Path) -> None:
    ended = blocked("memory", "train.py:workload", *QUICK)

    assert ended.returncode != 0
    assert "torch is blocked" in ended.stderr


def tiny(**ingredients: object) -> rb.Workload:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    given = {
        "model": lambda: nn.Linear(4, 2),
        "train": TensorDataset(x, (x[:, 0] > 0).long()),
        "loss": functional.cross_entropy,
        "num_workers": 0,
    }
    return rb.Workload(**{**given, **ingredients})


def found(workload: rb.Workload, *, max_batch: int | None = None, out: Path | None = None) -> rb.FoundPlan:
    """Find in this process; that the machine is busy is no concern of the tests'."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rb.RightbatchWarning)
        return rb.find(workload, budget="1s", isolation="in-process", max_batch=max_batch, out=out)


def test_find_returns_a_plan_that_shows_itself(tmp_path: Path) -> None:
    plan = found(tiny(), max_batch=64, out=tmp_path / "run")

    assert isinstance(plan, rb.FoundPlan)
    assert isinstance(plan, rb.BatchPlan)
    assert plan.global_batch_size == plan.micro_batch_size * plan.accumulation_steps * plan.world_size
    assert plan.findings.memory.largest_allowed == 64
    assert str(plan).startswith(f"batch {plan.global_batch_size}")
    assert "just now" in str(plan)
    assert f"{plan.global_batch_size}" in plan._repr_html_()
    assert plan.write_report(tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "run" / "findings.json").is_file()


def test_find_warns_when_the_plan_is_not_sure() -> None:
    with pytest.warns(rb.RightbatchWarning, match=r"recommendation is (inconclusive|unstable); print\(plan\) says why"):
        plan = rb.find(tiny(loss=lambda y, t: functional.cross_entropy(y, t) * float("nan")), budget="1s", isolation="in-process")

    assert plan.findings.noise_scale.status == "non_finite"


def test_find_raises_where_there_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((NothingFitsError, InconclusiveError), match="nothing fits: one sample needs"):
        rb.find(tiny(model=lambda: nn.Sequential(nn.Linear(4, 3000), nn.Linear(3000, 2))), limit="1KiB", budget="1s")


def test_find_leaves_the_process_and_the_model_as_they_were() -> None:
    model = nn.Linear(4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state().clone()

    found(tiny(model=model))

    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
