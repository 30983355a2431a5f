"""The report for a terminal: the answer first, readable at 80 columns, without colour, and through a pipe."""

import io
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from rightbatch.records.plan import Findings
from rightbatch.report.document import Section, SizeRow, Table, Verdict, VerdictStatus
from rightbatch.report.phrases import held_together
from rightbatch.report.verdict import build_verdict

_STATUS_STYLE: dict[VerdictStatus, str] = {"ok": "green", "inconclusive": "yellow", "unstable": "red", "nothing_fits": "red"}
_MARKS = {"chosen": "▶", "equivalent": "≈", "": " "}
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR_CELLS = 16
_UNBROKEN = "\ue000"
"""Stands for a space while lines are broken, since rich breaks them at no-break spaces too; of private use, so no words have it."""


def render_text(findings: Findings, *, width: int = 80, colour: bool, now: datetime | None = None) -> str:
    """Return the report as text.

    Args:
        findings: What one run concluded.
        width: Columns; no line is longer, so the answer line is broken at its separators when it must be.
        colour: Whether to write ANSI colours.
        now: An aware time, to say how old the measurements are.
    """
    return render_verdict(build_verdict(findings, now=now), width=width, colour=colour)


def render_verdict(verdict: Verdict, *, width: int, colour: bool) -> str:
    """Return words laid out for a terminal.

    Args:
        verdict: Everything that is said.
        width: Columns.
        colour: Whether to write ANSI colours.
    """
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None, no_color=not colour,
        legacy_windows=False, force_jupyter=False, highlight=False, emoji=False, markup=False, _environ={},
    )  # fmt: skip
    with console.capture() as capture:
        console.print(_laid_out(verdict))
    return "\n".join(line.rstrip() for line in capture.get().replace(_UNBROKEN, " ").splitlines()).rstrip() + "\n"


def _laid_out(verdict: Verdict) -> RenderableType:
    parts: list[RenderableType] = [_answer(verdict)]
    for section in verdict.sections:
        parts.extend((Text(""), Text(section.title, style="bold"), *_body(section, verdict)))
    return Group(*parts)


def _answer(verdict: Verdict) -> RenderableType:
    style = _STATUS_STYLE[verdict.status]
    lines = [_words(part, style=f"bold {style}" if place == 0 else "") for place, part in enumerate(_broken(verdict.answer))]
    lines.append(Text(""))
    lines.append(_words(verdict.headline))
    lines.extend(_words(sentence) for sentence in verdict.lead)
    return Group(*lines)


def _words(text: str, style: str = "") -> Text:
    return Text(held_together(text, _UNBROKEN), style=style)


def _broken(answer: str) -> tuple[str, ...]:
    """Break the answer line after the plan, where a reader would."""
    plan, separator, rest = answer.partition(" · ")
    return (plan, rest) if separator else (plan,)


def _body(section: Section, verdict: Verdict) -> list[RenderableType]:
    parts: list[RenderableType] = [Padding(_words(sentence), (0, 0, 0, 2)) for sentence in section.sentences]
    parts.extend(_item(item) for item in section.items)
    if section.key == "sizes" and verdict.sizes:
        parts.append(_size_table(verdict.sizes))
    shown = [table for table in section.tables if not table.behind_chart]
    for table in shown:
        if len(shown) > 1:
            parts.append(Padding(Text(table.caption, style="italic"), (1, 0, 0, 2)))
        parts.append(_table(table))
    return parts


def _item(text: str) -> RenderableType:
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    grid.add_row(Text("  -"), _words(text))
    return grid


def _table(table: Table) -> RenderableType:
    grid = RichTable(box=None, show_header=len(table.header) > 2, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for heading in table.header:
        grid.add_column(Text(heading, style="dim"), overflow="fold")
    for row in table.rows:
        grid.add_row(*(_words(cell, style="dim" if place == 0 and len(row) == 2 else "") for place, cell in enumerate(row)))
    return Padding(grid, (0, 0, 0, 2))


def _size_table(rows: tuple[SizeRow, ...]) -> RenderableType:
    costs = any(row.relative_time for row in rows)
    grid = RichTable(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column("")
    for heading in ("batch", "micro x acc", "samples/s", *(("time", "samples") if costs else ())):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("progress per second" if costs else "throughput", no_wrap=True)
    for row in rows:
        numbers = (row.relative_time, row.relative_samples) if costs else ()
        cells = (_MARKS[row.mark], str(row.global_batch_size), row.split, row.samples_per_s, *numbers, _bar(row.bar_fraction))
        style = {"chosen": "bold green", "equivalent": "green", "": ""}[row.mark]
        grid.add_row(*(Text(cell, style=style) for cell in cells))
    parts: list[RenderableType] = [grid]
    shown = {row.mark for row in rows}
    keys = [words for mark, words in (("chosen", "▶ the choice"), ("equivalent", "≈ as good")) if mark in shown]
    if keys:
        parts.append(Text("   ".join(keys), style="dim"))
    return Padding(Group(*parts), (0, 0, 0, 2))


def _bar(fraction: float) -> str:
    eighths = round(fraction * _BAR_CELLS * 8)
    full, rest = divmod(max(eighths, 1), 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")
