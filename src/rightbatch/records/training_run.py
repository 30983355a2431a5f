"""The folder of a training: what was asked (``training.json``), the log, the last two checkpoints, the report."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rightbatch.errors import RunFolderError
from rightbatch.records.folder import locked, make_folder, read_manifest, refuse_foreign, removed_if_empty, write_record, write_report
from rightbatch.records.plan import BatchPlan
from rightbatch.records.record import SCHEMA_VERSION, Record
from rightbatch.records.run import MANIFEST_FILE
from rightbatch.records.schedule import BatchSchedule, ScheduleForecast
from rightbatch.records.training_log import EvaluationLine, LogLine, TrainingTarget, read_log

TRAINING_FILE = "training.json"
LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class TrainingState(StrEnum):
    """How far a training came."""

    UNFINISHED = "unfinished"
    """It runs, or its process was killed."""
    FINISHED = "finished"
    """All samples were trained on; there was no target."""
    TARGET_REACHED = "target reached"
    TARGET_MISSED = "target missed"
    """All samples were trained on, and the target was not reached."""
    STOPPED = "stopped"
    """The caller ended it after an evaluation."""
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"
    """The loss was not finite."""


class PredictedStep(Record):
    """What the plan's findings say about steps of one size."""

    global_batch_size: PositiveInt
    step_time_s: PositiveFloat
    """Seconds between optimizer steps, the data loader's limit included."""


class TrainingManifest(Record):
    """What is trained, with which plan, for how long, and how far it came."""

    schema_version: int = SCHEMA_VERSION
    written_by: Literal["rightbatch"] = "rightbatch"
    rightbatch_version: str
    created_at: str
    """ISO 8601, UTC."""
    updated_at: str
    """ISO 8601, UTC."""
    command: tuple[str, ...] = ()
    """The command that was given; empty when it was started from Python."""
    workload_spec: str
    workload_arguments: tuple[str, ...] = ()
    code_files: tuple[tuple[str, str], ...] = ()
    """(path, SHA-256) of every file of the user's code."""
    workload_name: str
    fingerprint: str
    """Of everything that must be the same for a training to go on."""
    plan: BatchPlan
    plan_source: str
    """Where the plan comes from, in words."""
    schedule: str
    """How the batch size changes, in words."""
    batch_schedule: BatchSchedule | None = None
    """The same; none keeps the plan's size."""
    schedule_asked: str = ""
    """The word that it was asked for with, ``dynamic`` for a batch that follows the noise where that is worth it; empty when none was."""
    forecast: ScheduleForecast | None = None
    """What a schedule was predicted to gain; none where nothing was predicted."""
    samples: PositiveInt
    """Samples to train on, over all epochs."""
    samples_per_epoch: PositiveInt
    target: TrainingTarget | None = None
    evaluate_every: PositiveInt | None = None
    """Samples between evaluations; none is an epoch."""
    noise_every: NonNegativeInt | None = None
    """Steps between measurements of the noise; none where nobody asked."""
    seed: NonNegativeInt
    device: str
    device_name: str
    predicted_steps: tuple[PredictedStep, ...] = ()
    """From the findings that the plan comes from; empty when it comes from elsewhere."""
    state: TrainingState = TrainingState.UNFINISHED


class TrainingResult(Record):
    """What a training came to: the document that ``--json`` prints and the report renders."""

    schema_version: int = SCHEMA_VERSION
    state: TrainingState
    workload_name: str
    plan: BatchPlan
    plan_source: str
    schedule: str
    forecast: ScheduleForecast | None
    target: TrainingTarget | None
    steps: NonNegativeInt
    samples: NonNegativeInt
    samples_asked: PositiveInt
    epochs: NonNegativeFloat
    training_s: NonNegativeFloat
    """Seconds of training, loading of batches included; evaluations, checkpoints and interruptions not."""
    predicted_s: NonNegativeFloat | None
    """The same from the step times of the plan's findings; none without them, or where they say nothing about a size that was trained."""
    samples_per_s: PositiveFloat | None
    batch_sizes: tuple[tuple[NonNegativeInt, PositiveInt], ...]
    """(samples trained on before, global batch size) wherever the size changed."""
    train_loss: float | None
    """Mean over the steps of the log's last line."""
    evaluation: EvaluationLine | None
    """The last one."""
    best: EvaluationLine | None
    """With the best metric, or without one the lowest loss."""
    reached: EvaluationLine | None
    """The first that met the target."""
    resumes: NonNegativeInt
    out_of_memory: NonNegativeInt
    """Steps that were taken again with smaller micro-batches."""


@dataclass(frozen=True)
class TrainingFolder:
    """A folder that belongs to one training."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "TrainingFolder":
        """Make the folder, or take over one that a training left.

        Raises:
            RunFolderError: It is a file, cannot be written, or holds something else.
        """
        names = make_folder(path, "folder of a training")
        if names and TRAINING_FILE not in names:
            refuse_foreign(path, "a training", "a run of `rightbatch find`" if MANIFEST_FILE in names else "something else")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "TrainingFolder":
        """Open the folder of a training for reading.

        Raises:
            RunFolderError: It is none.
        """
        if not cls.is_at(path):
            raise RunFolderError(f"{path} is no folder of a training: it holds no {TRAINING_FILE}; give the one that `train` named.")
        return cls(path)

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a training was kept there."""
        return (path / TRAINING_FILE).is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other process out of the folder, and leave no folder behind when nothing was written into it.

        Raises:
            RunFolderBusyError: Another process is using the folder.
        """
        with locked(self.path), removed_if_empty(self.path):
            yield

    @property
    def log_file(self) -> Path:
        """Where the log is."""
        return self.path / LOG_FILE

    def read_manifest(self) -> TrainingManifest | None:
        """Read ``training.json``; none when it was not written yet.

        Raises:
            RunFolderError: The file is corrupt, foreign, or from a newer version.
        """
        return read_manifest(TrainingManifest, self.path / TRAINING_FILE)

    def write_manifest(self, manifest: TrainingManifest) -> None:
        """Replace ``training.json``.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_record(self.path / TRAINING_FILE, manifest)

    def read_lines(self) -> tuple[LogLine, ...]:
        """Read the log.

        Raises:
            RunFolderError: It is corrupt.
        """
        return read_log(self.log_file)

    def write_report(self, html: str) -> Path:
        """Replace ``report.html`` and say where it is.

        Raises:
            RunFolderError: It cannot be written.
        """
        return write_report(self.path, html)


def resume_command(command: tuple[str, ...], *, world_size: int = 1) -> str:
    """Return the command that goes on with a training; empty when it was started from Python.

    Args:
        command: What it was started with, in each process.
        world_size: Processes that trained together.
    """
    if not command:
        return ""
    end = command.index("--") if "--" in command else len(command)
    own = [word for word in command[:end] if word not in {"--resume", "--fresh"}]
    launcher = ["torchrun", "--nproc-per-node", str(world_size), "-m"] if world_size > 1 else []
    return shlex.join([*launcher, *own, "--resume", *command[end:]])
