"""The report of a sweep, for a terminal and as one self-contained page. Never imports torch."""

from rightbatch.records.sweep import SweepResult
from rightbatch.report.html import render_page
from rightbatch.report.sweep_charts import sweep_charts
from rightbatch.report.sweep_verdict import build_sweep_verdict
from rightbatch.report.text import render_verdict


def render_sweep_html(result: SweepResult) -> str:
    """Return the report of a sweep as one HTML page that loads nothing from anywhere."""
    return render_page(build_sweep_verdict(result), tuple(sweep_charts(result)))


def render_sweep_text(result: SweepResult, *, width: int = 80, colour: bool) -> str:
    """Return the report of a sweep as text, the answer first.

    Args:
        result: What the sweep came to.
        width: Columns; no line is longer.
        colour: Whether to write ANSI colours.
    """
    return render_verdict(build_sweep_verdict(result), width=width, colour=colour)
