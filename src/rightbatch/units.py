"""Words for numbers, and numbers from words: the only place that rounds.

Bytes are binary (1 KiB = 2**10 bytes); durations are seconds; a number's unit ends its name.
"""

import math
import re

KIB = 2**10
MIB = 2**20
GIB = 2**30

_BYTE_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40,
               "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "k": KIB, "m": MIB, "g": GIB, "t": 2**40}  # fmt: skip
_DURATION_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "ms": 1e-3}
_QUANTITY = re.compile(r"\s*([0-9]{0,18}\.?[0-9]{1,18})\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Read a size such as ``24GiB``, ``512 MiB`` or ``1000000``.

    Raises:
        ValueError: The text is not a positive number followed by a known unit.
    """
    number, unit = _parse_quantity(text, tuple(_BYTE_UNITS), example="24GiB")
    return int(number * _BYTE_UNITS[unit])


def parse_duration_s(text: str) -> float:
    """Read a duration such as ``90``, ``90s``, ``2m`` or ``1h``, in seconds.

    Raises:
        ValueError: The text is not a positive number followed by a known unit.
    """
    number, unit = _parse_quantity(text, tuple(_DURATION_UNITS_S), example="2m")
    return number * _DURATION_UNITS_S[unit]


def _parse_quantity(text: str, units: tuple[str, ...], *, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in units or float(match[1]) <= 0:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"a positive number and one of the units {known} is needed; got {text!r}; write it like {example}.")
    return float(match[1]), match[2].lower()


def format_bytes(size_bytes: float) -> str:
    """Write a size with three significant digits and a binary unit: ``1.62 GiB``."""
    for unit, factor in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= factor:
            return f"{format_number(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} B"


def format_duration_s(duration_s: float) -> str:
    """Write a duration with the unit a person would pick: ``1.83 ms``, ``42.0 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if duration_s < 1e-3:
        return f"{format_number(duration_s * 1e6)} us"
    if duration_s < 1:
        return f"{format_number(duration_s * 1e3)} ms"
    if duration_s < 120:
        return f"{format_number(duration_s)} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} days {hours % 24} h"


def format_number(value: float, significant_digits: int = 3) -> str:
    """Write a number with so many significant digits, never in exponent form below a million: ``1640``, ``0.0125``, ``7.30``."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.{significant_digits}g}"
    decimals = max(0, significant_digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return f"{value:,.0f}" if decimals == 0 and abs(value) >= 1e5 else text


def format_percent(fraction: float) -> str:
    """Write a fraction as a percentage: ``0.034`` is ``3.4 %``, ``0.61`` is ``61 %``."""
    percent = 100 * fraction
    return f"{percent:.1f} %" if abs(percent) < 10 else f"{percent:.0f} %"


def format_ago_s(age_s: float) -> str:
    """Write how long ago something was: ``just now``, ``5 min ago``, ``3 days ago``."""
    if age_s < 60:
        return "just now"
    for unit, length_s in (("day", 86400), ("h", 3600), ("min", 60)):
        count = int(age_s // length_s)
        if count:
            return f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''} ago"
    raise AssertionError("unreachable: any age of a minute or more has a unit")
