"""What every folder of ours has in common: it is made or taken over, locked, named by a manifest, and holds a report."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from rightbatch.errors import RunFolderBusyError, RunFolderError
from rightbatch.records.document import ForeignRecordError, RecordT, read_document, refuse_io, validate, write_whole
from rightbatch.records.record import Record

RUNS_FOLDER = Path("rightbatch-runs")
"""Holds the folders that the user gave no place of their own."""
LOCK_FILE = ".lock"
REPORT_FILE = "report.html"
WRITTEN_BY = "rightbatch"


def make_folder(path: Path, what: str) -> list[str]:
    """Make a folder with its parents, or take one that is there, and return the names in it, sorted, that say whose it is.

    The lock is left out, and so is what a write left that was cut off.

    Args:
        path: Where it should be.
        what: What it is called in errors, such as ``run folder``.

    Raises:
        RunFolderError: It is a file, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"the {what} must be a folder; {path} is a file; pass another --out.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK_FILE and not _is_unfinished(entry.name))
    except OSError as error:
        refuse_io("make", path, error)
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunFolderError(f"cannot write into the {what} {path}: permission denied; pass another --out.")
    return names


def _is_unfinished(name: str) -> bool:
    """Whether a file was being written, as records and checkpoints are before they get their name."""
    return name.startswith(".") and name.endswith(".tmp")


def refuse_foreign(path: Path, whose: str, held: str) -> NoReturn:
    """Say that a folder belongs to somebody else, and what to do.

    Args:
        path: The folder.
        whose: Whose it must be, such as ``a sweep``.
        held: What it holds, in words.

    Raises:
        RunFolderError: Always.
    """
    raise RunFolderError(f"the folder of {whose} must be empty or {whose}'s; {path} holds {held}; pass another --out.")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other process out of a folder.

    Raises:
        RunFolderBusyError: Another process is using the folder.
        RunFolderError: The lock file cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunFolderBusyError(f"another process is using the run folder {path}; wait for it to end or pass another --out.") from error
    except OSError as error:
        refuse_io("lock", path, error)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def removed_if_empty(path: Path) -> Iterator[None]:
    """Leave no folder behind when nothing was written into it, because the workload could not be loaded, for example."""
    try:
        yield
    finally:
        if {entry.name for entry in path.iterdir()} <= {LOCK_FILE}:
            (path / LOCK_FILE).unlink(missing_ok=True)
            with suppress(OSError):
                path.rmdir()


def read_manifest(kind: type[RecordT], file: Path) -> RecordT | None:
    """Read the record that says whose folder it is; none when it was not written yet.

    Raises:
        RunFolderError: The file is corrupt, foreign, or from a newer version.
    """
    document = read_document(file)
    if document is None:
        return None
    if document.get("written_by") != WRITTEN_BY:
        raise ForeignRecordError(f"{file} was not written by rightbatch; pass another --out or give another folder.")
    return validate(kind, document, file)


def write_record(file: Path, record: Record) -> None:
    """Replace a record's file.

    Raises:
        RunFolderError: It cannot be written.
    """
    write_whole(file, record.model_dump_json(indent=2) + "\n")


def write_report(path: Path, html: str) -> Path:
    """Replace a folder's report and say where it is.

    Raises:
        RunFolderError: It cannot be written.
    """
    file = path / REPORT_FILE
    write_whole(file, html)
    return file
