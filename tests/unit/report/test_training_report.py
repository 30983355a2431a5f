"""A training in words, as text and as a page."""

import re

import pytest
from plotly.offline import get_plotlyjs

import training_samples as samples
from golden_files import golden
from rightbatch.records.training_log import EventLine, LogEvent, StepLine
from rightbatch.records.training_run import TrainingState
from rightbatch.report.document import Section
from rightbatch.report.training import render_training_html, render_training_text
from rightbatch.report.training_charts import loss_chart, time_chart, training_charts
from rightbatch.report.training_verdict import build_training_verdict

NAMES = sorted(samples.ALL)


def text_of(name: str, width: int = 80) -> str:
    return render_training_text(*samples.ALL[name](), width=width, colour=False)


def page_of(name: str) -> str:
    return render_training_html(*samples.ALL[name]()).replace(get_plotlyjs(), "PLOTLY_JS")


def section(training: samples.Training, key: str) -> Section:
    return next(each for each in build_training_verdict(*training).sections if each.key == key)


@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_stored_text(name: str) -> None:
    golden(f"training_{name}.txt", text_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_page_is_the_stored_page(name: str) -> None:
    golden(f"training_{name}.html", re.sub(r"sha256-[A-Za-z0-9+/=]+", "sha256-DIGEST", page_of(name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_longer_than_the_terminal(name: str, width: int) -> None:
    assert max(map(len, text_of(name, width).splitlines())) <= width


def test_hostile_names_are_escaped_on_the_page_and_harmless_in_the_terminal() -> None:
    assert samples.HOSTILE_NAME not in page_of("hostile_names")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text_of("hostile_names"))


def test_predicted_and_realised_time_are_compared() -> None:
    assert section(samples.good(), "time").sentences[1].endswith("they took 9.17 s, a difference of +2.6 %.")


@pytest.mark.parametrize(
    ("predicted", "reason"),
    [((), "does not come from findings with steady step times"), ((0,), "the findings time sizes from 32 to 32 only")],
)
def test_without_a_prediction_it_says_why(predicted: tuple[int, ...], reason: str) -> None:
    manifest, lines = samples.good()
    known = tuple(manifest.predicted_steps[place] for place in predicted)

    sentences = section((manifest.model_copy(update={"predicted_steps": known}), lines), "time").sentences

    assert reason in sentences[-1]


def test_the_resume_command_is_said_where_there_is_something_to_resume() -> None:
    assert "--resume" in text_of("interrupted")
    assert "--resume" not in text_of("good")


@pytest.mark.parametrize("state", list(TrainingState))
def test_every_state_has_an_answer(state: TrainingState) -> None:
    _, lines = samples.good()

    verdict = build_training_verdict(samples.manifest(state), lines)

    assert verdict.answer
    assert verdict.headline.endswith(".")
    assert state is not TrainingState.DIVERGED or verdict.status == "unstable"


def test_a_training_that_has_not_begun_has_a_report_without_charts() -> None:
    page = render_training_html(samples.manifest(TrainingState.UNFINISHED), ())

    assert "The training is not finished after 0 epochs." in page
    assert get_plotlyjs() not in page


def test_what_never_changes_is_not_drawn() -> None:
    manifest, lines = samples.good()
    steps = [line.model_copy(update={"global_batch_size": 64, "lr": 0.1}) if isinstance(line, StepLine) else line for line in lines]

    assert {"Batch size", "Learning rate"} <= {chart.title for chart in training_charts(manifest, lines)}
    assert not {"Batch size", "Learning rate"} & {chart.title for chart in training_charts(manifest, steps)}


def test_the_loss_chart_shows_training_and_validation() -> None:
    manifest, lines = samples.good()
    steps = [line for line in lines if isinstance(line, StepLine)]

    assert [trace.name for trace in loss_chart(steps, []).data] == ["training"]
    assert [trace.name for trace in time_chart(steps, manifest).data] == ["realised", "predicted"]
    assert [trace.name for trace in time_chart(steps, manifest.model_copy(update={"predicted_steps": ()})).data] == ["realised"]


def test_a_training_that_diverged_speaks_of_a_checkpoint_only_where_there_is_one() -> None:
    manifest, lines = samples.diverged()
    saved = EventLine(step=10, samples=1280, training_s=1.0, event=LogEvent.CHECKPOINT)

    without, with_one = (build_training_verdict(manifest, made).lead[0] for made in (lines, (lines[0], saved, *lines[1:])))

    assert "checkpoint" not in without
    assert with_one == f"{without} The last checkpoint was made before, while the loss was finite."
