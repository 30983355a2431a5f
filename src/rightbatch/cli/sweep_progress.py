"""Progress of a sweep on stderr: a live table on a terminal, lines elsewhere, nothing when it is not wanted."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rightbatch.cli.output import say
from rightbatch.units import format_duration_s

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from rightbatch.sweeps.request import SweepProgress, SweepStage


class LineSweep:
    """Writes a line for everything that happens."""

    def update(self, stage: "SweepStage") -> None:
        """Write the news, and how far the sweep is."""
        if stage.news:
            say(f"{stage.news} ({counted(stage)})")


class LiveSweep:
    """Redraws what runs, how far the sweep is, and the best so far; news scroll past above."""

    def __init__(self, live: "Live", console: "Console") -> None:
        self._live, self._console = live, console

    def update(self, stage: "SweepStage") -> None:
        """Show it."""
        if stage.news:
            self._console.print(stage.news, markup=False, highlight=False)
        self._live.update(drawn(stage))


def counted(stage: "SweepStage") -> str:
    """Say how far the sweep is."""
    left = "" if stage.left_s is None else f", about {format_duration_s(stage.left_s)} left"
    return f"{stage.ended} of about {stage.expected} trials{left}"


def drawn(stage: "SweepStage") -> "RenderableType":
    """Return how a sweep goes as a rich renderable."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    from rightbatch.sweeps.words import spec_words

    lines = [Text(f"running: {spec_words(spec)}") for spec in stage.running]
    best = [Text(stage.best)] if stage.best else []
    return Group(*lines, *best, Text(counted(stage)), ProgressBar(total=max(stage.expected, 1), completed=stage.ended, width=40))


@contextmanager
def show_sweep(*, quiet: bool) -> "Iterator[SweepProgress]":
    """Give a sweep somewhere to say how it goes, for as long as it runs."""
    if quiet:
        from rightbatch.sweeps.request import SilentSweep

        yield SilentSweep()
        return
    if not sys.stderr.isatty():
        yield LineSweep()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, transient=True, refresh_per_second=4) as live:
        yield LiveSweep(live, console)
