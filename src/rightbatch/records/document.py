"""One JSON document on disk: written whole or not at all, and refused with its name when it cannot be trusted."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import JsonValue, ValidationError

from rightbatch.errors import RunFolderError
from rightbatch.records.record import SCHEMA_VERSION, Record

JsonObject = dict[str, JsonValue]
Upgrade = Callable[[str, JsonObject], JsonObject]
"""Takes a file's name and its document in one schema version, and returns the document in the next."""

UPGRADES: Mapping[int, Upgrade] = {}
"""The function that takes a document from version v to v + 1, by v; empty while there has been only one version."""

RecordT = TypeVar("RecordT", bound=Record)

_REMEDY = "delete the folder or pass --fresh / another --out"


class ForeignRecordError(RunFolderError):
    """A file has a record's name but says that something else wrote it."""


class NewerSchemaError(RunFolderError):
    """A file was written by a newer rightbatch, whose meaning this one does not know."""


def upgrade(file: str, document: JsonObject, *, upgrades: Mapping[int, Upgrade] | None = None, current: int | None = None) -> JsonObject:
    """Take a document to the current schema version, one version at a time.

    Args:
        file: The file's name, for upgrades that differ by file and for messages.
        document: The parsed JSON, with its ``schema_version``.
        upgrades: The functions by the version they start from; ``UPGRADES`` when none.
        current: The version to reach; ``SCHEMA_VERSION`` when none.

    Raises:
        RunFolderError: The version is missing, newer than ``current``, or so old that no function starts from it.
    """
    table = UPGRADES if upgrades is None else upgrades
    current = SCHEMA_VERSION if current is None else current
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RunFolderError(f"{file} is not a rightbatch record: schema_version must be a positive integer; got {version!r}; {_REMEDY}.")
    if version > current:
        message = f"{file} has schema version {version}; this rightbatch reads up to {current}; update rightbatch or pass another --out."
        raise NewerSchemaError(message)
    for step in range(version, current):
        if step not in table:
            raise RunFolderError(f"{file} has schema version {step}, which this rightbatch can no longer read; {_REMEDY}.")
        document = table[step](Path(file).name, document) | {"schema_version": step + 1}
    return document


def read_document(file: Path) -> JsonObject | None:
    """Read a file and take it to the current schema version; none when there is no such file.

    Raises:
        RunFolderError: It cannot be read, is no JSON object of finite numbers, or has a version that cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        refuse_io("read", file, error)
    except UnicodeDecodeError:
        refuse_record(file, "it is not UTF-8 text")
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        refuse_record(file, f"{error}")
    if not isinstance(document, dict):
        refuse_record(file, f"it holds a {type(document).__name__}, not an object")
    return upgrade(str(file), document)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a record can hold")


def validate(kind: type[RecordT], document: JsonValue, file: Path) -> RecordT:
    """Turn parsed JSON into a record, without bending any type.

    Raises:
        RunFolderError: A field is missing, unknown, or of the wrong type; the message names the file and the field.
    """
    try:
        return kind.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "the document"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        refuse_record(file, f"{place}: {first['msg']}{more}")


def refuse_record(file: Path, reason: str) -> NoReturn:
    """Say that a file's content cannot be trusted, and what to do.

    Raises:
        RunFolderError: Always.
    """
    raise RunFolderError(f"{file} is not a rightbatch record: {reason}; {_REMEDY}.")


def refuse_io(action: str, path: Path, error: OSError) -> NoReturn:
    """Say that the operating system refused, and what to do.

    Raises:
        RunFolderError: Always.
    """
    reason = error.strerror or str(error)
    raise RunFolderError(f"cannot {action} {path}: {reason}; make room or set permissions, or pass another --out.") from error


def write_whole(file: Path, text: str) -> None:
    """Write to a temporary file beside it, then rename: a reader sees the old file or the new one, never half of one.

    Raises:
        RunFolderError: The disk is full, or the folder cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        refuse_io("write", file, error)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to the disk, so that a file renamed in it stays.

    Raises:
        OSError: The operating system refused.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
