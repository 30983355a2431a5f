"""Writes the log of a training: JSON lines, and TensorBoard's files where that is installed."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rightbatch.errors import RunFolderError
from rightbatch.records.document import refuse_io
from rightbatch.records.training_log import EvaluationLine, EventLine, LogLine, StepLine, read_log
from rightbatch.records.training_run import LOG_FILE, TENSORBOARD_FOLDER


class TrainingLog:
    """Takes lines, and keeps them in a folder or, without one, in memory.

    Every line reaches the operating system at once, so that a killed process leaves all of them. After a resume the file is cut back to
    where the checkpoint was made, and what was trained since is written again: no line is there twice.

    Args:
        folder: Where the log lies; none keeps it in memory.
        position: Bytes of the log to keep, from the checkpoint; none starts anew.
        step: Optimizer steps of that checkpoint.
        tensorboard: Whether to write TensorBoard's files, where it is installed.

    Raises:
        RunFolderError: The log cannot be written.
    """

    def __init__(self, folder: Path | None, *, position: int | None = None, step: int = 0, tensorboard: bool = True) -> None:
        self._file = None if folder is None else folder / LOG_FILE
        self._in_memory: list[LogLine] = []
        self._stream = None
        if folder is not None and position is None:
            _remove_summaries(folder)
        self._tensorboard = _summary_writer(folder, step) if folder is not None and tensorboard else None
        if self._file is None:
            return
        try:
            self._stream = self._file.open("ab" if position is not None else "wb", buffering=0)
            if position is not None:
                self._stream.truncate(min(position, self._file.stat().st_size))
        except OSError as error:
            refuse_io("write", self._file, error)

    @property
    def position(self) -> int:
        """Bytes written so far, forced to the disk: a checkpoint that names them can rely on them.

        Raises:
            RunFolderError: The disk is full.
        """
        if self._stream is None or self._file is None:
            return 0
        try:
            os.fsync(self._stream.fileno())
            return self._file.stat().st_size
        except OSError as error:
            refuse_io("write", self._file, error)

    def write(self, line: LogLine) -> None:
        """Add a line.

        Raises:
            RunFolderError: The disk is full.
        """
        if self._tensorboard is not None:
            _add_scalars(self._tensorboard, line)
        if self._stream is None or self._file is None:
            self._in_memory.append(line)
            return
        text = (line.model_dump_json() + "\n").encode()
        try:
            written = self._stream.write(text)
        except OSError as error:
            refuse_io("write", self._file, error)
        if written != len(text):
            raise RunFolderError(f"cannot write {self._file}: no space is left; make room, then go on with --resume.")

    def lines(self) -> tuple[LogLine, ...]:
        """Return all lines.

        Raises:
            RunFolderError: The log is corrupt.
        """
        return tuple(self._in_memory) if self._file is None else read_log(self._file)

    def close(self) -> None:
        """End the files."""
        if self._stream is not None:
            self._stream.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _remove_summaries(folder: Path) -> None:
    """Remove TensorBoard's files of an earlier training in the folder."""
    try:
        for file in (folder / TENSORBOARD_FOLDER).glob("events.out.tfevents.*"):
            file.unlink()
    except OSError as error:
        refuse_io("clear", folder, error)


def _summary_writer(folder: Path, step: int) -> Any:
    """Open TensorBoard's writer, which drops from a file before it what came after the checkpoint; none where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # noqa: BLE001  # not installed, or broken by another package: its files are an extra
        return None
    return SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=step + 1 if step else None)


def _add_scalars(writer: Any, line: LogLine) -> None:
    if isinstance(line, StepLine):
        scalars: dict[str, float | None] = {
            "train/loss": line.loss,
            "train/gradient norm": line.grad_norm,
            "train/samples per second": line.samples_per_s,
            "train/batch size": line.global_batch_size,
            "train/learning rate": line.lr,
            "train/noise scale": line.noise_scale.value if line.noise_scale is not None else None,
            "train/samples": line.samples,
        }
    elif isinstance(line, EvaluationLine):
        scalars = {"valid/loss": line.loss, "valid/metric": line.metric}
    else:
        assert isinstance(line, EventLine), "the third kind of line"  # noqa: S101
        writer.add_text("events", f"{line.event}: {line.detail}", line.step)
        return
    for name, value in scalars.items():
        if value is not None:
            writer.add_scalar(name, value, line.step)
