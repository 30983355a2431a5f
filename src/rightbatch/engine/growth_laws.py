"""How many bytes one allocation takes at any size, from what it took at a few: a polynomial, or one that grows in steps."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from rightbatch.engine.recurrent_workspace import PAGE_BYTES

Polynomial = tuple[int, int, int, int]
"""(bytes fixed, per sample, per sample squared, per sample cubed)."""
Law = tuple[Polynomial, int]
"""A polynomial, and the multiple that its value is rounded up to."""

_MOST_PARTS = 9
"""Parts of a recurrent layer's workspace that oneDNN starts on a page of their own, at most (``set_offsets`` in its ``rnn_utils``)."""
_STEPPED_RECORDINGS = 6
_STEP_WIDTHS = (2, 3, 4)
"""Fractions of a batch that are tried; sizes of every remainder tell the shifts apart."""


def polynomial_through(sizes: Sequence[int], values: Sequence[int]) -> Polynomial | None:
    """Return the polynomial of the lowest degree, at most three, that all values follow and at least one more than needed confirms.

    Args:
        sizes: At least two micro-batch sizes, all different.
        values: Bytes at each.

    Returns:
        The polynomial; none when there is none in whole bytes.
    """
    return _affine(sizes, values) or _polynomial(sizes, values, 2) or _polynomial(sizes, values, 3)


def steps_through(sizes: Sequence[int], values: Sequence[int]) -> Law | None:
    """Return the law value(b) = step * floor((b + shift) / width), written as a line that is rounded up.

    floor((b + shift) / width) * step is step / width * (b + shift - width + 1) rounded up to a multiple of the step.

    Args:
        sizes: Micro-batch sizes; fewer than six confirm nothing.
        values: Bytes at each.

    Returns:
        The law; none when no such law, or more than one, has these values.
    """
    if len(sizes) < _STEPPED_RECORDINGS:
        return None
    shifts = [(width, shift) for width in _STEP_WIDTHS for shift in range(1 - width, width)]
    found = []
    for width, shift in shifts:
        counts = [(size + shift) // width for size in sizes]
        step = values[-1] // counts[-1] if counts[-1] > 0 else 0
        if step > 0 and step % width == 0 and all(count * step == value for count, value in zip(counts, values, strict=True)):
            found.append(((step // width * (shift - width + 1), step // width, 0, 0), step))
    return found[0] if len(found) == 1 else None


def page_bound(sizes: Sequence[int], values: Sequence[int]) -> Law:
    """Return an upper bound at every size for a workspace made of parts that are each rounded up to pages of P bytes.

    Parts of s_i b bytes, S = sum s_i, take S b <= value(b) <= S b + k (P - 1). The least of value(b) / b is no less than S, and each of
    the k parts takes a page at least. The s_i themselves do not follow from a few sums of rounded parts.
    """
    slope = min(-(-value // size) for size, value in zip(sizes, values, strict=True))
    parts = max(1, min(_MOST_PARTS, min(values) // PAGE_BYTES))
    return ((parts - 1) * (PAGE_BYTES - 1), slope, 0, 0), PAGE_BYTES


def value_at(law: Polynomial, size: int) -> int:
    """Return the value of a polynomial at a size."""
    return law[0] + size * (law[1] + size * (law[2] + size * law[3]))


def rounded_up(size_bytes: int, multiple: int) -> int:
    """Return the least multiple that is no less."""
    return -(-size_bytes // multiple) * multiple


def _affine(sizes: Sequence[int], values: Sequence[int]) -> Polynomial | None:
    slope, remainder = divmod(values[1] - values[0], sizes[1] - sizes[0])
    law = (values[0] - slope * sizes[0], slope, 0, 0)
    return None if remainder or not _holds(law, sizes, values) else law


def _polynomial(sizes: Sequence[int], values: Sequence[int], degree: int) -> Polynomial | None:
    """Return the polynomial through the first sizes by Newton's divided differences, if it is one in integers and one more confirms it."""
    if len(sizes) < degree + 2:
        return None
    differences = [Fraction(value) for value in values[: degree + 1]]
    for order in range(1, degree + 1):
        for place in range(degree, order - 1, -1):
            differences[place] = (differences[place] - differences[place - 1]) / (sizes[place] - sizes[place - order])
    law = [Fraction(0)] * 4
    for size, difference in zip(sizes[degree::-1], reversed(differences), strict=True):
        law = [difference - size * law[0], *(lower - size * same for lower, same in pairwise(law))]
    if any(coefficient.denominator != 1 for coefficient in law):
        return None
    whole = (int(law[0]), int(law[1]), int(law[2]), int(law[3]))
    return whole if _holds(whole, sizes, values) else None


def _holds(law: Polynomial, sizes: Sequence[int], values: Sequence[int]) -> bool:
    return all(value_at(law, b) == v for b, v in zip(sizes, values, strict=True))
