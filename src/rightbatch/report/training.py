"""The report of a training, for a terminal and as one self-contained page. Never imports torch."""

from collections.abc import Sequence
from datetime import datetime

from rightbatch.records.training_log import LogLine
from rightbatch.records.training_run import TrainingManifest
from rightbatch.report.html import render_page
from rightbatch.report.text import render_verdict
from rightbatch.report.training_charts import training_charts
from rightbatch.report.training_verdict import build_training_verdict


def render_training_html(manifest: TrainingManifest, lines: Sequence[LogLine], *, now: datetime | None = None) -> str:
    """Return the report of a training as one HTML page that loads nothing from anywhere.

    Args:
        manifest: What was asked, and how it ended.
        lines: Its log.
        now: An aware time, to say how long ago it was.
    """
    return render_page(build_training_verdict(manifest, lines, now=now), tuple(training_charts(manifest, lines)))


def render_training_text(
    manifest: TrainingManifest, lines: Sequence[LogLine], *, width: int = 80, colour: bool, now: datetime | None = None
) -> str:
    """Return the report of a training as text, the answer first.

    Args:
        manifest: What was asked, and how it ended.
        lines: Its log.
        width: Columns; no line is longer.
        colour: Whether to write ANSI colours.
        now: An aware time, to say how long ago it was.
    """
    return render_verdict(build_training_verdict(manifest, lines, now=now), width=width, colour=colour)
