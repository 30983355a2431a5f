"""Progress on stderr: a bar on a terminal, lines elsewhere, nothing when it is not wanted."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rightbatch.cli.output import say
from rightbatch.units import format_percent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from rightbatch.tuner.request import Progress

BUDGET = "the budget used"
_LINE_EVERY_FRACTION = 0.05


class LineProgress:
    """Writes a line when a stage begins, and again whenever another twentieth of the whole is done.

    Args:
        whole: What the fractions are of, in words.
    """

    def __init__(self, whole: str = BUDGET) -> None:
        self._whole = whole
        self._stage = ""
        self._next_fraction = 0.0

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Write the stage, the part of the whole that is done, and the detail, unless a line said nearly the same."""
        if stage == self._stage and fraction < self._next_fraction:
            return
        self._stage, self._next_fraction = stage, fraction + _LINE_EVERY_FRACTION
        text = f"{stage}: {detail}" if detail else stage
        say(f"{text} ({format_percent(fraction)} of {self._whole})")


class BarProgress:
    """Draws a bar of the whole with the stage and the detail beside it."""

    def __init__(self, bar: "RichProgress", task: "TaskID") -> None:
        self._bar = bar
        self._task = task

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Move the bar to the part of the whole that is done."""
        self._bar.update(self._task, completed=min(1.0, max(0.0, fraction)), description=stage, detail=detail)


@contextmanager
def show_progress(*, quiet: bool, whole: str = BUDGET) -> "Iterator[Progress]":
    """Give the tuner or a training somewhere to say what it is doing, for as long as it works.

    Args:
        quiet: Whether to show nothing.
        whole: What the fractions are of, in words.
    """
    if quiet:
        from rightbatch.tuner.request import SilentProgress

        yield SilentProgress()
        return
    if not sys.stderr.isatty():
        yield LineProgress(whole)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # Details hold names of the user's, so nothing in them may be taken for markup.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield BarProgress(bar, bar.add_task(escape("starting"), total=1.0, detail=""))
