"""The run folder: JSON files that are whole or absent, written by one process at a time, readable without torch.

``run.json`` says what was run and on what; ``workload.json``, ``memory.json``, ``step_time.json``, ``loader.json``,
``gradient_noise.json``, ``branches.json`` and ``lr_range.json`` hold one measured part each, ``swept.json`` what a sweep showed;
``findings.json`` is the last verdict; ``report.html`` shows it.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal

from pydantic import PositiveFloat

from rightbatch.errors import RunFolderError
from rightbatch.records.document import (
    ForeignRecordError,
    JsonObject,
    NewerSchemaError,
    RecordT,
    read_document,
    refuse_io,
    refuse_record,
    validate,
    write_whole,
)
from rightbatch.records.environment import Environment
from rightbatch.records.folder import (
    REPORT_FILE,
    locked,
    make_folder,
    read_manifest,
    refuse_foreign,
    removed_if_empty,
    write_record,
    write_report,
)
from rightbatch.records.lr_range_measurements import LrRangeMeasurements
from rightbatch.records.measurements import (
    GradientNoiseMeasurements,
    LoaderMeasurements,
    Measurements,
    MemoryMeasurements,
    StepTimeMeasurements,
    WorkloadSummary,
)
from rightbatch.records.plan import Constraints, Findings, Objective
from rightbatch.records.record import SCHEMA_VERSION, Record
from rightbatch.records.training import BranchMeasurements, SweepEvidence

MANIFEST_FILE = "run.json"
FINDINGS_FILE = "findings.json"

PART_KINDS: Mapping[str, type[Record]] = {
    "workload": WorkloadSummary,
    "memory": MemoryMeasurements,
    "step_time": StepTimeMeasurements,
    "loader": LoaderMeasurements,
    "gradient_noise": GradientNoiseMeasurements,
    "branches": BranchMeasurements,
    "lr_range": LrRangeMeasurements,
    "swept": SweepEvidence,
}
"""The record that each part's file holds."""

_OUR_FILES = frozenset({MANIFEST_FILE, FINDINGS_FILE, REPORT_FILE, *(f"{name}.json" for name in PART_KINDS)})


class RunManifest(Record):
    """What was run, when, on what, and how far it came."""

    schema_version: int = SCHEMA_VERSION
    written_by: Literal["rightbatch"] = "rightbatch"
    rightbatch_version: str
    created_at: str
    """ISO 8601, UTC."""
    updated_at: str
    """ISO 8601, UTC."""
    command: tuple[str, ...]
    """The command that repeats the run; empty when it was started from Python."""
    workload_spec: str
    """``file.py:function`` or ``package.module:function``."""
    workload_arguments: tuple[str, ...]
    environment: Environment | None
    code_files: tuple[tuple[str, str], ...]
    """(path, SHA-256) of every file of the user's code that the measurements rest on."""
    state: Literal["measuring", "complete", "interrupted"]
    budget_s: PositiveFloat | None = None
    """Seconds that the probes were given; none in folders of versions that did not say."""
    objective: Objective = Objective()
    constraints: Constraints = Constraints()


class PartHeader(Record):
    """What a part's file says about its data."""

    schema_version: int = SCHEMA_VERSION
    part: str
    fingerprint: str
    """Of everything the measurement depends on: code, arguments, versions, device, options."""
    measured_at: str
    """ISO 8601, UTC."""


@dataclass(frozen=True, kw_only=True)
class StoredPart(Generic[RecordT]):
    """A part as it was stored, with what it takes to judge whether it still holds."""

    record: RecordT
    fingerprint: str
    measured_at: str
    """ISO 8601, UTC."""


@dataclass(frozen=True)
class RunFolder:
    """A folder that belongs to one run. Make one with ``create`` (to measure) or ``open`` (to read)."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, fresh: bool = False) -> "RunFolder":
        """Make the folder, or take over one that an earlier run left.

        Args:
            path: Where it should be; parents are made.
            fresh: Take the folder even when its ``run.json`` cannot be read, because everything will be measured again.

        Raises:
            RunFolderError: It is a file, cannot be written, holds files of someone else, or is corrupt or too new.
        """
        names = make_folder(path, "run folder")
        folder = cls(path)
        if MANIFEST_FILE in names:
            folder._check_takeover(names, fresh=fresh)
        else:
            _refuse_if_any(path, names)
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open the folder of an earlier run for reading.

        Raises:
            RunFolderError: There is no such folder, it is not a run's, or it is corrupt or too new.
        """
        if not path.exists():
            raise RunFolderError(f"there is no run folder {path}; `rightbatch find` says where it puts one (rightbatch-runs by default).")
        if not path.is_dir():
            raise RunFolderError(f"a run is a folder; {path} is a file; give the folder that holds {MANIFEST_FILE}.")
        folder = cls(path)
        if folder.read_manifest() is None:
            raise RunFolderError(f"{path} is not a run folder: it holds no {MANIFEST_FILE}; give the folder that `rightbatch find` named.")
        return folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other process out of the folder.

        Raises:
            RunFolderBusyError: Another process is using the folder.
            RunFolderError: The lock file cannot be made.
        """
        with locked(self.path):
            yield

    @contextmanager
    def removed_if_empty(self) -> Iterator[None]:
        """Leave no folder behind when nothing was written into it, because the workload could not be loaded, for example."""
        with removed_if_empty(self.path):
            yield

    def read_manifest(self) -> RunManifest | None:
        """Read ``run.json``; none when it was not written yet.

        Raises:
            RunFolderError: The file is corrupt, foreign, or from a newer version.
        """
        return read_manifest(RunManifest, self.path / MANIFEST_FILE)

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace ``run.json``.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_record(self.path / MANIFEST_FILE, manifest)

    def read_part(self, name: str, kind: type[RecordT]) -> StoredPart[RecordT] | None:
        """Read one part; none when it was not measured.

        Args:
            name: A key of ``PART_KINDS``.
            kind: The record it holds.

        Raises:
            RunFolderError: The file is corrupt or from a newer version.
        """
        file = self.path / f"{name}.json"
        document = read_document(file)
        if document is None:
            return None
        data = document.pop("data", None)
        header = validate(PartHeader, document, file)
        if header.part != name:
            refuse_record(file, f"it holds the part {header.part!r}")
        return StoredPart(record=validate(kind, data, file), fingerprint=header.fingerprint, measured_at=header.measured_at)

    def write_part(self, name: str, record: Record, *, fingerprint: str, measured_at: str) -> None:
        """Replace the file of one part.

        Raises:
            RunFolderError: It cannot be written.
        """
        header = PartHeader(part=name, fingerprint=fingerprint, measured_at=measured_at)
        document = header.model_dump(mode="json") | {"data": record.model_dump(mode="json")}
        write_whole(self.path / f"{name}.json", json.dumps(document, indent=2, allow_nan=False) + "\n")

    def keep_only(self, names: Collection[str]) -> None:
        """Remove the files of all other parts, and the verdict if it rested on one: they belong to code or settings that have changed.

        Raises:
            RunFolderError: A file cannot be removed.
        """
        stale = [file for name in PART_KINDS if name not in names and (file := self.path / f"{name}.json").exists()]
        try:
            for file in (*stale, *([self.path / FINDINGS_FILE] if stale else [])):
                file.unlink(missing_ok=True)
        except OSError as error:
            refuse_io("clear", self.path, error)

    def read_measurements(self) -> Measurements | None:
        """Read all parts that were measured; none when not even the workload was described.

        Raises:
            RunFolderError: A file is corrupt or from a newer version.
        """
        workload = self.read_part("workload", WorkloadSummary)
        if workload is None:
            return None
        memory = self.read_part("memory", MemoryMeasurements)
        step_time = self.read_part("step_time", StepTimeMeasurements)
        loader = self.read_part("loader", LoaderMeasurements)
        noise = self.read_part("gradient_noise", GradientNoiseMeasurements)
        branches = self.read_part("branches", BranchMeasurements)
        lr_range = self.read_part("lr_range", LrRangeMeasurements)
        swept = self.read_part("swept", SweepEvidence)
        return Measurements(
            workload=workload.record,
            memory=memory and memory.record,
            step_time=step_time and step_time.record,
            loader=loader and loader.record,
            gradient_noise=noise and noise.record,
            branches=branches and branches.record,
            lr_range=lr_range and lr_range.record,
            swept=swept and swept.record,
        )

    def oldest_measured_at(self) -> str | None:
        """When the oldest stored measurement was taken (ISO 8601, UTC); none when nothing was measured.

        Raises:
            RunFolderError: A file is corrupt or from a newer version.
        """
        parts = (self.read_part(name, kind) for name, kind in PART_KINDS.items() if name not in {"workload", "swept"})
        return min((part.measured_at for part in parts if part is not None), default=None)

    def read_findings(self) -> Findings | None:
        """Read the last verdict; none when there was none yet.

        Raises:
            RunFolderError: The file is corrupt or from a newer version.
        """
        file = self.path / FINDINGS_FILE
        document = read_document(file)
        return None if document is None else validate(Findings, document, file)

    def write_findings(self, findings: Findings) -> None:
        """Replace ``findings.json``.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_record(self.path / FINDINGS_FILE, findings)

    def write_report(self, html: str) -> Path:
        """Replace ``report.html`` and say where it is.

        Raises:
            RunFolderError: It cannot be written.
        """
        return write_report(self.path, html)

    def _check_takeover(self, names: list[str], *, fresh: bool) -> None:
        try:
            self.read_manifest()
        except (NewerSchemaError, ForeignRecordError):
            raise
        except RunFolderError:
            if not fresh:
                raise
            _refuse_if_any(self.path, [name for name in names if name not in _OUR_FILES])


def schema() -> JsonObject:
    """Return one JSON schema of what folders of runs, trainings and sweeps hold, and of what ``--json`` prints of them, by file name."""
    from pydantic import BaseModel
    from pydantic.json_schema import models_json_schema

    from rightbatch.records.sweep import SweepManifest, SweepResult  # deferred: training_run builds on this module
    from rightbatch.records.sweep_folder import RESULT_FILE, SWEEP_FILE
    from rightbatch.records.training_log import EvaluationLine, EventLine, StepLine
    from rightbatch.records.training_run import LOG_FILE, TRAINING_FILE, TrainingManifest, TrainingResult

    lines: tuple[type[Record], ...] = (StepLine, EvaluationLine, EventLine)
    files: dict[str, type[Record]] = {
        MANIFEST_FILE: RunManifest,
        FINDINGS_FILE: Findings,
        TRAINING_FILE: TrainingManifest,
        "train --json": TrainingResult,
        SWEEP_FILE: SweepManifest,
        RESULT_FILE: SweepResult,
    }
    parts = {f"{name}.json": kind for name, kind in PART_KINDS.items()}
    every_kind: list[type[BaseModel]] = [*files.values(), PartHeader, *parts.values(), *lines]
    modes: list[tuple[type[BaseModel], Literal["serialization"]]] = [(kind, "serialization") for kind in every_kind]
    references, definitions = models_json_schema(modes)
    properties: JsonObject = {name: references[kind, "serialization"] for name, kind in files.items()}
    properties[LOG_FILE] = {"description": "one such object a line", "anyOf": [references[kind, "serialization"] for kind in lines]}
    for name, kind in parts.items():
        data: JsonObject = {"properties": {"data": references[kind, "serialization"]}, "required": ["data"]}
        properties[name] = {"allOf": [{"$ref": "#/$defs/PartFields"}, data]}
    kinds: JsonObject = dict(definitions["$defs"])
    header = dict(kinds.pop("PartHeader"))  # type: ignore[arg-type]
    header.pop("additionalProperties", None)  # the part's data stands beside these fields
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Files of the folders of rightbatch; find --json prints findings.json, and sweep --json result.json",
        "schema_version": SCHEMA_VERSION,
        "type": "object",
        "properties": properties,
        "$defs": kinds | {"PartFields": header},
    }


def _refuse_if_any(path: Path, foreign: Sequence[str]) -> None:
    if foreign:
        refuse_foreign(path, "a run", ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else ""))
