import sys

import pytest

from findings_samples import good
from planted_sweeps import TARGET, summary
from rightbatch.errors import ClusterError, UsageError
from rightbatch.sweeps import executors
from rightbatch.sweeps.executors import parse_where
from rightbatch.sweeps.request import SweepRequest, parse_sizes
from rightbatch.sweeps.settings import digest_of, scaling_rule, settings_of


def request_of(**changes):
    return SweepRequest(target=TARGET, **changes)


def settings(workload=None, findings=None, slots=2, **changes):
    return settings_of(request_of(**changes), workload or summary(), findings, slots=slots)


@pytest.mark.parametrize(
    ("text", "sizes"), [("8..64", (8, 16, 32, 64)), ("8..100", (8, 16, 32, 64)), ("64,16, 16", (16, 64)), ("12..12", (12,))]
)
def test_sizes_are_read_from_ranges_and_lists(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "8..", "64..8", "0..8", "a,b", "-1,2", "8...64"])
def test_other_words_are_no_sizes(text):
    with pytest.raises(UsageError, match=r"written like 8\.\.512"):
        parse_sizes(text)


def test_the_search_begins_at_the_size_and_rate_that_the_workload_was_tuned_at():
    found = settings(sizes=(16, 64, 256))

    assert (found.first_size, found.first_lr) == (64, 0.1)


def test_a_tuned_size_that_is_not_swept_hands_its_rate_to_the_nearest():
    found = settings(sizes=(8, 16))

    assert (found.first_size, found.first_lr) == (16, 0.025)


def test_without_sizes_and_without_a_plan_they_lie_around_the_tuned_size():
    assert settings().sizes == (8, 16, 32, 64, 128, 256)  # 512 would be more than a quarter of 2000


def test_without_sizes_they_lie_around_the_plan():
    findings = good()
    size = findings.recommendation.plan.global_batch_size

    found = settings(workload=summary(train_size=100_000), findings=findings)

    assert min(found.sizes) * 8 == size == max(found.sizes) // 8
    assert found.noise_scale == findings.noise_scale.value
    assert found.largest_micro_batch == findings.memory.ceiling


def test_a_size_beyond_the_training_set_is_refused():
    with pytest.raises(UsageError, match="cannot exceed the training set of 2000"):
        settings(sizes=(64, 4096))


def test_trials_train_at_most_a_hundred_epochs_unless_told():
    assert settings().most_samples == 200_000
    assert settings(most_samples=5000).most_samples == 5000


def test_many_slots_are_filled_by_climbing_all_sizes_at_once():
    assert settings(slots=2).order == "outward"
    assert settings(slots=8).order == "at once"


def test_the_rule_is_that_of_the_optimizer():
    assert scaling_rule(summary(), 100.0)(50, 100) == pytest.approx((1 + 200 / 50) / (1 + 200 / 100))
    assert scaling_rule(summary(optimizer="Adam"), None)(50, 200) == pytest.approx(2.0)


@pytest.mark.parametrize("change", [{"seeds": 5}, {"sizes": (8,)}, {"most_samples": 10}, {"device": "cpu"}, {"precision": "bf16"}])
def test_what_changes_the_trials_changes_the_digest(change):
    assert digest_of(request_of(**change), "a.py:w", ()) != digest_of(request_of(), "a.py:w", ())


@pytest.mark.parametrize("change", [{"jobs": 5}, {"budget_s": 60.0}, {"threads": 1}, {"fresh": True}])
def test_how_fast_trials_run_does_not_change_the_digest(change):
    assert digest_of(request_of(**change), "a.py:w", ()) == digest_of(request_of(), "a.py:w", ())


@pytest.mark.parametrize("name", ["seeds", "jobs", "most_samples", "budget_s", "threads"])
def test_numbers_must_be_positive(name):
    with pytest.raises(UsageError, match=f"{name} must be positive; got 0"):
        request_of(**{name: 0})


def test_where_trials_run_is_read_with_what_follows_the_colon(monkeypatch):
    monkeypatch.setattr(executors, "find_spec", lambda name: object())

    assert [parse_where(where) for where in ("local", "ray", "ray:ray://head:10001", "slurm:gpu")] == [
        ("local", ""),
        ("ray", ""),
        ("ray", "ray://head:10001"),
        ("slurm", "gpu"),
    ]
    for where in ("moon", "local:2", "ray:"):
        with pytest.raises(UsageError, match="--on must be"):
            parse_where(where)


@pytest.mark.parametrize(("where", "needed"), [("ray:head:6379", "ray"), ("slurm", "submitit")])
def test_a_cluster_whose_library_is_missing_has_an_exit_code_of_its_own(monkeypatch, where, needed):
    monkeypatch.setitem(sys.modules, needed, None)

    with pytest.raises(ClusterError, match=rf"needs {needed}.*pip install 'rightbatch\[.*use --on local") as caught:
        parse_where(where)
    assert caught.value.exit_code == 6
