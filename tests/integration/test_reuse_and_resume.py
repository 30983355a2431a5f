"""What a run folder already holds is measured once: reused while it holds, measured again as soon as anything it rests on changed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import rightbatch.recommend
from fakes import FakeDevice, GivenSource, planted_rig, planted_samples, planted_workload
from integration.conftest import QUICK, Ended
from rightbatch.errors import InterruptedRunError
from rightbatch.records.plan import Constraints, Findings, Goal, Objective
from rightbatch.records.run import RunFolder
from rightbatch.tuner.find import find
from rightbatch.tuner.request import Part, Request, SilentProgress

EVERYTHING = ("memory", "step_time", "loader", "gradient_noise")

Run = Callable[..., Ended]
Measured = Callable[[str], Path]

WITHOUT_A_DEVICE = """
import sys
from rightbatch.cli import main
code = main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def elsewhere(*words: str) -> tuple[dict, bool]:
    """Run a command in a fresh process; return its answer and whether it imported torch."""
    result = subprocess.run([sys.executable, "-c", WITHOUT_A_DEVICE, *words, "--json"], capture_output=True, text=True, check=False)
    assert result.returncode in {0, 5}, result.stderr
    return json.loads(result.stdout), result.stderr.splitlines()[-1] == "True"


def test_second_find_answers_from_the_folder_without_torch(measured: Measured) -> None:
    first = json.loads((measured("find") / "run" / "findings.json").read_text())

    second, imported_torch = elsewhere("find", "train.py:workload", *QUICK)

    assert not imported_torch
    assert second == {**first, "reused_parts": list(EVERYTHING), "duration_s": 0.0}


def test_a_check_by_training_is_kept_and_asked_for_once(here: Run, project: Path) -> None:
    words = ("find", "train.py:workload", "--verify", *QUICK)

    first = json.loads(here(*words, "--json").out)
    second, imported_torch = elsewhere(*words)
    unchecked, _ = elsewhere("find", "train.py:workload", *QUICK)

    assert first["branches"]["points"] or first["branches"]["remarks"]
    assert not imported_torch
    assert second["reused_parts"] == [*EVERYTHING, "branches"]
    assert unchecked["branches"] == first["branches"]


def test_that_check_can_fail(measured: Measured) -> None:
    measured("memory")

    _, imported_torch = elsewhere("memory", "train.py:workload", *QUICK, "--seed", "1")

    assert imported_torch


def backdate(folder: Path, age: timedelta) -> None:
    """Make everything in a run folder older than it is."""
    then = (datetime.now(UTC) - age).isoformat(timespec="seconds")
    for file in folder.glob("*.json"):
        file.write_text(re.sub(r'"measured_at": "[^"]*"', f'"measured_at": "{then}"', file.read_text()))


def test_answer_from_the_folder_says_its_age(here: Run, project: Path) -> None:
    fresh = here("memory", "train.py:workload", *QUICK).out
    backdate(project / "run", timedelta(days=3, hours=1))

    repeated, shown = here("memory", "train.py:workload", *QUICK).out, here("show", "run").out

    assert "UTC (just now)" in fresh
    assert "UTC (3 days ago), nothing measured anew" in repeated
    assert re.search(r"reused +memory from an earlier run", repeated)
    assert "UTC (3 days ago)" in shown


CHANGES = {
    "--seed": ("--seed", "1"),
    "--precision": ("--precision", "bf16"),
    "--threads": ("--threads", "1"),
    "--max-batch": ("--max-batch", "32"),
    "--limit": ("--limit", "3GiB"),
    "--fresh": ("--fresh",),
    "an argument": ("--", "--width", "17"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_what_was_measured_measures_again(here: Run, measured: Measured, change: str) -> None:
    measured("memory")
    again = json.loads(here("memory", "train.py:workload", *QUICK, "--json").out)

    changed = json.loads(here("memory", "train.py:workload", *QUICK, "--json", *CHANGES[change]).out)

    assert again["reused_parts"] == ["memory"]
    assert changed["reused_parts"] == []


def test_change_of_the_code_measures_again(here: Run, project: Path) -> None:
    (project / "layers.py").write_text("WIDTH = 16\n")
    code = (project / "train.py").read_text()
    (project / "train.py").write_text(f"import layers\n{code}")
    here("memory", "train.py:workload", *QUICK)

    reused = json.loads(here("memory", "train.py:workload", *QUICK, "--json").out)["reused_parts"]
    (project / "layers.py").write_text("WIDTH = 17\n")
    changed = json.loads(here("memory", "train.py:workload", *QUICK, "--json").out)["reused_parts"]

    assert (reused, changed) == (["memory"], [])


def test_file_of_the_same_name_in_another_folder_is_another_workload(here: Run, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ("--isolation", "in-process", "--budget", "2s", "--quiet", "--json", "--out", str(project / "run"))
    first = json.loads(here("memory", "train.py:workload", *out).out)
    (project / "other").mkdir()
    (project / "other" / "train.py").write_text((project / "train.py").read_text().replace("width: int = 16", "width: int = 160"))
    monkeypatch.chdir(project / "other")

    second = json.loads(here("memory", "train.py:workload", *out).out)

    assert second["reused_parts"] == []
    assert second["workload"]["parameter_count"] > first["workload"]["parameter_count"]


def test_memory_that_was_measured_first_serves_find(here: Run, measured: Measured) -> None:
    folder = measured("memory") / "run"
    kept = (folder / "memory.json").read_bytes()

    found = json.loads(here("find", "train.py:workload", *QUICK, "--json").out)

    assert found["reused_parts"] == ["memory"]
    assert found["noise_scale"] is not None
    assert (folder / "memory.json").read_bytes() == kept


@pytest.mark.parametrize("words", [("--goal", "samples"), ("--max-global-batch", "8"), ("--world-size", "4")])
def test_another_question_is_judged_without_measuring_or_torch(measured: Measured, words: tuple[str, ...]) -> None:
    folder = measured("find") / "run"
    first = json.loads((folder / "findings.json").read_text())
    parts = {name: (folder / f"{name}.json").read_bytes() for name in EVERYTHING}

    second, imported_torch = elsewhere("find", "train.py:workload", *QUICK, *words)

    assert not imported_torch
    assert second["reused_parts"] == list(EVERYTHING)
    assert second["step_time"] == first["step_time"]
    assert (second["recommendation"]["objective"], second["constraints"]) != (first["recommendation"]["objective"], first["constraints"])
    assert {name: (folder / f"{name}.json").read_bytes() for name in EVERYTHING} == parts


def test_show_judges_by_the_question_that_was_asked_last(here: Run, measured: Measured) -> None:
    measured("find")
    asked = json.loads(here("find", "train.py:workload", *QUICK, "--goal", "samples", "--max-global-batch", "8", "--json").out)

    shown = json.loads(here("show", "run", "--json").out)

    assert shown["recommendation"] == asked["recommendation"]
    assert shown["recommendation"]["objective"]["goal"] == "samples"


def test_stale_parts_never_mix_into_what_is_shown(here: Run, measured: Measured) -> None:
    with (measured("find") / "train.py").open("a") as file:
        file.write("\n# changed\n")

    here("memory", "train.py:workload", *QUICK)
    shown = json.loads(here("show", "run", "--json").out)

    assert shown["memory"] is not None
    assert (shown["step_time"], shown["loader"], shown["noise_scale"]) == (None, None, None)
    assert shown["reused_parts"] == []


# The tuner alone, on a device whose laws are known.


@dataclass
class Bench:
    """A planted workload and how often its parts were measured."""

    out: Path
    device: FakeDevice = field(default_factory=lambda: FakeDevice(load_time_s=1e-5))
    stages: list[str] = field(default_factory=list)
    stop_at: str = ""

    def update(self, stage: str, fraction: float, detail: str) -> None:
        if stage not in self.stages:
            self.stages.append(stage)
        if stage == self.stop_at:
            raise KeyboardInterrupt

    def find(self, **changes) -> Findings:
        self.stages.clear()
        workload = planted_workload(self.device, planted_samples(20.0, 600, 0), lr=1e-9, lr_batch_size=64)
        request = Request(isolation="in-process", out=self.out, **{"budget_s": 60.0, **changes})
        return find(
            GivenSource(workload),
            request,
            self,
            command=("again",),
            build_rig=planted_rig(self.device, workload),
            clock_s=self.device.now_s,
        ).findings


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "run")


@pytest.mark.parametrize(("stage", "kept"), [("memory", 0), ("step time", 1), ("data loader", 2), ("gradient noise", 3)])
def test_run_that_was_interrupted_at_a_stage_goes_on_there(bench: Bench, stage: str, kept: int) -> None:
    bench.stop_at = stage
    with pytest.raises(InterruptedRunError, match="measured so far") as interrupted:
        bench.find()
    assert interrupted.value.resume_command == "again"
    assert RunFolder.open(bench.out).read_manifest().state == "interrupted"

    bench.stop_at = ""
    resumed = bench.find()

    assert resumed.reused_parts == EVERYTHING[:kept]
    assert resumed.recommendation.status == "ok"
    assert stage in bench.stages


def test_run_that_ended_before_its_verdict_is_judged_when_repeated(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder then holds every measurement beside the older verdict on the memory alone."""
    bench.find(parts=frozenset({Part.MEMORY}))
    with monkeypatch.context() as patch:
        patch.setattr(rightbatch.recommend, "judge", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bench.find()

    repeated = bench.find()

    assert bench.stages == []
    assert repeated.noise_scale is not None
    assert repeated.recommendation.status == "ok"


def test_larger_budget_measures_again_what_the_smaller_one_left_open(bench: Bench) -> None:
    short = bench.find(budget_s=0.05)
    assert short.recommendation.status == "inconclusive"
    assert bench.find(budget_s=0.05).reused_parts == EVERYTHING

    longer = bench.find(budget_s=60.0)

    assert "gradient_noise" not in longer.reused_parts
    assert longer.recommendation.status == "ok"
    assert bench.find(budget_s=600.0).reused_parts == EVERYTHING


def test_question_without_a_bound_is_not_answered_by_the_one_with_it(bench: Bench) -> None:
    first = bench.find()
    bounded = bench.find(constraints=Constraints(max_global_batch_size=32))

    again = bench.find()

    assert bounded.recommendation.plan.global_batch_size <= 32
    assert bounded.constraints == Constraints(max_global_batch_size=32)
    assert again.recommendation == first.recommendation


def test_changed_code_measures_everything_again(bench: Bench) -> None:
    first = bench.find()
    workload = planted_workload(bench.device, planted_samples(20.0, 600, 0), lr=1e-9, lr_batch_size=64)
    source = GivenSource(workload, unchanged=False)

    again = find(source, Request(isolation="in-process", out=bench.out, budget_s=60.0), SilentProgress(),
                 build_rig=planted_rig(bench.device, workload), clock_s=bench.device.now_s).findings  # fmt: skip

    assert first.reused_parts == again.reused_parts == ()
    assert again.duration_s > 0


def test_same_question_is_answered_without_measuring(bench: Bench) -> None:
    first = bench.find()
    before = bench.device.now

    second = bench.find()

    assert bench.device.now == before
    assert second == first.model_copy(update={"reused_parts": EVERYTHING, "duration_s": 0.0})


def test_folder_keeps_the_question_of_its_last_verdict(bench: Bench) -> None:
    bench.find()

    bench.find(objective=Objective(goal=Goal.SAMPLES), constraints=Constraints(max_global_batch_size=9))

    manifest = RunFolder.open(bench.out).read_manifest()
    assert (manifest.objective.goal, manifest.constraints.max_global_batch_size, manifest.state) == (Goal.SAMPLES, 9, "complete")


def test_nothing_is_written_where_nothing_is_to_be_saved(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    bench.find(save=False)

    assert os.listdir(tmp_path) == []  # noqa: PTH208
