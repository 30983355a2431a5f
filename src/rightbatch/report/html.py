"""The report as one self-contained page, and as a small fragment for notebooks."""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from rightbatch.records.plan import Findings
from rightbatch.report import charts
from rightbatch.report.document import Verdict
from rightbatch.report.phrases import held_together
from rightbatch.report.verdict import build_verdict

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart in the page: where it stands, what it shows in words, and its figure."""

    section: str
    title: str
    description: str
    """What a reader who does not see the chart should know; the table below it holds its numbers."""
    figure: go.Figure


def render_html(findings: Findings, *, now: datetime | None = None) -> str:
    """Return the report as one HTML page that loads nothing from anywhere.

    A content security policy with the hashes of the page's own two scripts backs the escaping: no other script runs, and no request leaves.

    Args:
        findings: What one run concluded.
        now: An aware time, to say how old the measurements are.
    """
    return render_page(build_verdict(findings, now=now), tuple(_charts(findings)))


def render_page(verdict: Verdict, drawn: tuple[Chart, ...]) -> str:
    """Return a page with these words and charts.

    Args:
        verdict: Everything that is said.
        drawn: Charts for its sections.
    """
    scripts = tuple(
        _script(text) for text in ((get_plotlyjs(),) if drawn else ()) + ((_TEMPLATES / "page.js").read_text(encoding="utf-8"),)
    )
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            verdict=verdict,
            charts=drawn,
            figures=[json.loads(chart.figure.to_json()) for chart in drawn],
            policy="; ".join(
                ("default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", f"script-src {' '.join(_digest(s) for s in scripts)}")
            ),
            scripts=scripts,
            style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - a file of the package
            light=charts.LIGHT_PAGE,
            dark=charts.DARK_PAGE,
        )
    )


def render_notebook(findings: Findings) -> str:
    """Return a small HTML fragment: the answer, the key numbers and the table of sizes, without charts or scripts."""
    return _environment().get_template("notebook.html.j2").render(verdict=build_verdict(findings))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: held_together(value) if type(value) is str else value,  # Markup is done already
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(words: str) -> Markup:
    """Return a table's words such that a long name can break at its underscores: a phone would hide the columns after it."""
    return escape(held_together(words)).replace("_", Markup("_<wbr>"))


def _script(text: str) -> Markup:
    """Return a script as the parser of a page will see it, so that its digest is the one the browser computes."""
    return Markup(text.replace("\r\n", "\n").replace("\r", "\n"))  # noqa: S704 - plotly.js or a file of the package


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _charts(findings: Findings) -> Iterator[Chart]:
    recommendation, tradeoff = findings.recommendation, findings.tradeoff
    chosen = recommendation.plan.global_batch_size if recommendation.plan else None
    if tradeoff is not None and any(point.relative_time.value is not None for point in tradeoff.points):
        cost = charts.cost_chart(tradeoff, chosen, recommendation.equivalent_batch_sizes)
        yield Chart(
            section="sizes",
            title="Predicted time to target by batch size",
            figure=cost,
            description="Time to target over batch size with its 90 % interval; the choice is marked, sizes as good are shaded.",
        )
        yield Chart(
            section="sizes",
            title="Time against samples",
            figure=charts.pareto_chart(tradeoff, chosen),
            description="Time to target against samples to target, one point a batch size: towards the lower left is better.",
        )
    if findings.memory is not None and findings.memory.curve:
        yield Chart(
            section="memory",
            title="Memory by micro-batch size",
            figure=charts.memory_chart(findings.memory),
            description="Memory over micro-batch size: calibrated trace, measured sizes, the limit and the ceiling.",
        )
    if findings.step_time is not None and findings.step_time.points:
        yield Chart(
            section="speed",
            title="Throughput by micro-batch size",
            figure=charts.speed_chart(findings.step_time, findings.loader),
            description="Samples per second over micro-batch size with 95 % intervals, the fit, the knee and the data loader.",
        )
    if findings.noise_scale is not None and any(snapshot.noise_scale.value is not None for snapshot in findings.noise_scale.snapshots):
        yield Chart(
            section="noise",
            title="Noise scale along the pilot run",
            figure=charts.noise_chart(findings.noise_scale),
            description="Simple noise scale over samples seen with 95 % intervals, and the value of the run.",
        )
