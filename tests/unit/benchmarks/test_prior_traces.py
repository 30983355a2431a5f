"""The trainings that priors are set on: rates, targets, epochs to them, and what the file of curves keeps."""

import csv
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import prior_traces
import prior_traces_workloads as workloads
import rightbatch as rb
from prior_traces import Curve, Curves, epochs_to, rate, rows_of, targets, train
from prior_traces_workloads import Ladder


def ladder(optimizer=lambda params: torch.optim.SGD(params, lr=0.1), **options):
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    workload = rb.Workload(
        name="planted/line/sgd",
        model=lambda: nn.Linear(4, 2),
        train=data,
        valid=data,
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        lr_batch_size=8,
        metric=lambda scores, labels: (scores.argmax(1) == labels).float().mean().item(),
        num_workers=0,
    )
    return Ladder(workload=workload, sizes=(8, 32), epochs=3, evaluations=2, **options)


def curve(size, *metric, seed=0):
    return Curve(size=size, lr=0.1, seed=seed, metric=metric)


def test_rates_stay_or_follow_the_family_from_the_size_they_are_customary_at():
    adam = ladder(lambda params: torch.optim.Adam(params, lr=0.1))

    assert rate(ladder(), "fixed", 0.1, 32) == 0.1
    assert rate(ladder(), "coupled", 0.1, 32) == pytest.approx(0.4)
    assert rate(adam, "coupled", 0.1, 32) == pytest.approx(0.2)
    assert rate(adam, "coupled", 0.1, 2) == pytest.approx(0.05)


def test_the_loose_target_is_reached_by_all_sizes_and_the_hard_one_by_half():
    curves = [curve(8, 0.5, 0.8), curve(16, 0.6, 0.9), curve(32, 0.4, 0.7), curve(64, 0.1, 0.6)]

    loose, usual, hard = targets(curves)

    assert (loose, usual, hard) == pytest.approx((0.97 * 0.6, 0.7, 0.8))
    reached = [sum(epochs_to(one, target, 1) is not None for one in curves) for target in (loose, usual, hard)]
    assert reached == [4, 3, 2]


def test_epochs_count_to_the_first_evaluation_at_the_target():
    assert epochs_to(curve(8, 0.1, 0.5, 0.4, 0.9), 0.5, evaluations=2) == 1.0
    assert epochs_to(curve(8, 0.1, 0.5), 0.9, evaluations=2) is None


def test_a_training_evaluates_as_often_as_it_should_and_repeats_itself():
    planted = ladder()
    trainer = prior_traces.Trainer(planted.workload, 1.0)

    first, again = (train(trainer, planted, 32, 0.1, 1) for _ in range(2))

    assert len(first.metric) == planted.epochs * planted.evaluations
    assert first == again


def test_a_decay_stops_the_parameters_where_its_factor_is_nothing():
    planted = ladder(decay=(1.0, 0.0))

    metric = train(prior_traces.Trainer(planted.workload, 1.0), planted, 8, 0.1, 0).metric

    assert metric[0] != metric[1]
    assert len(set(metric[2:])) == 1


def test_a_training_that_diverges_ends_there():
    planted = ladder(lambda params: torch.optim.SGD(params, lr=1.0))

    metric = train(prior_traces.Trainer(planted.workload, 1.0), planted, 8, math.inf, 0).metric

    assert len(metric) < planted.epochs * planted.evaluations


def test_curves_are_trained_once_and_again_when_the_workload_changes(tmp_path):
    made = []

    def make(size, lr, seed):
        made.append(size)
        return curve(size, 0.5)

    for key in ("a", "a", "b"):
        Curves(tmp_path / "curves.json", "net", key).get(8, 0.1, 0, make)

    assert made == [8, 8]


def test_the_fingerprint_of_a_ladder_ignores_the_others_and_sees_its_own(tmp_path, monkeypatch):
    def of(text):
        (tmp_path / "w.py").write_text(text)
        fake = SimpleNamespace(__file__=str(tmp_path / "w.py"), LADDERS={"a": None, "b": None}, NEED_DATA={})
        monkeypatch.setattr(prior_traces, "workloads", fake)
        return prior_traces.fingerprint("a")

    before = of("def a(): return 1\ndef b(): return 2\n")

    assert of("def a(): return 1  # why\ndef b(): return 3\n") == before
    assert of("def a(): return 4\ndef b(): return 2\n") != before
    assert of("SHARED = 1\ndef a(): return 1\ndef b(): return 2\n") != before


def test_a_sweep_that_is_kept_counts_at_the_best_of_its_own_rates_and_not_at_those_of_plans(tmp_path):
    needed = {0.1: 3000.0, 0.05: 2400.0, 0.07: 1200.0, 0.2: None}
    trainings = [{"size": 64, "lr": lr, "seed": seed, "samples_to_target": value} for lr, value in needed.items() for seed in range(3)]
    (tmp_path / "truth.json").write_text(json.dumps({"digits": {"trainings": trainings}}))

    rows = list(prior_traces.tuned_rows(tmp_path / "truth.json"))

    assert [(size, lr, seed, epochs) for _, _, _, size, lr, _, seed, _, epochs in rows] == [(64, 0.05, seed, "2") for seed in range(3)]


def test_a_row_without_epochs_never_reached_its_target():
    rows = list(rows_of(ladder(), {"fixed": [curve(8, 0.5, 0.8), curve(16, 0.6, 0.9), curve(32, 0.4, 0.7)]}))

    assert [row[-1] for row in rows if row[7] == 0.8] == ["1", "1", ""]
    assert {row[:3] for row in rows} == {("planted/line/sgd", "fixed", "SGD")}


@pytest.mark.skipif(not list(workloads.LIBRARY.glob("*.py")), reason="the standard library's source is not installed")
def test_every_module_gives_lines_of_one_length_to_train_and_to_validate_on():
    train_set, valid = workloads._lines(workloads._trigrams)

    assert train_set.tensors[0].shape[1] == 32
    assert set(train_set.tensors[1].tolist()) == set(valid.tensors[1].tolist()) == set(range(workloads.MODULES))


def test_the_file_of_traces_is_written_when_every_ladder_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(prior_traces.workloads, "LADDERS", {"line": ladder})
    monkeypatch.setattr(prior_traces.workloads, "NEED_DATA", {})
    monkeypatch.setattr(prior_traces, "fingerprint", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["prior_traces.py", "--data", "", "--out", str(tmp_path)])

    prior_traces.main()

    with (tmp_path / "traces.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["regime"] != "tuned"]
    assert {(row["regime"], row["batch_size"]) for row in own} == {(r, b) for r in ("fixed", "coupled") for b in ("8", "32")}
    assert {row["seed"] for row in own} == {"0", "1", "2"}
