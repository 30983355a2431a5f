"""What goes where: the answer alone on stdout, everything else on stderr."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypedDict

from rightbatch.errors import UsageError

if TYPE_CHECKING:
    from rightbatch.records.plan import Findings

_STDOUT, _STDERR = 1, 2
"""The descriptors that child processes and compiled code write to, whatever Python's own streams are."""

_WIDEST = 100
_WIDTH_WITHOUT_TERMINAL = 80


_IN_ASCII = str.maketrans({"·": "|", "▶": ">", "≈": "~", "…": "...", "█": "#", **dict.fromkeys("▉▊▋▌", "#"), **dict.fromkeys("▍▎▏", "")})
"""What stands for the characters of ours that not every encoding has."""


def say(text: str) -> None:
    """Write one message to stderr, where there is one."""
    if sys.stderr is None:  # the process was started with it closed
        return
    with suppress(BrokenPipeError):
        sys.stderr.write(_encodable(f"{text}\n", sys.stderr))
        sys.stderr.flush()


def answer(text: str) -> None:
    """Write the answer to stdout; a reader that has gone away (``| head``) is no error. Of several ranks only the first answers.

    Raises:
        UsageError: stdout cannot take it.
    """
    if sys.stdout is None or _is_another_rank():
        return
    try:
        sys.stdout.write(_encodable(text if text.endswith("\n") else f"{text}\n", sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
    except OSError as error:
        _drop_stdout()
        raise UsageError(f"the answer must go somewhere; stdout got {error.strerror}; make room, or send it elsewhere.") from error


def _encodable(text: str, stream: TextIO) -> str:
    """The text in characters that the stream can take: in plain ones where its encoding lacks some, as in the C locale."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_IN_ASCII).encode(encoding, "replace").decode(encoding)
    return text


def answer_findings(findings: "Findings", *, as_json: bool) -> None:
    """Write findings to stdout, as the text report or as one JSON document."""
    if as_json:
        answer(findings.model_dump_json(indent=2))
        return
    from rightbatch.report.text import render_text

    answer(render_text(findings, **text_layout()))


class TextLayout(TypedDict):
    """How a text report is laid out."""

    width: int
    colour: bool
    now: datetime


def text_layout() -> TextLayout:
    """Return how a report is laid out on stdout as it is: a terminal, or a pipe."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = min(_WIDEST, shutil.get_terminal_size().columns) if terminal else _WIDTH_WITHOUT_TERMINAL
    return {"width": width, "colour": terminal and not os.environ.get("NO_COLOR"), "now": datetime.now(UTC)}


def _is_another_rank() -> bool:
    if "RANK" not in os.environ:  # which saves the import where nothing was launched together
        return False
    from rightbatch.engine.ranks import is_lead

    return not is_lead()


def answer_error(kind: str, message: str, exit_code: int) -> None:
    """Write the JSON document that stands for an error."""
    from rightbatch.records.record import SCHEMA_VERSION

    error = {"type": kind, "message": message, "exit_code": exit_code}
    answer(json.dumps({"schema_version": SCHEMA_VERSION, "error": error}, indent=2))


@contextmanager
def stdout_reserved() -> Iterator[None]:
    """Send to stderr what the user's code prints meanwhile, in this process and in its children, so that stdout holds the answer alone."""
    if sys.stdout is not None:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
    try:
        saved = os.dup(_STDOUT)
    except OSError:  # the process was started with its stdout closed
        saved = None
    else:
        os.dup2(_STDERR, _STDOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, _STDOUT)
            os.close(saved)


def _drop_stdout() -> None:
    """Point stdout nowhere, so that Python's own flush at exit does not complain about the broken pipe."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # replaced by an object without one, as in tests and notebooks
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def shown_path(path: Path) -> Path:
    """A path as the user would type it: relative where it lies below the working folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path
