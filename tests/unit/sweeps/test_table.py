import csv
import io

import pytest

from planted_sweeps import SIZES, Law, settings_of, step_time_s, sweep
from replay_traces import read_zeus
from rightbatch.sweeps.table import HEADER, tidy_table


def table(law, settings, step_times=None):
    trials = sweep(law, settings)
    return tidy_table(settings, trials, workload="Planted", device="cpu", train_size=2000, step_times_s=step_times)


def test_there_is_a_row_for_every_seed_at_the_best_rate_of_a_size():
    rows = list(csv.DictReader(io.StringIO(table(Law(), settings_of()))))

    assert tuple(rows[0]) == HEADER
    assert [int(row["batch_size"]) for row in rows] == [size for size in SIZES for _ in range(3)]
    assert {row["seed"] for row in rows} == {"0", "1", "2"}


def test_a_size_that_never_arrived_has_a_row_without_epochs():
    rows = list(csv.DictReader(io.StringIO(table(Law(largest=64), settings_of()))))

    assert [row["epochs_to_target"] for row in rows if row["batch_size"] == "128"] == [""]


def test_the_replay_reads_it(tmp_path):
    law = Law(noise=0.0, sharpness=0.0)
    (tmp_path / "tidy.csv").write_text(table(law, settings_of(), {size: step_time_s(size) for size in SIZES}))

    (cell,) = read_zeus(tmp_path)

    assert cell.sizes.tolist() == list(SIZES)
    assert cell.work[0][0] * 2000 == pytest.approx(4000 * (1 + 8 / 120), rel=1e-4)
    assert cell.seconds[0] == pytest.approx(2000 / 8 * step_time_s(8), rel=1e-4)
