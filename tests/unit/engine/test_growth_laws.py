"""The law of an allocation: exact where enough sizes confirm it, never where they do not, and a bound where pages hide it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rightbatch.engine.growth_laws import page_bound, polynomial_through, rounded_up, steps_through, value_at

SIZES = (2, 3, 5, 7, 72, 113)
coefficients = st.integers(-50, 500)


@settings(deadline=None, derandomize=True)
@given(st.tuples(coefficients, coefficients, coefficients, coefficients))
def test_the_polynomial_of_all_sizes_is_recovered(law):
    assert polynomial_through(SIZES, [value_at(law, size) for size in SIZES]) == law


@pytest.mark.parametrize(("degree", "needed"), [(1, 3), (2, 4), (3, 5)])
def test_a_polynomial_needs_one_size_more_than_it_has_coefficients(degree, needed):
    def values(sizes):
        return [7 * size**degree + 1 for size in sizes]

    law = polynomial_through(SIZES[:needed], values(SIZES[:needed]))
    assert law is not None
    assert law[degree] == 7
    broken = [*values(SIZES[: needed - 1]), values(SIZES)[needed - 1] + 1]
    assert polynomial_through(SIZES[:needed], broken) is None


def test_coefficients_that_are_no_whole_bytes_are_no_law():
    assert polynomial_through(SIZES, [size * (size - 1) // 2 for size in SIZES]) is None


@pytest.mark.parametrize("law", [lambda b: 8 * (b // 2), lambda b: 8 * -(-b // 2), lambda b: 12 * ((b + 1) // 3), lambda b: 64 * (b // 4)])
def test_steps_of_a_fraction_of_the_batch_are_recovered(law):
    polynomial, multiple = steps_through(SIZES, [law(size) for size in SIZES])
    for size in range(1, 500):
        assert rounded_up(value_at(polynomial, size), multiple) == law(size)


@pytest.mark.parametrize("law", [lambda b: 8 << b.bit_length(), lambda b: 8 * (b * 3 // 10), lambda b: 8 * (b % 7), lambda _: 0])
def test_what_has_no_steps_of_equal_width_is_no_law(law):
    assert steps_through(SIZES, [law(size) for size in SIZES]) is None


def test_two_shifts_that_no_recorded_size_tells_apart_are_no_law():
    sizes = (2, 3, 5, 7, 75, 113)
    assert [size // 4 for size in sizes] == [(size - 1) // 4 for size in sizes]
    assert steps_through(sizes, [64 * (size // 4) for size in sizes]) is None


def test_five_sizes_are_too_few_for_steps():
    assert steps_through(SIZES[:5], [8 * (size // 2) for size in SIZES[:5]]) is None


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=7))
def test_the_bound_of_a_workspace_in_pages_is_never_exceeded(per_sample):
    def workspace(size):
        return sum(rounded_up(part * size, 4096) for part in per_sample)

    law, multiple = page_bound((1, 2, 113), [workspace(size) for size in (1, 2, 113)])
    for size in (1, 2, 3, 5, 17, 100, 113, 500, 1024, 4097):
        assert workspace(size) <= rounded_up(value_at(law, size), multiple)
