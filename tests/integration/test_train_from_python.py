"""``rb.train`` in a program of one's own."""

import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import findings_samples
import rightbatch as rb
from cases import vectors
from rightbatch.errors import UsageError, WorkloadError
from rightbatch.records.training_log import EvaluationLine


def made(**ingredients: object) -> rb.Workload:
    given = {
        "model": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        "train": vectors(96),
        "valid": vectors(24, seed=1),
        "loss": cross_entropy,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "lr_batch_size": 16,
        "metric": lambda scores, labels: (scores.argmax(1) == labels).float().mean().item(),
        "num_workers": 0,
    }
    return rb.Workload(**given | ingredients)


def test_it_returns_the_model_the_log_and_a_report(tmp_path: Path) -> None:
    training = rb.train(made(), epochs=2)

    assert (training.state, training.plan.global_batch_size, training.samples) == ("finished", 16, 192)
    assert isinstance(training.model, nn.Sequential)
    assert training.average is None
    assert sum(isinstance(line, EvaluationLine) for line in training.log) == 2
    assert str(training).startswith("trained on 192 samples")
    assert "<!doctype html>" in training.write_report(tmp_path / "report.html").read_text()


def test_the_programs_random_numbers_and_modules_are_left_alone() -> None:
    module = nn.Linear(6, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()

    training = rb.train(made(model=module), 8, epochs=1)

    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not torch.equal(training.model.state_dict()["weight"], before["weight"])


def test_what_find_returned_is_trained_at_its_rate() -> None:
    plan = rb.FoundPlan.of(findings_samples.good())

    training = rb.train(made(train=vectors(600)), plan, epochs=1)

    assert (training.plan_source, training.plan.lr, training.plan.micro_batch_size) == ("rb.find", 0.2, 128)
    assert training.predicted_s is not None


def test_a_plan_of_ones_own_keeps_the_workloads_precision_unless_it_names_one() -> None:
    own = rb.BatchPlan(global_batch_size=16, micro_batch_size=16)

    kept = rb.train(made(precision="fp64"), own, epochs=1)
    named = rb.train(made(precision="fp64"), own.model_copy(update={"precision": "fp32"}), epochs=1)

    assert next(kept.model.parameters()).dtype is torch.float64
    assert next(named.model.parameters()).dtype is torch.float32


@pytest.mark.parametrize(
    ("metric", "got"),
    [
        (lambda scores, labels: scores.argmax(1) == labels, r"got a tensor of shape \(\d+,\); return its mean"),
        (lambda scores, labels: "good", r"got str 'good'; return its mean"),
        (lambda scores, labels: None, r"got NoneType None; return its mean"),
    ],
    ids=["one a sample", "text", "nothing"],
)
def test_a_metric_that_is_no_number_is_refused_with_what_to_do(metric: object, got: str) -> None:
    with pytest.raises(WorkloadError, match=f"metric must return one number for a batch; {got}"):
        rb.train(made(metric=metric), epochs=1)


def test_a_missed_target_is_warned_about_and_the_model_is_returned() -> None:
    with pytest.warns(rb.RightbatchWarning, match="the training ended with: target missed"):
        training = rb.train(made(), epochs=1, target="accuracy>=1.5")

    assert training.model is not None


def test_the_caller_may_end_it_and_gets_what_there_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training = rb.train(made(), epochs=9, evaluate_every=32, keep_going=lambda line: line.samples < 64)

    assert (training.state, training.samples) == ("stopped", 64)


def test_progress_is_told() -> None:
    told: list[tuple[str, float]] = []

    class Listener:
        def update(self, stage: str, fraction: float, detail: str) -> None:
            told.append((stage, fraction))

    rb.train(made(), epochs=1, progress=Listener())

    assert told[-1] == ("evaluation", 1.0)


def test_a_schedule_by_a_word_or_as_a_record(tmp_path: Path) -> None:
    by_word = rb.train(made(), epochs=2, schedule="milestones:0=16,96=32", out=tmp_path / "run")
    as_record = rb.train(made(), epochs=2, schedule=by_word._run.manifest.batch_schedule)

    assert by_word.batch_sizes == as_record.batch_sizes == ((0, 16), (96, 32))
    assert rb.train(made(), epochs=2, schedule="milestones:0=16,96=32", out=tmp_path / "run", resume=True).samples == 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "positive, finite number of epochs or of samples"),
        ({"epochs": 1, "dynamic": True}, "is proposed from the findings of a run"),
        ({"epochs": 1, "resume": True}, "needs its folder; got none"),
        ({"epochs": 1, "target": "good"}, "a target is loss<=VALUE"),
    ],
)
def test_arguments_that_say_nothing_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rb.train(made(), **arguments)
