"""Targets, and the folder of a training."""

import json
from pathlib import Path

import pytest

import training_samples as samples
from rightbatch.errors import RunFolderBusyError, RunFolderError, UsageError
from rightbatch.records.training_log import EvaluationLine, TrainingTarget
from rightbatch.records.training_run import TrainingFolder, resume_command


def evaluation(loss: float | None, metric: float | None) -> EvaluationLine:
    return EvaluationLine(step=1, samples=1, training_s=1, loss=loss, metric=metric, evaluated_samples=1)


@pytest.mark.parametrize(
    ("text", "met", "missed"),
    [
        ("accuracy>=0.97", evaluation(9, 0.97), evaluation(0, 0.9699)),
        (" loss <= 1e-1 ", evaluation(0.1, None), evaluation(0.11, 1)),
        ("accuracy>=0.97", evaluation(9, 1), evaluation(0, None)),
    ],
)
def test_a_target_is_met_or_missed(text: str, met: EvaluationLine, missed: EvaluationLine) -> None:
    target = TrainingTarget.parse(text)

    assert target.is_met_by(met)
    assert not target.is_met_by(missed)


@pytest.mark.parametrize(
    "text", ["", "0.97", "accuracy", "accuracy=0.9", "accuracy<=0.9", "loss>=0.9", "loss<=1.2.3", "a b>=1", "accuracy>=1e999"]
)
def test_another_form_of_target_is_refused_with_the_right_one(text: str) -> None:
    with pytest.raises(UsageError, match=r"write it like 'accuracy>=0\.97', in quotes"):
        TrainingTarget.parse(text)


@pytest.mark.parametrize(
    ("command", "ranks", "wanted"),
    [
        ("rightbatch train a.py:w --epochs 1", 1, "rightbatch train a.py:w --epochs 1 --resume"),
        ("rightbatch train a.py:w --fresh -- --resume", 1, "rightbatch train a.py:w --resume -- --resume"),
        ("rightbatch train a.py:w --resume", 2, "torchrun --nproc-per-node 2 -m rightbatch train a.py:w --resume"),
        ("", 1, ""),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_was_given(command: str, ranks: int, wanted: str) -> None:
    assert resume_command(tuple(command.split()), world_size=ranks) == wanted


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    folder = TrainingFolder.create(tmp_path / "run")
    folder.write_manifest(samples.manifest())

    assert TrainingFolder.open(tmp_path / "run").read_manifest() == samples.manifest()
    assert TrainingFolder.create(tmp_path / "run") == folder


@pytest.mark.parametrize(("name", "kind"), [("run.json", "a run of `rightbatch find`"), ("mine.txt", "something else")])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("{}")

    with pytest.raises(RunFolderError, match=f"holds {kind}; pass another --out"):
        TrainingFolder.create(tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(RunFolderError, match="is a file; pass another --out"):
        TrainingFolder.create(tmp_path / "file")


def test_a_foreign_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"schema_version": 1, "written_by": "else"}))

    with pytest.raises(RunFolderError, match="was not written by rightbatch"):
        TrainingFolder.open(tmp_path).read_manifest()


def test_reading_needs_a_training(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no folder of a training"):
        TrainingFolder.open(tmp_path)


def test_two_trainings_cannot_use_one_folder(tmp_path: Path) -> None:
    folder = TrainingFolder.create(tmp_path / "run")

    with folder.lock(), pytest.raises(RunFolderBusyError, match="another process is using"), TrainingFolder.create(tmp_path / "run").lock():
        pass


def test_a_folder_that_nothing_was_written_into_goes_away(tmp_path: Path) -> None:
    with TrainingFolder.create(tmp_path / "run").lock():
        pass

    assert not (tmp_path / "run").exists()
