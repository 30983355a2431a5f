"""Real runs, judged again: what they measured must lead to what was concluded then, and to a report."""

import os
from pathlib import Path

import pytest

from rightbatch.recommend import judge
from rightbatch.records.measurements import Measurements
from rightbatch.records.plan import Findings, Goal, Objective
from rightbatch.report.text import render_text

RUNS = sorted(path.parent for path in (Path(__file__).parents[1] / "recorded").glob("*/measurements.json"))


def judged(run: Path, goal: Goal = Goal.TIME) -> Findings:
    then = Findings.model_validate_json((run / "findings.json").read_text())
    return judge(
        Measurements.model_validate_json((run / "measurements.json").read_text()),
        environment=then.environment,
        objective=Objective(goal=goal),
        constraints=then.constraints,
        measured_at=then.measured_at,
        duration_s=then.duration_s,
    )


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_recorded_run_leads_to_the_same_conclusions(run):
    now = judged(run)
    if os.environ.get("RIGHTBATCH_UPDATE_GOLDEN"):
        (run / "findings.json").write_text(now.model_dump_json(indent=1) + "\n")
    then = Findings.model_validate_json((run / "findings.json").read_text())

    assert now.recommendation.plan.global_batch_size == then.recommendation.plan.global_batch_size
    assert now.recommendation.plan.lr == pytest.approx(then.recommendation.plan.lr, rel=1e-6)
    assert now.recommendation.equivalent_batch_sizes == then.recommendation.equivalent_batch_sizes
    assert now.memory.ceiling == then.memory.ceiling
    assert now.step_time.knee == then.step_time.knee
    assert now.noise_scale.value == pytest.approx(then.noise_scale.value, rel=1e-9)
    assert (now.noise_scale.low, now.noise_scale.high) == pytest.approx((then.noise_scale.low, then.noise_scale.high), rel=1e-6)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_fewest_samples_never_takes_a_larger_batch_than_least_time(run):
    fewest, quickest = judged(run, Goal.SAMPLES), judged(run, Goal.TIME)

    assert fewest.recommendation.plan.global_batch_size <= quickest.recommendation.plan.global_batch_size


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_recorded_run_still_renders_in_80_columns(run):
    text = render_text(judged(run), width=80, colour=False)

    assert text.startswith("batch ")
    assert max(len(line) for line in text.splitlines()) <= 80


def test_there_are_recorded_runs():
    assert len(RUNS) >= 3
