"""The folder of a sweep: what is swept (``sweep.json``), the journal of its trials, the result, a table of trials, the report."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rightbatch.errors import RunFolderError
from rightbatch.records.document import ForeignRecordError, read_document, refuse_io, validate, write_whole
from rightbatch.records.run import LOCK_FILE, REPORT_FILE, RunFolder
from rightbatch.records.sweep import SweepManifest, SweepResult

SWEEP_FILE = "sweep.json"
RESULT_FILE = "result.json"
TABLE_FILE = "tidy.csv"
JOURNAL_FILE = "journal.log"
JOURNAL_LOCK_FILE = "journal.log.lock"

_OUR_FILES = frozenset({SWEEP_FILE, RESULT_FILE, TABLE_FILE, JOURNAL_FILE, JOURNAL_LOCK_FILE, REPORT_FILE, LOCK_FILE})


@dataclass(frozen=True)
class SweepFolder:
    """A folder that belongs to one sweep."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "SweepFolder":
        """Make the folder, or take over one that a sweep left.

        Raises:
            RunFolderError: It is a file, cannot be written, or holds something else.
        """
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"the folder of a sweep must be a folder; {path} is a file; pass another --out.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in path.iterdir()}
        except OSError as error:
            refuse_io("make", path, error)
        if not os.access(path, os.W_OK | os.X_OK):
            raise RunFolderError(f"cannot write into the folder {path}: permission denied; pass another --out.")
        foreign = sorted(name for name in names - _OUR_FILES if not (name.startswith(".") and name.endswith(".tmp")))
        if foreign:
            raise RunFolderError(f"the folder of a sweep must be empty or a sweep's; {path} holds {foreign[0]}; pass another --out.")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "SweepFolder":
        """Open the folder of a sweep for reading.

        Raises:
            RunFolderError: It is none.
        """
        if not cls.is_at(path):
            raise RunFolderError(f"{path} is no folder of a sweep: it holds no {SWEEP_FILE}; give the one that `sweep` named.")
        return cls(path)

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a sweep was kept there."""
        return (path / SWEEP_FILE).is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other driver out of the folder, and leave no folder behind when nothing was written into it.

        Raises:
            RunFolderBusyError: Another process is using the folder.
        """
        folder = RunFolder(self.path)
        with folder.lock(), folder.removed_if_empty():
            yield

    def clear(self) -> None:
        """Remove everything that an earlier sweep left, its trials included.

        Raises:
            RunFolderError: A file cannot be removed.
        """
        try:
            for name in sorted(_OUR_FILES - {LOCK_FILE}):
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            refuse_io("clear", self.path, error)

    def read_manifest(self) -> SweepManifest | None:
        """Read ``sweep.json``; none when it was not written yet.

        Raises:
            RunFolderError: The file is corrupt, foreign, or from a newer version.
        """
        file = self.path / SWEEP_FILE
        document = read_document(file)
        if document is None:
            return None
        if document.get("written_by") != "rightbatch":
            raise ForeignRecordError(f"{file} was not written by rightbatch; pass another --out or give another folder.")
        return validate(SweepManifest, document, file)

    def write_manifest(self, manifest: SweepManifest) -> None:
        """Replace ``sweep.json``.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_whole(self.path / SWEEP_FILE, manifest.model_dump_json(indent=2) + "\n")

    def read_result(self) -> SweepResult | None:
        """Read ``result.json``; none when the sweep has not come to one.

        Raises:
            RunFolderError: The file is corrupt or from a newer version.
        """
        file = self.path / RESULT_FILE
        document = read_document(file)
        return None if document is None else validate(SweepResult, document, file)

    def write_result(self, result: SweepResult) -> None:
        """Replace ``result.json``.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_whole(self.path / RESULT_FILE, result.model_dump_json(indent=2) + "\n")

    def write_table(self, text: str) -> None:
        """Replace ``tidy.csv``.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_whole(self.path / TABLE_FILE, text)

    def write_report(self, html: str) -> Path:
        """Replace ``report.html`` and say where it is.

        Raises:
            RunFolderError: It cannot be written.
        """
        file = self.path / REPORT_FILE
        write_whole(file, html)
        return file
