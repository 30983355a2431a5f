import math

import numpy as np
import pytest

from rightbatch.fits.intervals import median_estimate, student_quantile
from rightbatch.records.estimates import Status

DRAWS = 1000


@pytest.mark.parametrize("rounds", [2, 3, 4, 5])
def test_few_rounds_hold_their_median_in_95_percent_of_cases(rounds):
    rng = np.random.default_rng(rounds)

    found = [median_estimate(np.exp(0.05 * rng.standard_normal(rounds)).tolist(), rng) for _ in range(DRAWS)]

    held = np.mean([estimate.low <= 1 <= estimate.high for estimate in found])
    assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / DRAWS)


def test_rounds_that_agree_leave_no_interval_beside_them():
    estimate = median_estimate([0.5, 0.5, 0.5], np.random.default_rng(0))

    assert estimate.low == pytest.approx(0.5) == estimate.high
    assert estimate.low <= estimate.value <= estimate.high


def test_one_round_has_no_interval_and_none_is_indeterminate():
    rng = np.random.default_rng(0)

    one, none = median_estimate([0.5], rng), median_estimate([], rng)

    assert (one.value, one.low, one.high, one.n) == (0.5, None, None, 1)
    assert (none.value, none.status) == (None, Status.INDETERMINATE)


def test_the_quantile_is_that_of_the_tables():
    assert student_quantile(2) == pytest.approx(4.303, abs=1e-3)
    assert student_quantile(9, 0.01) == pytest.approx(3.250, abs=1e-3)
    assert student_quantile(1e9) == pytest.approx(1.95996, abs=1e-4)
