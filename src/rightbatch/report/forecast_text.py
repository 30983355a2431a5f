"""The forecast for absent GPUs, for a terminal: a table, then what it rests on."""

import textwrap

from rightbatch.records.estimates import GpuCeiling, MemoryForecast
from rightbatch.report.phrases import listed, plain
from rightbatch.units import format_bytes, format_number

_HEADER = ("GPU", "memory", "smooth ceiling", "range", "hard ceiling", "reserved")
_GAP = "  "
_INDENT = "  "
_LARGEST_WRITTEN_OUT = 10**7
"""Larger ends of a range are rounded, so that the table keeps to 80 columns."""


def render_forecast(forecast: MemoryForecast, *, width: int = 80, expected: int | None = None) -> str:
    """Return the forecast as text.

    Args:
        forecast: Ceilings by GPU, and remarks.
        width: Columns to which sentences are broken.
        expected: The micro-batch size that is asked for, judged in the last paragraph.
    """
    parts = [_table(forecast.ceilings)] if forecast.ceilings else []
    if forecast.ceilings:
        where = f" in {plain(forecast.peak_module)}" if forecast.peak_module else ""
        operation = f" ({plain(forecast.peak_operation)})" if forecast.peak_operation else ""
        peak = f" The peak is{where}{operation}." if where or operation else ""
        parts.append(_wrapped(f"One sample reserves {format_bytes(forecast.bytes_at_one)}.{peak}", width))
    parts.append("\n".join(_wrapped(plain(remark), width, bullet="- ") for remark in forecast.remarks))
    if expected is not None and forecast.ceilings:
        parts.append("\n".join(_wrapped(sentence, width) for sentence in expectation(forecast, expected)))
    return "\n\n".join(part for part in parts if part) + "\n"


def holds(forecast: MemoryForecast, expected: int) -> bool:
    """Whether the size is within the smooth ceiling of every GPU."""
    return all(expected <= (ceiling.smooth_ceiling or 0) for ceiling in forecast.ceilings)


def expectation(forecast: MemoryForecast, expected: int) -> tuple[str, ...]:
    """Say of every GPU that falls short why it does, and where a size that fits is within the uncertainty."""
    short = [ceiling for ceiling in forecast.ceilings if expected > (ceiling.smooth_ceiling or 0)]
    close = [ceiling for ceiling in forecast.ceilings if ceiling not in short and expected > (ceiling.low or 0)]
    sentences = [_shortfall(ceiling, expected) for ceiling in short]
    if not short:
        sentences.append(f"{expected} samples should fit on {listed([plain(ceiling.gpu) for ceiling in forecast.ceilings])}.")
    if close:
        names = listed([f"{plain(ceiling.gpu)} ({_range(ceiling)})" for ceiling in close])
        sentences.append(f"{expected} is within the range of the forecast for {names}: try it there before relying on it.")
    return tuple(sentences)


def _shortfall(ceiling: GpuCeiling, expected: int) -> str:
    gpu = plain(ceiling.gpu)
    if ceiling.smooth_ceiling is None:
        if ceiling.hard_ceiling is None:
            return f"{gpu} falls short: not even one sample should fit."
        return f"{gpu} falls short: no size is free of retries; {ceiling.hard_ceiling} is the largest that should fit at all."
    retries = " (it may fit with retries, at a loss of speed)" if expected <= (ceiling.hard_ceiling or 0) else ""
    return f"{gpu} falls short: {expected} samples exceed its smooth ceiling of {ceiling.smooth_ceiling}, range {_range(ceiling)}{retries}."


def _range(ceiling: GpuCeiling) -> str:
    return f"{_size(ceiling.low)} to {_size(ceiling.high)}"


def _size(size: int | None) -> str:
    return "none" if size is None else str(size)


def _short(size: int | None) -> str:
    return _size(size) if size is None or size < _LARGEST_WRITTEN_OUT else format_number(size)


def _table(ceilings: tuple[GpuCeiling, ...]) -> str:
    rows = [
        _HEADER,
        *(
            (
                plain(ceiling.gpu),
                format_bytes(ceiling.total_bytes),
                _size(ceiling.smooth_ceiling),
                f"{_short(ceiling.low)}-{_short(ceiling.high)}",
                _size(ceiling.hard_ceiling),
                format_bytes(ceiling.peak_reserved_bytes) if ceiling.smooth_ceiling is not None else "-",
            )
            for ceiling in ceilings
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(_GAP.join(cells).rstrip())
    return "\n".join(lines)


def _wrapped(text: str, width: int, *, bullet: str = "") -> str:
    return textwrap.fill(
        text,
        width=width,
        initial_indent=bullet,
        subsequent_indent=_INDENT if bullet else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
