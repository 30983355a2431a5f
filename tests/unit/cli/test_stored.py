"""show and report read a run folder and judge it again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import findings_samples
from planted_sweeps import settings_of
from rightbatch.cli import main
from rightbatch.records.measurements import LoaderMeasurements, LoaderPoint
from rightbatch.records.plan import Constraints, Goal, Objective
from rightbatch.records.run import RunFolder, RunManifest
from rightbatch.records.sweep import SweepManifest
from rightbatch.records.sweep_folder import SweepFolder

LOADER = LoaderMeasurements(points=(LoaderPoint(num_workers=0, batch_size=8, samples_per_s=(100.0,)),), configured_num_workers=None)


@pytest.fixture
def run(tuner) -> RunFolder:
    folder = RunFolder.create(Path("runs/one"))
    manifest = RunManifest(
        rightbatch_version="0.1.0",
        created_at="2026-01-02T03:04:05+00:00",
        updated_at="2026-01-02T03:04:05+00:00",
        command=(),
        workload_spec="train.py:workload",
        workload_arguments=(),
        environment=findings_samples.environment(),
        code_files=(),
        state="complete",
        objective=Objective(goal=Goal.SAMPLES, tolerance=0.1),
        constraints=Constraints(max_global_batch_size=99),
    )
    folder.write_manifest(manifest)
    folder.write_part("workload", findings_samples.workload(), fingerprint="", measured_at="2026-01-02T03:04:05+00:00")
    folder.write_part("loader", LOADER, fingerprint="", measured_at="2026-01-02T03:04:06+00:00")
    return folder


def test_show_judges_by_the_runs_own_question(run, tuner, capsys) -> None:
    run.write_findings(findings_samples.good().model_copy(update={"duration_s": 61.5, "reused_parts": ("memory",)}))
    assert main(["show", "runs/one"]) == 0
    assert capsys.readouterr().out == "batch 512, width 80\nwhy\n"
    judged = tuner.judged
    assert judged["measurements"].loader == LOADER
    assert judged["environment"] == findings_samples.environment()
    assert (judged["objective"], judged["constraints"]) == (
        Objective(goal=Goal.SAMPLES, tolerance=0.1),
        Constraints(max_global_batch_size=99),
    )
    assert (judged["measured_at"], judged["duration_s"], judged["reused_parts"]) == ("2026-01-02T03:04:06+00:00", 61.5, ("memory",))


def test_show_judges_by_another_goal(run, tuner, capsys) -> None:
    assert main(["show", "runs/one", "--goal", "accuracy", "--json"]) == 0
    assert tuner.judged["objective"] == Objective(goal=Goal.ACCURACY, tolerance=0.1)
    assert json.loads(capsys.readouterr().out) == tuner.findings.model_dump(mode="json")


def test_show_and_report_need_no_torch(run) -> None:
    code = "import sys; sys.modules['torch'] = None; from rightbatch.cli import main; sys.exit(main(sys.argv[1:]))"
    for words, expected in ((("show", "runs/one", "--json"), '"recommendation"'), (("report", "runs/one"), "runs/one/report.html")):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_folder_of_runs_names_the_latest_of_them(run, capsys, command: str) -> None:
    older = RunFolder.create(Path("runs/older"))
    older.write_manifest(run.read_manifest())
    os.utime("runs/older", (1, 1))

    assert main([command, "runs"]) == 2
    assert (
        capsys.readouterr().err == "rightbatch: a run is one folder; runs holds several; give one of them, such as the latest, runs/one.\n"
    )


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_forgotten_folder_is_answered_with_the_latest_one(run, capsys, command: str) -> None:
    Path("runs").rename("rightbatch-runs")

    assert main([command]) == 2
    assert capsys.readouterr().err.endswith("give one of them, such as the latest, rightbatch-runs/one.\n")


def test_the_report_goes_where_out_says_too(run, capsys) -> None:
    assert main(["report", "runs/one", "--out", "page.html"]) == 0
    assert Path("page.html").read_text() == "<!doctype html>"


def test_a_sweep_without_a_result_names_the_command_that_goes_on(tuner, capsys) -> None:
    SweepFolder.create(Path("swept")).write_manifest(
        SweepManifest(
            rightbatch_version="0.1.0",
            created_at="2026-01-02T03:04:05+00:00",
            updated_at="2026-01-02T03:04:05+00:00",
            command=("rightbatch", "sweep", "train.py:workload", "--target", "accuracy>=0.9"),
            workload_spec="train.py:workload",
            workload=findings_samples.workload(),
            settings=settings_of(),
            asked="",
            device="cpu",
            device_name="a processor",
            versions=(),
        )
    )

    assert main(["show", "swept"]) == 2
    assert capsys.readouterr().err.endswith(
        "repeat the command that began it: rightbatch sweep train.py:workload --target 'accuracy>=0.9'\n"
    )


def test_show_leaves_the_folder_as_it_was(run) -> None:
    before = {file.name: file.read_bytes() for file in run.path.iterdir()}
    assert main(["show", "runs/one"]) == 0
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == before


def test_run_without_measurements_is_said(run, capsys) -> None:
    (run.path / "loader.json").unlink()
    assert main(["show", "runs/one"]) == 2
    assert (
        capsys.readouterr().err
        == "rightbatch: runs/one holds no measurements yet; run the command that made it again, or delete the folder.\n"
    )


def test_corrupt_run_is_said(run, capsys) -> None:
    (run.path / "loader.json").write_text("{")
    assert main(["show", "runs/one"]) == 2
    assert capsys.readouterr().err.startswith("rightbatch: runs/one/loader.json is not a rightbatch record: ")


def test_report_is_written_into_the_run_folder(run, capsys) -> None:
    assert main(["report", "runs/one", "runs/one"]) == 0
    assert capsys.readouterr().out == "runs/one/report.html\nruns/one/report.html\n"
    assert Path("runs/one/report.html").read_text() == "<!doctype html>"


def test_report_is_written_where_it_is_wanted(run, capsys) -> None:
    assert main(["report", "runs/one", "-o", "page.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "reports": ["page.html"]}
    assert Path("page.html").read_text() == "<!doctype html>"


def test_report_that_cannot_be_written_is_said(run, capsys) -> None:
    assert main(["report", "runs/one", "-o", "train.py/page.html"]) == 2
    assert capsys.readouterr().err.startswith("rightbatch: cannot write train.py/page.html: Not a directory")
