"""How the report words numbers, intervals, lists and names that others chose."""

import re
import unicodedata
from collections.abc import Callable, Sequence

from rightbatch.records.estimates import Estimate, Status
from rightbatch.units import format_number, format_percent

_TIMES_FROM = 4.0
"""Ratios from here on are written as multiples, because +660 % is hard to picture."""
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=%|(?:B|KiB|MiB|GiB|TiB|us|ms|s|min|h)\b)")


def plain(text: str) -> str:
    """Return a name that others chose without control and direction characters, which could rewrite a terminal or a line."""
    return "".join(character if unicodedata.category(character)[0] != "C" else "?" for character in text)


def number(value: float) -> str:
    """Write a number with three significant digits and no trailing zeros: ``0.2``, ``480``."""
    text = format_number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def percent(fraction: float) -> str:
    """Write a fraction as a percentage without a trailing zero: ``5 %``, ``3.4 %``."""
    return format_percent(fraction).replace(".0 %", " %")


def signed_percent(fraction: float) -> str:
    """Write a change as a percentage with its sign: ``+14 %``."""
    sign = "-" if fraction < 0 else "+"
    return sign + percent(abs(fraction))


def estimate(value: Estimate, write: Callable[[float], str] = number) -> str:
    """Write an estimate with its interval: ``480 [350, 690]``, ``>= 200``, or ``unknown``."""
    if value.status is Status.AT_LEAST and value.low is not None:
        return f">= {write(value.low)}"
    if value.value is None:
        return "unknown"
    if value.low is None or value.high is None:
        return write(value.value)
    return f"{write(value.value)} [{write(value.low)}, {write(value.high)}]"


def excess(ratio: Estimate) -> str:
    """Write a ratio of costs as what one costs more: 1.14 is ``+14 % [+9, +19]``, 7.6 is ``7.6x [1.8, 15]``."""
    if ratio.value is None:
        return "unknown"
    if ratio.value == ratio.low == ratio.high == 1:
        return "the same"
    if ratio.value >= _TIMES_FROM:
        return f"{number(ratio.value)}x" + (
            "" if ratio.low is None or ratio.high is None else f" [{number(ratio.low)}, {number(ratio.high)}]"
        )
    text = signed_percent(ratio.value - 1)
    if ratio.low is None or ratio.high is None:
        return text
    low, high = (signed_percent(end - 1).removesuffix(" %") for end in (ratio.low, ratio.high))
    return f"{text} [{low}, {high}]"


def listed(words: Sequence[object]) -> str:
    """Join words the way a sentence does: ``64, 128 and 256``."""
    texts = [str(word) for word in words]
    return " and ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)


def split(micro_batch_size: int, accumulation_steps: int, world_size: int = 1) -> str:
    """Write how a global batch is cut: ``128 x 4``, ``128 x 4 x 2 ranks``."""
    ranks = f" x {world_size} ranks" if world_size > 1 else ""
    return f"{micro_batch_size} x {accumulation_steps}{ranks}"


def held_together(text: str, space: str = "\N{NO-BREAK SPACE}") -> str:
    """Return words with another space between each number and its unit, one at which no line is broken."""
    return _BEFORE_UNIT.sub(space, text)
