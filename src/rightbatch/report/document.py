"""What a report says, as plain data: neither a terminal's nor a page's, so that both say the same."""

from dataclasses import dataclass
from typing import Literal

VerdictStatus = Literal["ok", "inconclusive", "nothing_fits", "unstable"]
"""The statuses of a recommendation."""


@dataclass(frozen=True, kw_only=True)
class KeyNumber:
    """One number a reader looks for first."""

    label: str
    value: str
    note: str = ""
    """Interval, source or unit; may be empty."""


@dataclass(frozen=True, kw_only=True)
class SizeRow:
    """One batch size and what it costs, in words and as a bar."""

    global_batch_size: int
    split: str
    """Micro-batch size x accumulation steps."""
    samples_per_s: str
    relative_time: str
    """Time to target over that of the best size; empty when it was not predicted."""
    relative_samples: str
    """Samples to target over the least possible; empty when they were not predicted."""
    evidence: str
    bar_fraction: float
    """Length of the bar, 0 to 1: speed of progress towards the target, or throughput when that was not predicted."""
    mark: Literal["chosen", "equivalent", ""]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of words under a heading."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    behind_chart: bool = False
    """Whether it holds the numbers behind a chart: a page folds it away, a terminal leaves it out."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report."""

    key: Literal[
        "why", "advice", "branches", "sizes", "memory", "speed", "noise", "lr", "practice", "devices", "change", "limits", "provenance",
        "course", "batch", "time", "events", "critical", "generalisation", "cost", "swept",
    ]  # fmt: skip
    title: str
    sentences: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    """Points of a list, below the sentences."""
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Everything that a report says."""

    status: VerdictStatus
    workload: str
    answer: str
    """One line that can be used as it stands."""
    headline: str
    """The answer in one sentence."""
    lead: tuple[str, ...]
    """How sure the answer is, or what to do next when there is none."""
    key_numbers: tuple[KeyNumber, ...]
    sizes: tuple[SizeRow, ...]
    sections: tuple[Section, ...]
