"""Whose a folder is: every kind of ours takes over its own, and what was cut off, and nobody else's."""

import pytest

from rightbatch.errors import RunFolderError
from rightbatch.records.run import RunFolder
from rightbatch.records.sweep_folder import SweepFolder
from rightbatch.records.training_run import TrainingFolder

KINDS = {"a run": RunFolder, "a sweep": SweepFolder, "a training": TrainingFolder}


@pytest.mark.parametrize("whose", KINDS)
def test_a_folder_that_holds_a_lock_and_unfinished_writes_only_is_taken(tmp_path, whose):
    for name in (".lock", ".sweep.json.0a1b2c3d.tmp", ".checkpoint.0a1b2c3d.tmp"):
        (tmp_path / name).touch()

    assert KINDS[whose].create(tmp_path).path == tmp_path


@pytest.mark.parametrize("whose", KINDS)
@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "draft.tmp"])
def test_a_folder_with_a_file_of_somebody_else_is_refused(tmp_path, whose, name):
    (tmp_path / name).touch()

    with pytest.raises(RunFolderError, match=f"the folder of {whose} must be empty or {whose}'s; .* holds .*; pass another --out"):
        KINDS[whose].create(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_training_keeps_what_the_user_adds_to_its_folder_and_a_sweep_refuses_it(tmp_path):
    for name in ("training.json", "sweep.json", "notes.txt"):
        (tmp_path / name).touch()

    assert TrainingFolder.create(tmp_path).path == tmp_path
    with pytest.raises(RunFolderError, match=r"holds notes\.txt"):
        SweepFolder.create(tmp_path)
