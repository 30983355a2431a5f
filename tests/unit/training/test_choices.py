"""Which plan and which schedule a training takes."""

from pathlib import Path

import pytest

import findings_samples
import training_samples
from rightbatch.errors import InconclusiveError, RunFolderError, UsageError
from rightbatch.fits.schedule_text import parse_schedule
from rightbatch.records.plan import BatchPlan, Findings
from rightbatch.records.run import RunFolder, RunManifest
from rightbatch.training import choices


def run_folder(path: Path, findings: Findings) -> Path:
    folder = RunFolder.create(path)
    folder.write_manifest(
        RunManifest(
            rightbatch_version="0.1.0",
            created_at=findings.measured_at,
            updated_at=findings.measured_at,
            command=(),
            workload_spec="train.py:workload",
            workload_arguments=(),
            environment=findings.environment,
            code_files=(),
            state="complete",
        )
    )
    folder.write_findings(findings)
    return path


def test_the_plan_of_a_run_brings_its_step_times(tmp_path: Path) -> None:
    chosen = choices.plan_from_run(run_folder(tmp_path / "run", findings_samples.good()))

    assert chosen.plan == findings_samples.good().recommendation.plan
    assert chosen.source == f"the findings in {tmp_path / 'run'}"
    times = {step.global_batch_size: step.step_time_s for step in chosen.predicted_steps}
    assert times == {point.global_batch_size: point.step_time_s for point in findings_samples.tradeoff().points}


def test_disturbed_step_times_predict_nothing(tmp_path: Path) -> None:
    chosen = choices.plan_from_run(run_folder(tmp_path / "run", findings_samples.unstable()))

    assert chosen.plan == findings_samples.unstable().recommendation.plan
    assert chosen.predicted_steps == ()


def test_a_run_without_a_plan_is_refused_and_passed_over(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run", findings_samples.nothing_fits())

    with pytest.raises(InconclusiveError, match="recommends no plan"):
        choices.plan_from_run(path)
    assert not choices.has_plan(path)
    assert not choices.has_plan(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="there is no run folder"):
        choices.plan_from_run(tmp_path / "nowhere")


def test_a_bare_size_is_one_micro_batch_at_the_workloads_rate() -> None:
    chosen = choices.plan_of_size(96, "the caller")

    assert (chosen.plan, chosen.predicted_steps) == (BatchPlan(global_batch_size=96, micro_batch_size=96), ())
    assert not chosen.has_precision


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_must_be_positive(size: int) -> None:
    with pytest.raises(UsageError, match=f"must be at least 1; got {size}"):
        choices.plan_of_size(size, "the caller")


def test_a_workload_without_a_size_says_where_to_get_one() -> None:
    with pytest.raises(UsageError, match="run `rightbatch find` first, or give a size: --plan 128"):
        choices.plan_of_workload(None)


def chosen_of(findings: Findings) -> choices.ChosenPlan:
    plan = findings.recommendation.plan
    assert plan is not None
    return choices.ChosenPlan(plan=plan, source="a run", findings=findings)


def schedule_of(chosen: choices.ChosenPlan, text: str | None, *, is_dynamic: bool = False) -> choices.ChosenSchedule:
    return choices.choose_schedule(chosen, text, is_dynamic=is_dynamic, optimizer="SGD", total_samples=500_000)


def test_without_a_word_the_size_stays() -> None:
    assert schedule_of(chosen_of(findings_samples.good()), None) == choices.ChosenSchedule()


def test_a_dynamic_batch_that_is_not_worth_it_is_not_trained_and_that_is_said() -> None:
    chosen = schedule_of(chosen_of(findings_samples.good()), None, is_dynamic=True)

    assert chosen.forecast is not None
    assert (chosen.schedule is not None) == chosen.forecast.worth_it
    words = choices.forecast_words(chosen)
    assert words[0].startswith("A dynamic batch: ")
    assert words[-1] == "Training keeps the plan's size." if chosen.schedule is None else words[-1].startswith("Training follows noise:")


def test_a_schedule_that_was_asked_for_is_trained_whatever_its_forecast() -> None:
    chosen = schedule_of(chosen_of(findings_samples.good()), "geometric:64..512@100000")

    assert chosen.schedule is not None
    assert (chosen.schedule.kind, chosen.words) == ("geometric", "geometric:64..512@100000")
    assert chosen.schedule.coupling is not None
    assert chosen.forecast is not None


def test_without_findings_numbers_are_needed_and_the_rate_is_coupled_all_the_same() -> None:
    bare = choices.plan_of_size(32, "the caller")

    chosen = schedule_of(bare, "linear:8..64@1000")

    assert chosen.schedule is not None
    assert chosen.schedule.coupling is not None
    assert (chosen.schedule.coupling.base_batch_size, chosen.schedule.coupling.optimizer) == (32, "SGD")
    assert choices.forecast_words(chosen) == ()
    for text, is_dynamic in (("noise", False), (None, True)):
        with pytest.raises(UsageError, match="is proposed from the findings of a run, and the plan comes from none"):
            schedule_of(bare, text, is_dynamic=is_dynamic)


def test_both_a_schedule_and_a_dynamic_batch_are_refused() -> None:
    with pytest.raises(UsageError, match="got both --schedule and --dynamic; drop one"):
        schedule_of(choices.plan_of_size(32, "the caller"), "64", is_dynamic=True)


def test_a_training_goes_on_with_what_it_began_with() -> None:
    schedule = parse_schedule("geometric:8..64@400")
    manifest = training_samples.manifest(batch_schedule=schedule, schedule_asked="geometric")

    assert choices.earlier_plan(manifest).plan == manifest.plan
    for text in (None, "geometric"):
        assert choices.earlier_schedule(manifest, text, is_dynamic=False).schedule == schedule


@pytest.mark.parametrize(
    ("began", "text", "message"),
    [
        ("", None, "this one with a constant size; got dynamic"),
        ("dynamic", "64", "this one with dynamic; got 64"),
        ("geometric", "linear", "this one with geometric; got linear"),
    ],
)
def test_a_training_does_not_go_on_with_another_schedule(began: str, text: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=f"a training goes on as it began, {message}; leave it out, or start again with --fresh"):
        choices.earlier_schedule(training_samples.manifest(schedule_asked=began), text, is_dynamic=text is None)
