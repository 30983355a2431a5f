"""Progress that is drawn over and over: on a terminal, or below the cell of a notebook. Elsewhere there is nothing to draw on."""

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rightbatch.units import format_duration_s

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rightbatch.sweeps.request import SweepStage

_STAGE_CELLS = len("gradient noise")
"""Of the longest stage: the bar begins at the same place in all of them."""
_NOTEBOOK_CELLS = 80
_REDRAWN_EVERY_S = 0.25
"""What is measured says far more, and drawing takes time from it."""


class Canvas(Protocol):
    """Where the same picture is drawn again and again."""

    def redraw(self, picture: "RenderableType") -> None:
        """Show the picture in the place of the one before."""

    def scroll(self, text: str) -> None:
        """Leave a line above the picture."""


class DrawnProgress:
    """Draws a bar of the whole beside the stage, and the detail in a line of its own, so that neither moves or hides the other."""

    def __init__(self, canvas: Canvas) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._canvas = canvas
        self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        self._task = self._bar.add_task("", total=1.0)
        self.update("starting", 0.0, "")

    def update(self, stage: str, fraction: float, detail: str) -> None:
        """Show a stage, the part of the whole that is done, and one line of detail; of one that is too long, what fits."""
        from rich.console import Group
        from rich.text import Text

        self._bar.update(self._task, completed=min(1.0, max(0.0, fraction)), description=f"{stage:<{_STAGE_CELLS}}")
        self._canvas.redraw(Group(self._bar, Text(detail, no_wrap=True, overflow="ellipsis")))


class DrawnSweep:
    """Draws what runs, how far the sweep is, and the best so far; news scroll past above."""

    def __init__(self, canvas: Canvas) -> None:
        self._canvas = canvas

    def update(self, stage: "SweepStage") -> None:
        """Show it."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        from rightbatch.sweeps.words import spec_words

        if stage.news:
            self._canvas.scroll(stage.news)
        lines = [Text(f"running: {spec_words(spec)}") for spec in stage.running]
        best = [Text(stage.best)] if stage.best else []
        bar = ProgressBar(total=max(stage.expected, 1), completed=stage.ended, width=40)
        self._canvas.redraw(Group(*lines, *best, Text(counted(stage)), bar))


def counted(stage: "SweepStage") -> str:
    """Say how far a sweep is."""
    left = "" if stage.left_s is None else f", about {format_duration_s(stage.left_s)} left"
    return f"{stage.ended} of about {stage.expected} trials{left}"


@contextmanager
def drawn_progress(*, quiet: bool) -> Iterator[DrawnProgress | None]:
    """Draw how a measurement or a training goes, for as long as it works; none where that cannot be drawn, or is not wanted."""
    with _canvas(quiet=quiet) as canvas:
        yield None if canvas is None else DrawnProgress(canvas)


@contextmanager
def drawn_sweep(*, quiet: bool) -> Iterator[DrawnSweep | None]:
    """Draw how a sweep goes, for as long as it runs; none where that cannot be drawn, or is not wanted."""
    with _canvas(quiet=quiet) as canvas:
        yield None if canvas is None else DrawnSweep(canvas)


@contextmanager
def _canvas(*, quiet: bool) -> Iterator[Canvas | None]:
    """Prepare what there is to draw on; of several ranks only the first draws."""
    from rightbatch.engine.ranks import is_lead

    if quiet or not is_lead():
        yield None
    elif _is_notebook():
        cell = _Cell()
        try:
            yield cell
        finally:
            cell.clear()
    elif _can_be_drawn_on(sys.stderr):
        with _terminal() as terminal:
            yield terminal
    else:
        yield None


def _can_be_drawn_on(stream: TextIO | None) -> bool:
    """Whether it is a terminal on which a line can be drawn again, and that has the characters of a bar."""
    if stream is None or not stream.isatty() or os.environ.get("TERM", "").lower() in {"dumb", "unknown"}:
        return False
    try:
        "━…·".encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _terminal() -> Iterator[Canvas]:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    # What is printed meanwhile scrolls past above the picture; where stdout is a file it stays there.
    is_shown = sys.stdout is not None and sys.stdout.isatty()
    with Live(console=console, transient=True, refresh_per_second=4, redirect_stdout=is_shown) as live:
        yield _Screen(live)


class _Screen:
    """A terminal. Rich draws the last picture four times a second."""

    def __init__(self, live: Any) -> None:
        self._live = live

    def redraw(self, picture: "RenderableType") -> None:
        self._live.update(picture)

    def scroll(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)


class _Cell:
    """The output of a notebook's cell, as text: any front end can replace that, without widgets.

    Args:
        clock_s: Seconds of any clock.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]  # loaded by whoever made the cell

        self._above = ""
        self._clock_s, self._drawn_s = clock_s, -math.inf
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def redraw(self, picture: "RenderableType") -> None:
        if self._clock_s() < self._drawn_s + _REDRAWN_EVERY_S:
            return
        from rich.console import Console

        paper = Console(file=io.StringIO(), width=_NOTEBOOK_CELLS, color_system=None, force_jupyter=False)
        with paper.capture() as captured:
            paper.print(picture)
        lines = captured.get().splitlines()
        self._show("\n".join(line.rstrip() for line in ([self._above, *lines] if self._above else lines)))
        self._drawn_s = self._clock_s()

    def scroll(self, text: str) -> None:
        """Keep the last line only: a cell does not scroll."""
        self._above = text

    def clear(self) -> None:
        """Leave nothing between the cell and its result."""
        self._show("")

    def _show(self, text: str) -> None:
        self._handle.update({"text/plain": text}, raw=True)


def _is_notebook() -> bool:
    """Whether this is the kernel of a notebook, which has imported IPython already."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
