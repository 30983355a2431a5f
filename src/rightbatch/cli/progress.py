"""Progress on stderr: drawn on a terminal, lines elsewhere, nothing when it is not wanted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rightbatch.cli.output import say
from rightbatch.progress import counted, drawn_progress, drawn_sweep
from rightbatch.units import format_percent

if TYPE_CHECKING:
    from rightbatch.sweeps.request import SweepProgress, SweepStage
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


class LineSweep:
    """Writes a line for everything that happens."""

    def update(self, stage: "SweepStage") -> None:
        """Write the news, and how far the sweep is."""
        if stage.news:
            say(f"{stage.news} ({counted(stage)})")


@contextmanager
def show_progress(*, quiet: bool, whole: str = BUDGET) -> "Iterator[Progress]":
    """Give the tuner or a training somewhere to say what it is doing, for as long as it works.

    Args:
        quiet: Whether to show nothing.
        whole: What the fractions are of, in words.
    """
    from rightbatch.tuner.request import SilentProgress

    with drawn_progress(quiet=quiet) as drawn:
        yield drawn or (SilentProgress() if quiet else LineProgress(whole))


@contextmanager
def show_sweep(*, quiet: bool) -> "Iterator[SweepProgress]":
    """Give a sweep somewhere to say how it goes, for as long as it runs."""
    from rightbatch.sweeps.request import SilentSweep

    with drawn_sweep(quiet=quiet) as drawn:
        yield drawn or (SilentSweep() if quiet else LineSweep())
