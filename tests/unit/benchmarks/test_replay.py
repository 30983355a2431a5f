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


def test_the_choice_from_one_run_believes_what_its_rates_did(replay):
    traces = importlib.import_module("replay_traces")
    sizes = np.array([20.0, 40.0, 80.0, 160.0, 320.0])
    noise = traces.NoiseTrace(batch_size=20.0, shares=np.ones(4), sq_norm=np.ones(4), trace=np.full(4, 100.0))

    def chosen(regime):
        cell = traces.Cell(workload="net", label=regime, regime=regime, sizes=sizes, seconds=1 + 1 / sizes, work=(np.ones(1),) * 5)
        return sizes[replay.policies.noise_of_run(cell, noise).index]

    assert chosen("tuned") == 20  # nothing is gained by a size, and small ones need fewest samples
    assert chosen("fixed") > chosen("tuned")  # where the rate was too hot for it


def own_rows(workload, regime, *, needed=lambda size: 10 + size / 20, target="0.9"):
    return [
        {
            "workload": workload,
            "regime": regime,
            "optimizer": "Adam",
            "batch_size": size,
            "lr": 0.1,
            "lr_batch_size": 32,
            "seed": seed,
            "target": target,
            "epochs_to_target": needed(size) if math.isfinite(needed(size)) else "",
        }
        for size in (8, 16, 32, 64, 128, 256, 512)
        for seed in range(3)
    ]


def test_own_traces_make_cells_of_whole_ladders_and_of_their_ends(replay, tmp_path):
    write(tmp_path / "traces.csv", own_rows("data/net/adam", "fixed") + own_rows("data/net/adam", "coupled"))

    cells = replay.read_own(tmp_path)

    assert [cell.regime for cell in cells] == ["fixed"] * 7 + ["coupled"] * 7
    assert {tuple(cell.sizes) for cell in cells} == {
        (8, 16, 32, 64, 128, 256, 512), (8, 16, 32, 64, 128), (32, 64, 128, 256, 512),
    }  # fmt: skip
    assert len({cell.label for cell in cells}) == len(cells)
    assert {cell.network for cell in cells} == {"net"}
    halves = [cell.seconds[0] * cell.sizes[0] - cell.sizes[0] for cell in cells[:3]]
    assert halves == pytest.approx([8, 64, 512])


def test_a_run_seen_at_whole_epochs_is_known_to_within_one(replay):
    cell = replay.Cell(
        workload="net", label="net", regime="fixed", sizes=np.array([8.0, 16.0]), seconds=np.ones(2),
        work=(np.array([3.0, 5.0]), np.array([4.0, math.inf])),
    )  # fmt: skip

    probe, seconds = replay.Sequential()._train(cell, 0, 5.0, math.inf)

    assert cell.resolution == 1
    assert (probe.samples, seconds) == (5.0, 5.0)
    assert probe.log_error == pytest.approx(1 / 5 / math.sqrt(12))


def test_a_size_that_never_arrives_takes_no_longer_than_the_one_beside_it(replay):
    cell = replay.Cell(
        workload="net", label="net", regime="fixed", sizes=np.array([8.0, 16.0]), seconds=np.array([2.0, 1.0]),
        work=(np.array([3.0, 20.0]), np.array([math.inf])),
    )  # fmt: skip
    work = np.array([3.0, math.inf])

    together, alone = (replay.Sequential(together=count, most_probes=2)(cell, work) for count in (2, 1))

    assert (together.index, together.seconds, together.probes) == (0, 2 * 6.0, 2)
    assert (alone.index, alone.seconds, alone.probes) == (0, 20.0 + 6.0, 2)


def test_a_part_of_a_ladder_that_never_reached_the_target_is_no_cell(replay, tmp_path):
    write(tmp_path / "traces.csv", own_rows("data/net/adam", "fixed", needed=lambda size: 5 if size < 32 else math.inf))

    assert [cell.sizes[0] for cell in replay.read_own(tmp_path)] == [8] * 5


@pytest.fixture
def told(replay, monkeypatch):
    """Scores that depend on the workload and the prior alone: each workload is best where its own knob is the smallest."""
    import replay_priors

    priors = {"a": "heat", "b": "critical_over_middle", "c": "heat", "d": "discrepancy_sd"}
    seen = []

    def fake_score(cells, policy, *, resamples):
        workloads = {cell.workload for cell in cells}
        regime = cells[0].regime
        seen.append((regime, workloads))
        by_workload = {name: getattr(policy.priors[regime], priors[name.split("/")[1]]) for name in workloads}
        ones, zeros = dict.fromkeys(workloads, 1.0), dict.fromkeys(workloads, 0.0)
        return replay.Score(0, 0, 0, 0, 0, 0, by_workload, ones, zeros)

    monkeypatch.setattr(replay_priors, "score", fake_score)
    monkeypatch.setattr(
        replay_priors,
        "KNOBS",
        {regime: {"heat": (0.9, 0.1), "critical_over_middle": (30.0, 3.0)} for regime in ("tuned", "coupled", "fixed")},
    )
    return seen


def test_a_prior_is_chosen_on_other_networks_of_the_same_regime_only(replay, told, tmp_path):
    write(tmp_path / "zeus.csv", zeus_rows("x/a/adam"))
    rows = own_rows("x/b/adam", "fixed") + own_rows("x/a/sgd", "fixed") + own_rows("x/c/adam", "coupled") + own_rows("x/b/adam", "coupled")
    write(tmp_path / "traces.csv", rows)
    traces = replay.Traces(replay.read_zeus(tmp_path), (), (), replay.read_own(tmp_path))

    found = {(row.workload, row.regime): row for row in replay.leave_each_out(traces, 1)["left out"]}

    assert all(names == {"x/a/adam", "x/b/adam", "x/a/sgd"} for regime, names in told if regime == "fixed")
    assert found["x/a/adam", "fixed"].prior == "heat 0.9, critical_over_middle 3"  # chosen by b alone: a/sgd is the same network
    assert found["x/a/sgd", "fixed"].prior == "heat 0.9, critical_over_middle 3"
    assert found["x/b/adam", "fixed"].prior == "heat 0.1, critical_over_middle 30"
    assert found["x/c/adam", "coupled"].prior == "heat 0.9, critical_over_middle 3"
    assert found["x/c/adam", "coupled"].regret == 0.9


def test_own_alone_lets_no_public_trace_choose(replay, told, tmp_path):
    write(tmp_path / "zeus.csv", zeus_rows("x/a/adam") + zeus_rows("y/c/adam"))
    write(tmp_path / "traces.csv", own_rows("x/b/adam", "fixed"))
    traces = replay.Traces(replay.read_zeus(tmp_path), (), (), replay.read_own(tmp_path))

    rows = replay.leave_each_out(traces, 1)

    assert {row.workload: row.prior for row in rows["own alone"]} == {
        "x/a/adam": "heat 0.9, critical_over_middle 3",
        "y/c/adam": "heat 0.9, critical_over_middle 3",
    }
    assert {row.workload: row.prior for row in rows["left out"]}["x/a/adam"] == "heat 0.1, critical_over_middle 3"


def test_a_run_that_never_arrives_counts_as_the_largest_cost(replay):
    import replay_priors

    scored = replay.Score(0, 0, 0, 0, 0, 0, {"a": 0.1, "b": 0.0}, {}, {"a": 0.0, "b": 0.1})

    assert replay_priors.loss(scored, ["a", "b"]) == pytest.approx((0.1 + 0.3) / 2)


def test_goals_count_a_left_out_figure_only_when_every_public_workload_has_one(replay, tmp_path):
    write(tmp_path / "zeus.csv", zeus_rows("x/a/adam") + zeus_rows("y/c/adam"))
    found = {"zeus": replay.score_zeus(replay.read_zeus(tmp_path), 1)}
    row = replay.LeftOut("x/a/adam", "fixed", 0.5, 3.0, 0.2, "")

    names = [
        {goal["name"]: goal for goal in replay.goals_of(found, {"left out": rows})}
        for rows in ([row], [row, replay.LeftOut("y/c/adam", "fixed", 0.1, 1.0, 0.0, "")])
    ]

    assert "Zeus, left out: regret" not in names[0]
    assert names[1]["Zeus, left out: regret"]["value"] == pytest.approx(30)
    assert names[1]["Zeus, left out: cost"]["value"] == pytest.approx(2)
    assert not names[1]["Zeus, left out: chosen runs that never reach the target"]["holds"]


def test_document_has_goals_and_exit_code_tells_whether_they_hold(replay, tmp_path, monkeypatch, capsys):
    write(tmp_path / "zeus.csv", zeus_rows(rate=""))
    monkeypatch.setattr(sys, "argv", ["replay.py", "--data", str(tmp_path), "--own", str(tmp_path), "--resamples", "3", "--json"])

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
