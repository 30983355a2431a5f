"""Checkpoints are whole or absent, read without running code, and refused when they are somebody else's."""

import random
import resource
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rightbatch.engine.rig import seed_everything
from rightbatch.errors import RunFolderError, UsageError
from rightbatch.training.checkpoint import has_checkpoint, load_checkpoint, remove_checkpoints, save_checkpoint
from rightbatch.training.generators import generators_state, restore_generators

CPU = torch.device("cpu")


def save(folder: Path, step: int, **state: object) -> Path:
    return save_checkpoint(folder, state or {"weights": torch.full((4,), float(step))}, step=step, fingerprint="a training")


def load(folder: Path):
    return load_checkpoint(folder, fingerprint="a training")


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_was_saved_comes_back_of_the_same_kinds(tmp_path: Path) -> None:
    state = {"list": [1, 2.5, None, True, "x"], "pair": (1, (2, 3)), "counts": Counter([7, 7, 9]), "nested": {3: {"t": torch.arange(5.0)}}}
    save(tmp_path, 12, **state)

    found = load(tmp_path)

    assert found is not None
    assert found.step == 12
    assert found.state["nested"][3]["t"].equal(torch.arange(5.0))
    assert {key: found.state[key] for key in ("list", "pair", "counts")} == {key: state[key] for key in ("list", "pair", "counts")}
    assert isinstance(found.state["counts"], Counter)


def test_the_file_is_read_by_torch_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    file = save(tmp_path, 1, model=model.state_dict())

    state = torch.load(file, weights_only=True)["state"]["model"]

    assert isinstance(state, OrderedDict)
    assert state._metadata == model.state_dict()._metadata
    assert nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).load_state_dict(state)


def test_numbers_of_numpy_become_pythons(tmp_path: Path) -> None:
    save(tmp_path, 1, value=np.float64(0.1), counts={np.int64(3): np.int32(4)})

    found = load(tmp_path)

    assert found is not None
    assert found.state == {"value": 0.1, "counts": {3: 4}}


class Odd:
    """What no checkpoint can hold."""


@pytest.mark.parametrize(
    ("state", "message"),
    [({"scheduler": {"rule": [Odd()]}}, r"state\['scheduler'\]\['rule'\]\[0\] is a Odd"), ({"x": {(1, 2): 3}}, r"one of the type tuple")],
)
def test_what_only_a_pickle_could_hold_is_refused_and_named(tmp_path: Path, state: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save(tmp_path, 1, **state)
    assert names(tmp_path) == []


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    files = [save(tmp_path, step) for step in (1, 2, 30, 4_000_000_000)]

    assert names(tmp_path) == sorted(file.name for file in files[-2:])


def test_checkpoints_of_steps_that_are_repeated_give_way(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    damage(next(tmp_path.glob("checkpoint-000000020-*")))

    again = save(tmp_path, 15)

    found = load(tmp_path)
    assert found is not None
    assert (found.file, found.passed_over) == (again, ())


def test_a_changed_byte_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))

    found = load(tmp_path)

    assert found is not None
    assert found.step == 1
    assert found.passed_over == (f"{names(tmp_path)[-1]} is damaged: its content is not what was written",)


def test_a_file_cut_short_falls_back_too(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    newest.write_bytes(newest.read_bytes()[:100])

    found = load(tmp_path)

    assert found is not None
    assert found.step == 1


def test_without_a_whole_one_it_says_so(tmp_path: Path) -> None:
    damage(save(tmp_path, 1))

    with pytest.raises(RunFolderError, match=r"no checkpoint in .* can be read: checkpoint-000000001-\w+.pt is damaged"):
        load(tmp_path)


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    assert not has_checkpoint(tmp_path)


def test_what_was_left_half_written_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".checkpoint.0123abcd.tmp"
    left.write_bytes(b"half")
    assert load(tmp_path) is None

    save(tmp_path, 1)

    assert not left.exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)

    with pytest.raises(UsageError, match="of another workload, plan, schedule, seed, precision or number of ranks"):
        load_checkpoint(tmp_path, fingerprint="another training")


def renamed_by_digest(folder: Path, content: object) -> Path:
    """A file that only its content tells from a checkpoint."""
    import hashlib

    torch.save(content, folder / "x")
    digest = hashlib.sha256((folder / "x").read_bytes()).hexdigest()[:16]
    return (folder / "x").rename(folder / f"checkpoint-000000001-{digest}.pt")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"model": Odd()}])
def test_a_foreign_file_is_refused_without_running_it(tmp_path: Path, content: object) -> None:
    renamed_by_digest(tmp_path, content)

    with pytest.raises(RunFolderError, match="is no checkpoint of rightbatch"):
        load(tmp_path)


def test_a_file_that_is_named_like_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-last.pt").touch()

    with pytest.raises(RunFolderError, match=r"holds checkpoint-last.pt, which rightbatch did not write"):
        load(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    renamed_by_digest(tmp_path, {"written_by": "rightbatch", "schema_version": 99, "fingerprint": "a training", "step": 1, "state": {}})

    with pytest.raises(RunFolderError, match="version 99 of checkpoints; this rightbatch reads 1"):
        load(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunFolderError, match=r"cannot write a checkpoint into .*: File too large; make room"):
            save(tmp_path, 2, weights=torch.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    found = load(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(names(tmp_path)) == 1


def test_starting_anew_removes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "mine.txt").touch()

    remove_checkpoints(tmp_path)

    assert names(tmp_path) == ["mine.txt"]


def draw() -> list[float]:
    legacy = np.random.mtrand._rand
    return [random.gauss(0, 1), random.random(), legacy.standard_normal(), legacy.random(), torch.rand(()).item()]  # noqa: S311


def test_generators_go_on_as_they_would_have(tmp_path: Path) -> None:
    seed_everything(1)
    draw()  # an odd number of normal deviates: two generators keep a second one back
    save(tmp_path, 1, generators=generators_state(CPU))

    would_have = draw()
    found = load(tmp_path)
    assert found is not None
    restore_generators(found.state["generators"], CPU)

    assert draw() == would_have
