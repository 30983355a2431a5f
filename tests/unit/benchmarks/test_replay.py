import csv
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def replay():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("replay")
    finally:
        sys.path.remove(str(BENCHMARKS))


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def zeus_rows(workload="net", *, rate="0.1", needed=lambda size: 10 + size / 20, seeds=3):
    return [
        {
            "workload": workload,
            "device": "v100",
            "target": "0.9",
            "batch_size": size,
            "seed": seed,
            "lr": rate,
            "epochs_to_target": needed(size) if math.isfinite(needed(size)) else "",
            "epoch_time_s": 100 + 6400 / size,
            "power_w": 200,
        }
        for size in (8, 16, 32, 64, 128, 256, 512)
        for seed in range(seeds)
    ]


def pollux_rows():
    return [
        {
            "workload": "net",
            "batch_size": size,
            "progress": step,
            "iteration": step,
            "metric": min(90.0, 100 * step * size / 20 / 1000 / (1 + size / 200)),
            "higher_is_better": "True",
            "grad_sq_norm": 1.0,
            "grad_noise_trace": 200.0,
        }
        for size in (20, 40, 80, 160, 320)
        for step in range(10, 3000, 10)
    ]


def test_a_failing_run_is_infinite_work_and_does_not_enter_the_mean(replay, tmp_path):
    rows = zeus_rows(seeds=2)
    rows[-1]["epochs_to_target"] = ""
    write(tmp_path / "zeus.csv", rows)

    (cell,) = replay.read_zeus(tmp_path)

    assert cell.failing_share[-1] == 0.5
    assert cell.time_s[-1] == pytest.approx((10 + 512 / 20) * (100 + 6400 / 512))


def test_rates_that_do_not_change_with_the_size_are_fixed(replay, tmp_path):
    rows = zeus_rows()
    write(tmp_path / "zeus.csv", rows + [{**row, "workload": "other", "lr": 0.01 * row["batch_size"]} for row in rows])

    assert [cell.regime for cell in replay.read_zeus(tmp_path)] == ["fixed", "coupled"]


def test_sweep_without_noise_is_exact_and_costs_every_run(replay, tmp_path):
    write(tmp_path / "zeus.csv", zeus_rows())
    cells = replay.read_zeus(tmp_path)

    result = replay.score(cells, replay.policies.sweep, resamples=2)

    assert result.regret == 0
    assert result.cost == pytest.approx(float(cells[0].time_s.sum() / cells[0].time_s.min()))


def test_ours_picks_no_size_that_never_arrives_where_the_largest_does(replay, tmp_path):
    write(tmp_path / "zeus.csv", zeus_rows(rate="", needed=lambda size: 10 + size / 50 if size <= 64 else math.inf))
    scores = replay.score_zeus(replay.read_zeus(tmp_path), 5)

    assert scores["largest"].failing == 1
    assert scores["rightbatch"].failing == 0
    assert scores["rightbatch"].regret < 0.5


def test_noise_of_one_run_finds_the_planted_optimum(replay, tmp_path):
    write(tmp_path / "pollux_progress.csv", pollux_rows())

    scores = replay.score_pollux(replay.read_pollux(tmp_path))

    assert scores["rightbatch, one run"].regret < 0.05 < scores["largest"].regret


def test_leaving_one_out_never_scores_a_workload_under_a_prior_chosen_on_it(replay, monkeypatch, tmp_path):
    write(tmp_path / "zeus.csv", zeus_rows("a") + zeus_rows("b", needed=lambda size: 10 + 400 / size))
    seen = []

    def fake_score(cells, policy, *, resamples):
        prior = policy.priors["fixed"]
        by_workload = {"a": prior.heat, "b": prior.critical_over_middle}
        seen.append(prior)
        return replay.Score(0, 0, 0, 0, 0, 0, by_workload, {"a": 1.0, "b": 2.0})

    monkeypatch.setattr(replay, "score", fake_score)
    found = replay.leave_one_out(replay.read_zeus(tmp_path), 1, replay.Sequential)

    assert len(seen) == np.prod([len(values) for values in replay.GRID.values()])
    assert "critical_over_middle 3," in found["a"][2]
    assert "heat 0," in found["b"][2]


def test_document_has_goals_and_exit_code_tells_whether_they_hold(replay, tmp_path, monkeypatch, capsys):
    write(tmp_path / "zeus.csv", zeus_rows(rate=""))
    monkeypatch.setattr(sys, "argv", ["replay.py", "--data", str(tmp_path), "--resamples", "3", "--json"])

    code = replay.main()

    document = json.loads(capsys.readouterr().out)
    assert {goal["name"] for goal in document["goals"]} == {
        "Zeus: regret", "Zeus: cost", "Zeus: chosen runs that never reach the target",
    }  # fmt: skip
    assert code == (0 if all(goal["holds"] for goal in document["goals"]) else 1)
    assert document["scores"]["zeus"]["rightbatch"]["regret"] <= 0.1


def test_folder_without_traces_is_a_usage_error(replay, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["replay.py", "--data", str(tmp_path)])

    with pytest.raises(SystemExit, match="2"):
        replay.main()
