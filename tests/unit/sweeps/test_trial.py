"""Trials that really train, small ones, in this process."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from rightbatch.errors import UserCodeError, WorkloadError
from rightbatch.records.sweep import TrialSpec, TrialStatus
from rightbatch.records.training_log import TrainingTarget
from rightbatch.sweeps.tasks import DescribeTask, TrialTask, WorkerSetting, describe, run_trial
from rightbatch.workload.ingredients import Workload

TARGET = TrainingTarget.parse("accuracy>=0.9")


def dataset(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] + 0.2 * torch.randn(size, generator=generator) > 0).long())


def accuracy(scores, labels):
    return (scores.argmax(dim=1) == labels).float().mean().item()


def workload(**changes):
    given = {
        "model": lambda: nn.Linear(6, 2),
        "train": dataset(300, 0),
        "valid": dataset(200, 1),
        "loss": cross_entropy,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "metric": accuracy,
    }
    return Workload(**given | changes)


def task_of(target=TARGET, *, size=20, lr=0.5, seed=0, most_samples=6000, largest_micro_batch=None, **changes):
    spec = TrialSpec(global_batch_size=size, lr=lr, seed=seed, most_samples=most_samples)
    setting = WorkerSetting(load=lambda: workload(**changes), device="cpu")
    return TrialTask(setting=setting, spec=spec, target=target, largest_micro_batch=largest_micro_batch)


def outcome(result):
    """What does not depend on the clock."""
    return result.status, result.samples, result.steps, result.samples_to_target, [(p.samples, p.value) for p in result.history]


def test_a_trial_trains_to_its_target_and_says_what_it_took():
    result = run_trial(task_of())

    assert result.status is TrialStatus.COMPLETE
    assert 0 < result.samples_to_target <= result.samples
    assert result.steps == pytest.approx(result.samples / 20)
    assert 0 < result.seconds_to_target <= result.training_s
    assert result.history[-1].value >= 0.9
    assert result.micro_batch_size == 20


def test_the_same_trial_comes_to_the_same_result_and_another_seed_to_another():
    first, again, other = (run_trial(task_of(seed=seed)) for seed in (0, 0, 1))

    assert outcome(first) == outcome(again)
    assert outcome(first) != outcome(other)


def test_micro_batches_are_accumulated_below_the_ceiling():
    whole, split = run_trial(task_of(size=24)), run_trial(task_of(size=24, largest_micro_batch=9))

    assert split.micro_batch_size == 8
    assert split.samples_to_target == pytest.approx(whole.samples_to_target, rel=0.02)


def test_a_trial_stops_at_its_limit():
    result = run_trial(task_of(lr=1e-5, most_samples=400))

    assert result.status is TrialStatus.ABORTED
    assert 400 <= result.samples < 420 + 20
    assert "as many as it could have" in result.reason


def test_a_trial_whose_loss_is_not_finite_has_diverged():
    result = run_trial(
        task_of(lr=1e30, loss=nn.functional.multi_margin_loss, model=lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2)))
    )

    assert result.status is TrialStatus.DIVERGED
    assert "not finite" in result.reason


def test_a_batch_in_which_nothing_counts_is_no_divergence():
    x, y = dataset(300, 0).tensors
    mostly_ignored = TensorDataset(x, y.where(torch.arange(300) % 3 == 0, -100))

    result = run_trial(task_of(size=2, lr=0.02, train=mostly_ignored))

    assert result.status is TrialStatus.COMPLETE


def test_a_target_may_be_the_validation_loss():
    result = run_trial(task_of(TrainingTarget.parse("loss<=0.4"), metric=None))

    assert result.status is TrialStatus.COMPLETE
    assert result.history[-1].value <= 0.4


def test_a_metric_that_never_is_a_number_is_the_users_error():
    with pytest.raises(UserCodeError, match="a metric must return a finite number; accuracy was none in 5 evaluations"):
        run_trial(task_of(metric=lambda scores, labels: math.nan))


def test_what_the_users_code_raises_comes_with_its_traceback():
    def raising(scores, labels):
        raise ValueError("no such label")

    with pytest.raises(UserCodeError, match="ValueError: no such label") as caught:
        run_trial(task_of(metric=raising))
    assert "in raising" in caught.value.user_traceback


def test_a_workload_that_no_trial_could_bring_to_the_target_is_refused_at_once():
    def described(**changes):
        setting = WorkerSetting(load=lambda: workload(**changes), device="cpu")
        return describe(DescribeTask(setting=setting, target=TARGET, code_files=tuple))

    assert described().workload.train_size == 300
    with pytest.raises(WorkloadError, match="validation samples"):
        described(valid=None)
    with pytest.raises(WorkloadError, match="needs metric="):
        described(metric=None)


def test_files_of_the_users_code_are_named_from_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    files = ((str(tmp_path / "nets" / "net.py"), "a1"), ("/elsewhere/net.py", "b2"))
    setting = WorkerSetting(load=workload, device="cpu")

    described = describe(DescribeTask(setting=setting, target=TARGET, code_files=lambda: files))

    assert described.code_files == (("nets/net.py", "a1"), ("/elsewhere/net.py", "b2"))


def test_the_history_is_thin_and_ends_with_the_last_evaluation():
    result = run_trial(task_of(lr=0.001, most_samples=20_000))

    assert len(result.history) <= 64
    assert result.history[-1].samples == result.samples
