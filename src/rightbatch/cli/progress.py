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

_LINE_EVERY_FRACTION = 0.05


class LineProgress:
    """Writes a line when a stage begins, and again whenever another twentieth of the budget is used."""

    def __init__(self) -> None:
        self._stage = ""
        self._next_fraction = 0.0

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Write the stage, the part of the budget that is used, and the detail, unless a line said nearly the same."""
        if stage == self._stage and fraction < self._next_fraction:
            return
        self._stage, self._next_fraction = stage, fraction + _LINE_EVERY_FRACTION
        text = f"{stage}: {detail}" if detail else stage
        say(f"{text} ({format_percent(fraction)} of the budget used)")


class BarProgress:
    """Draws a bar of the budget with the stage and the detail beside it."""

    def __init__(self, bar: "RichProgress", task: "TaskID") -> None:
        self._bar = bar
        self._task = task

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Move the bar to the part of the budget that is used."""
        self._bar.update(self._task, completed=min(1.0, max(0.0, fraction)), description=stage, detail=detail)


@contextmanager
def show_progress(*, quiet: bool) -> "Iterator[Progress]":
    """Give the tuner somewhere to say what it is doing, for as long as it works."""
    if quiet:
        from rightbatch.tuner.request import SilentProgress

        yield SilentProgress()
        return
    if not sys.stderr.isatty():
        yield LineProgress()
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
