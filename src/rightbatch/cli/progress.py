"""Progress on stderr: a bar on a terminal, lines elsewhere, nothing when it is not wanted."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rightbatch.cli.output import say
from rightbatch.units import format_percent

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from rightbatch.tuner.request import Progress

BUDGET = "the budget used"
_LINE_EVERY_FRACTION = 0.05
_STAGE_CELLS = len("gradient noise")
"""Of the longest stage: the bar begins at the same place in all of them."""


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
    """Draws a bar of the whole beside the stage, and the detail in a line of its own, so that neither moves or hides the other.

    Args:
        bar: Draws the bar.
        task: What it is of.
    """

    def __init__(self, bar: "RichProgress", task: "TaskID") -> None:
        self._bar = bar
        self._task = task
        self._detail = ""

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Move the bar to the part of the whole that is done."""
        self._detail = detail
        self._bar.update(self._task, completed=min(1.0, max(0.0, fraction)), description=f"{stage:<{_STAGE_CELLS}}")

    def drawn(self) -> "RenderableType":
        """Return both lines; of a detail that is too long, what fits."""
        from rich.console import Group
        from rich.text import Text

        return Group(self._bar, Text(self._detail, no_wrap=True, overflow="ellipsis"))


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
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), console=console)
    shown = BarProgress(bar, bar.add_task(f"{'starting':<{_STAGE_CELLS}}", total=1.0))
    with Live(get_renderable=shown.drawn, console=console, transient=True, refresh_per_second=4):
        yield shown
