"""The table of the classic example says what its trainings came to."""

import types

import pytest

import classic_example
from rightbatch.records.plan import BatchPlan
from rightbatch.records.training_log import EvaluationLine, StepLine


def run(samples: int, *, seconds: float, accuracy: float, target: float = 0.5):
    line = StepLine(step=samples // 128, samples=samples, training_s=seconds, global_batch_size=128, micro_batch_size=128, lr=0.1, loss=1.0)
    evaluation = EvaluationLine(step=1, samples=samples, training_s=seconds, loss=1.0, metric=accuracy, evaluated_samples=10)
    return types.SimpleNamespace(
        reached=evaluation if accuracy >= target else None,
        batch_sizes=((0, 128),),
        plan=BatchPlan(global_batch_size=128, micro_batch_size=128, lr=0.1),
        samples=samples,
        evaluation=evaluation,
        training_s=seconds,
        log=(line,),
    )


def test_a_row_holds_medians_and_both_kinds_of_seconds() -> None:
    runs = [run(1280, seconds=9.0, accuracy=0.6), run(2560, seconds=5.0, accuracy=0.5), run(3840, seconds=6.0, accuracy=0.4)]

    row = classic_example.row_of(runs, {128: 0.1})

    assert (row["reached"], row["seeds"], row["batch"]) == (2, 3, [128])
    assert row["samples"] == {"median": 2560, "low": 1280, "high": 3840}
    assert row["seconds"]["median"] == 6.0
    assert row["composed_seconds"] == pytest.approx({"median": 2.0, "low": 1.0, "high": 3.0})


def test_goals_fail_where_a_training_misses_or_the_plan_is_slower() -> None:
    fast, slow = ([run(samples, seconds=1.0, accuracy=0.6)] for samples in (1280, 2560))
    names = ("128, constant", "find's plan")
    rows = {name: classic_example.row_of(runs, {128: 0.1}) for name, runs in zip(names, (fast, slow), strict=True)}

    reached, ratio = classic_example.goals_of(rows)

    assert (reached["holds"], ratio["value"], ratio["holds"]) == (True, 2.0, False)
    missed = rows | {"find's plan": classic_example.row_of([run(1280, seconds=1.0, accuracy=0.1)], {128: 0.1})}
    assert [one["holds"] for one in classic_example.goals_of(missed)] == [False, True]


@pytest.mark.parametrize(("size", "micro", "steps"), [(512, 128, 4), (96, 40, 3), (70, 64, 2), (7, 4, 7)])
def test_a_size_is_split_into_equal_parts_that_fit(size: int, micro: int, steps: int) -> None:
    assert classic_example._split(size, micro).accumulation_steps == steps
