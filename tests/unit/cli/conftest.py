"""A command line whose tuner, judge and renderers are stand-ins, so that only the command line itself is tested."""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import findings_samples
from rightbatch.records.plan import Findings
from rightbatch.tuner.request import Request
from rightbatch.workload.source import WorkloadSource


@dataclass
class FakeTuner:
    """Answers every request with stored findings, or does what a test wants."""

    findings: Findings = field(default_factory=findings_samples.good)
    folder: Path | None = None
    action: Callable[[], None] = lambda: None
    source: WorkloadSource | None = None
    request: Request | None = None
    command: tuple[str, ...] = ()
    judged: dict = field(default_factory=dict)

    def find(self, source, request, progress, *, command=()):
        self.source, self.request, self.command = source, request, command
        progress.update("memory", 0.25, "trying 128")
        self.action()
        return types.SimpleNamespace(findings=self.findings, folder=self.folder)

    def judge(self, measurements, **arguments):
        self.judged = {"measurements": measurements, **arguments}
        return self.findings


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTuner:
    fake = FakeTuner()
    stand_in(monkeypatch, "rightbatch.tuner.find", find=fake.find)
    stand_in(monkeypatch, "rightbatch.recommend", judge=fake.judge)
    stand_in(monkeypatch, "rightbatch.report.text", render_text=lambda findings, *, width, colour, now: f"batch 512, width {width}\nwhy\n")
    stand_in(monkeypatch, "rightbatch.report.html", render_html=lambda findings: "<!doctype html>")
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("def workload(width: int = 3):\n    '''My CNN.'''\n")
    for name in ("RIGHTBATCH_DEBUG", "RIGHTBATCH_JSON", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return fake
