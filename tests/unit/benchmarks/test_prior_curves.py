"""The two bends of E(b), fitted to trainings: a planted law comes back, and sizes over the customary one."""

import csv

import numpy as np
import pytest

from prior_curves import curves, fit
from prior_traces import HEADER

SIZES = tuple(2**power for power in range(2, 13))
LOW, CRITICAL, BASE = 16.0, 512.0, 64


def epochs(size):
    return 3 * (1 + size / CRITICAL) * (1 + LOW / size)


def test_a_planted_law_comes_back():
    low, critical, sharpness, residual = fit(SIZES, np.log([epochs(size) for size in SIZES]))

    assert (low, critical, sharpness) == pytest.approx((LOW, CRITICAL, 1.0), rel=0.2)
    assert residual < 0.02


def test_the_bend_at_small_sizes_never_lies_above_the_other():
    falling = np.log([1 + 1e6 / size for size in SIZES])

    low, critical, _, _ = fit(SIZES, falling)

    assert low <= critical


def write(path, missing=()):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for size in SIZES:
            for seed, factor in enumerate((0.9, 1.1)):
                needed = "" if (size, seed) in missing else epochs(size) * factor
                writer.writerow(("d/net/adam", "coupled", "Adam", size, 0.1, BASE, seed, "0.9", needed))


def test_bends_are_told_over_the_customary_size(tmp_path):
    write(tmp_path / "traces.csv")

    (one,) = curves(tmp_path / "traces.csv")

    assert (one.low, one.critical) == pytest.approx((LOW / BASE, CRITICAL / BASE), rel=0.2)
    assert one.eighth == pytest.approx(epochs(BASE / 8) / epochs(BASE))
    assert one.run_log_sd == pytest.approx(np.log(1.1 / 0.9) / np.sqrt(2))


def test_a_size_at_which_a_seed_never_arrived_is_left_out(tmp_path):
    write(tmp_path / "traces.csv", missing={(BASE // 8, 0)})

    (one,) = curves(tmp_path / "traces.csv")

    assert one.eighth is None
