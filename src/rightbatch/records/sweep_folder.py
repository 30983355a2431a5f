"""The folder of a sweep: what is swept (``sweep.json``), the journal of its trials, the result, a table of trials, the report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rightbatch.errors import RunFolderError
from rightbatch.records.document import read_document, refuse_io, validate, write_whole
from rightbatch.records.folder import (
    LOCK_FILE,
    REPORT_FILE,
    locked,
    make_folder,
    read_manifest,
    refuse_foreign,
    removed_if_empty,
    write_record,
    write_report,
)
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
        names = make_folder(path, "folder of a sweep")
        foreign = [name for name in names if name not in _OUR_FILES]
        if foreign:
            refuse_foreign(path, "a sweep", foreign[0])
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
        with locked(self.path), removed_if_empty(self.path):
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
        return read_manifest(SweepManifest, self.path / SWEEP_FILE)

    def write_manifest(self, manifest: SweepManifest) -> None:
        """Replace ``sweep.json``.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_record(self.path / SWEEP_FILE, manifest)

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
        write_record(self.path / RESULT_FILE, result)

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
        return write_report(self.path, html)
