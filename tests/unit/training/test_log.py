"""The log holds every line once, also after a resume, and says when it cannot be written."""

import os
from pathlib import Path

import pytest

from rightbatch.errors import RunFolderError
from rightbatch.records.estimates import Estimate
from rightbatch.records.training_log import EvaluationLine, EventLine, LogEvent, StepLine
from rightbatch.training.log import TrainingLog
from training_samples import lines


def step_line(step: int) -> StepLine:
    return StepLine(step=step, samples=32 * step, training_s=0.1 * step, global_batch_size=32, micro_batch_size=32, lr=0.1, loss=1 / step)


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, tensorboard=False) as log:
        for line in lines():
            log.write(line)

        assert log.lines() == lines()
    assert {type(line) for line in lines()} == {StepLine, EvaluationLine, EventLine}


def test_what_is_not_known_comes_back_as_unknown(tmp_path: Path) -> None:
    line = step_line(1).model_copy(update={"loss": None, "noise_scale": Estimate(value=None, low=3.0, high=None, n=4)})
    with TrainingLog(tmp_path, tensorboard=False) as log:
        log.write(line)

        assert log.lines() == (line,)


def test_without_a_folder_lines_stay_in_memory() -> None:
    with TrainingLog(None) as log:
        log.write(step_line(1))

        assert (log.lines(), log.position) == ((step_line(1),), 0)


def test_after_a_resume_no_line_is_there_twice(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, tensorboard=False) as log:
        for step in (1, 2):
            log.write(step_line(step))
        position = log.position
        log.write(step_line(3))

    with TrainingLog(tmp_path, position=position, step=2, tensorboard=False) as log:
        for step in (3, 4):
            log.write(step_line(step))

        assert [line.step for line in log.lines()] == [1, 2, 3, 4]


def test_a_start_without_a_position_begins_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        with TrainingLog(tmp_path, tensorboard=False) as log:
            log.write(step_line(step))

            assert [line.step for line in log.lines()] == [step]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, tensorboard=False) as log:
        log.write(step_line(1))
        with (tmp_path / "log.jsonl").open("a") as stream:
            stream.write('{"kind":"step","st')

        assert log.lines() == (step_line(1),)


def test_a_line_of_something_else_is_refused_by_its_number(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, tensorboard=False) as log:
        log.write(step_line(1))
        with (tmp_path / "log.jsonl").open("a") as stream:
            stream.write('{"kind":"else"}\n')

        with pytest.raises(RunFolderError, match="line 2 is no line of a training's log"):
            log.lines()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")  # noqa: PTH110
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = TrainingLog(tmp_path, tensorboard=False)

    with pytest.raises(RunFolderError, match=r"cannot write .*log.jsonl: No space left on device; make room"):
        log.write(step_line(1))
    log.close()


def scalars(folder: Path, tag: str) -> list[int]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def test_tensorboard_gets_every_step_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    with TrainingLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step_line(step))
        log.write(EventLine(step=3, samples=96, training_s=0.3, event=LogEvent.CHECKPOINT))
    with TrainingLog(tmp_path, position=10**9, step=2) as log:
        for step in (3, 4):
            log.write(step_line(step))

    assert scalars(tmp_path, "train/loss") == [1, 2, 3, 4]


def test_a_new_start_leaves_nothing_of_the_earlier_training_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    for last in (5, 2):
        with TrainingLog(tmp_path) as log:
            for step in range(1, last + 1):
                log.write(step_line(step))

    assert scalars(tmp_path, "train/loss") == [1, 2]
