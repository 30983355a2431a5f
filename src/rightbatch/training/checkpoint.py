"""Checkpoints: everything a training needs to go on bit by bit, each in one file that is whole or absent.

A checkpoint is written to a temporary file in its folder, forced to the disk, renamed, and the folder forced to the disk; so a process that
is killed at any moment leaves the checkpoint before it. Its name holds the digest of its bytes, because ``torch.load`` does not notice a
changed byte. It holds tensors, numbers, strings, lists and mappings only, and is read with ``weights_only=True``: no code in it is run.
"""

import copy
import hashlib
import os
import re
import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from rightbatch.errors import RunFolderError, UsageError
from rightbatch.records.document import refuse_io, sync_folder
from rightbatch.records.folder import WRITTEN_BY

State = dict[str, object]
"""Tensors, numbers, strings, lists and mappings, nested."""

SCHEMA_VERSION = 1
KEPT_COUNT = 2
"""Checkpoints that are kept: the last one, and the one to fall back to."""
_DIGEST_LENGTH = 16
_NAME = re.compile(rf"checkpoint-(\d{{9,}})-([0-9a-f]{{{_DIGEST_LENGTH}}})\.pt")
_LIKE_OURS = "checkpoint-*.pt"
_TEMPORARY = ".checkpoint.*.tmp"
_LEAVES = (bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)
_MAPPINGS = (dict, OrderedDict, Counter)
"""Kinds of mappings that ``weights_only`` loading makes again."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was read.

    Attributes:
        state: What was saved.
        step: Optimizer steps until then.
        file: Where it lies.
        passed_over: Newer checkpoints that could not be read, and why, in words.
    """

    state: State
    step: int
    file: Path
    passed_over: tuple[str, ...] = ()


def save_checkpoint(folder: Path, state: Mapping[str, object], *, step: int, fingerprint: str) -> Path:
    """Write a checkpoint, then remove all but the last two.

    Args:
        folder: An existing folder.
        state: Tensors, numbers, strings, lists and mappings, nested; NumPy's numbers become Python's.
        step: Optimizer steps so far; the checkpoint with the most is the last one.
        fingerprint: Of the training that it belongs to.

    Returns:
        Where it lies.

    Raises:
        UsageError: The state holds something that could not be read back without running code.
        RunFolderError: The disk is full, or the folder cannot be written; the checkpoints before it are intact.
    """
    header = {"written_by": WRITTEN_BY, "schema_version": SCHEMA_VERSION, "fingerprint": fingerprint, "step": step}
    document = header | {"state": _plain(state, "state")}
    temporary = folder / f".checkpoint.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as stream:
            digesting = _DigestingStream(stream)
            with _stream_errors(digesting):
                torch.save(document, digesting)  # type: ignore[arg-type]  # it needs write and flush only
            stream.flush()
            os.fsync(stream.fileno())
        file = folder / f"checkpoint-{step:09d}-{digesting.digest.hexdigest()[:_DIGEST_LENGTH]}.pt"
        temporary.replace(file)
        sync_folder(folder)
    except OSError as error:
        refuse_io("write a checkpoint into", folder, error)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _remove_older(folder, file)
    return file


def load_checkpoint(folder: Path, *, fingerprint: str, device: torch.device | str = "cpu") -> Checkpoint | None:
    """Read the last checkpoint that is whole; none when there is none at all.

    Args:
        folder: Where they lie.
        fingerprint: Of the training that goes on.
        device: Where the tensors of the state go.

    Raises:
        UsageError: It belongs to another training.
        RunFolderError: None is whole, or one was not written by rightbatch, or by a newer one.
    """
    passed_over: list[str] = []
    for file in _newest_first(folder):
        document = _read_whole(file, device)
        if document is None:
            passed_over.append(f"{file.name} is damaged: its content is not what was written")
            continue
        if document["fingerprint"] != fingerprint:
            raise UsageError(
                f"a checkpoint must belong to the training that goes on; {file} is of another workload, plan, schedule, seed, precision or "
                "number of ranks; pass what that training was started with, or another --out."
            )
        state: State = document["state"]  # type: ignore[assignment]  # written as one
        return Checkpoint(state=state, step=int(str(document["step"])), file=file, passed_over=tuple(passed_over))
    if passed_over:
        raise RunFolderError(f"no checkpoint in {folder} can be read: {'; '.join(passed_over)}; start again without --resume.")
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a file that is named like a checkpoint."""
    return next(folder.glob(_LIKE_OURS), None) is not None


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an earlier training, and what was left half written.

    Raises:
        RunFolderError: One cannot be removed.
    """
    try:
        for file in (*(file for file in folder.iterdir() if _NAME.fullmatch(file.name)), *folder.glob(_TEMPORARY)):
            file.unlink(missing_ok=True)
    except OSError as error:
        refuse_io("clear", folder, error)


def _newest_first(folder: Path) -> list[Path]:
    files = sorted(folder.glob(_LIKE_OURS), reverse=True)
    foreign = [file.name for file in files if not _NAME.fullmatch(file.name)]
    if foreign:
        raise RunFolderError(
            f"checkpoints are named checkpoint-STEP-DIGEST.pt; {folder} holds {foreign[0]}, which rightbatch did not write; "
            "move it away, or pass another --out."
        )
    return sorted(files, key=lambda file: int(file.name.split("-")[1]), reverse=True)


def _read_whole(file: Path, device: torch.device | str) -> State | None:
    """Read a checkpoint; none when its bytes are not those that were written."""
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()[:_DIGEST_LENGTH]
    except OSError as error:
        refuse_io("read", file, error)
    if found != file.stem.rpartition("-")[2]:
        return None
    try:
        document = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise _foreign(file) from error
    if not isinstance(document, dict) or document.get("written_by") != WRITTEN_BY:
        raise _foreign(file)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise RunFolderError(
            f"{file} has the version {document.get('schema_version')} of checkpoints; this rightbatch reads {SCHEMA_VERSION}; "
            "go on with the rightbatch that wrote it, or start again without --resume."
        )
    return document


def _foreign(file: Path) -> RunFolderError:
    return RunFolderError(f"{file} is no checkpoint of rightbatch; move it away, or pass another --out.")


def _remove_older(folder: Path, last: Path) -> None:
    """Keep the last checkpoint and the one before it; what else is there could only be taken for a newer one."""
    others = [file for file in folder.iterdir() if _NAME.fullmatch(file.name) and file != last]
    step = int(last.name.split("-")[1])
    older = sorted(
        (file for file in others if int(file.name.split("-")[1]) <= step), key=lambda file: int(file.name.split("-")[1]), reverse=True
    )
    stale = set(others) - set(older[: KEPT_COUNT - 1])
    with suppress(OSError):  # the checkpoint stands; what could not be removed now is removed after the next one
        for file in (*stale, *folder.glob(_TEMPORARY)):
            file.unlink(missing_ok=True)


class _DigestingStream:
    """Passes on what is written, and digests it on the way."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def _stream_errors(stream: _DigestingStream) -> Iterator[None]:
    """Raise what went wrong with the stream, where torch raises what it then finds wrong with its archive."""
    try:
        yield
    except RuntimeError:
        if stream.error is None:
            raise
        raise stream.error from None


def _plain(value: object, place: str) -> object:
    """Return a value made of what ``weights_only`` loading allows.

    Raises:
        UsageError: Something in it is of another kind; the message says where.
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in _LEAVES or isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        made = copy.copy(value) if type(value) in _MAPPINGS else {}  # a copy keeps the versions that torch hangs on a model's state
        made.clear()  # type: ignore[attr-defined]  # both can be changed
        made.update({_key(key, place): _plain(item, f"{place}[{key!r}]") for key, item in value.items()})  # type: ignore[attr-defined]
        return made
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise UsageError(
        f"a checkpoint holds tensors, numbers, strings, lists and mappings only; {place} is a {type(value).__qualname__}; "
        "let its owner's state_dict() return something plainer, or train without it."
    )


def _key(key: object, place: str) -> object:
    if isinstance(key, np.generic):
        return key.item()
    if key is None or isinstance(key, (str, int, float)):
        return key
    raise UsageError(f"keys of a checkpoint's mappings are strings or numbers; {place} has one of the type {type(key).__qualname__}.")
