"""A sweep in words, as text and as a page."""

import math
import re

import pytest
from plotly.offline import get_plotlyjs

import sweep_samples as samples
from golden_files import golden
from planted_sweeps import Law, settings_of, summary, sweep
from rightbatch.fits.sweep import fit_sweep
from rightbatch.records.plan import BatchPlan
from rightbatch.records.sweep import SweepResult, TrialSpec
from rightbatch.report.document import Section
from rightbatch.report.sweep import render_sweep_html, render_sweep_text
from rightbatch.report.sweep_charts import pareto_chart, samples_chart, sweep_charts
from rightbatch.report.sweep_verdict import build_sweep_verdict

NAMES = sorted(samples.ALL)


def text_of(name: str, width: int = 80) -> str:
    return render_sweep_text(samples.ALL[name](), width=width, colour=False)


def page_of(name: str) -> str:
    return render_sweep_html(samples.ALL[name]()).replace(get_plotlyjs(), "PLOTLY_JS")


def section(result: SweepResult, key: str) -> Section:
    return next(each for each in build_sweep_verdict(result).sections if each.key == key)


@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_stored_text(name: str) -> None:
    golden(f"sweep_{name}.txt", text_of(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_longer_than_the_terminal(name: str, width: int) -> None:
    assert max(map(len, text_of(name, width).splitlines())) <= width


def test_hostile_names_are_escaped_on_the_page_and_harmless_in_the_terminal() -> None:
    assert samples.HOSTILE_NAME not in page_of("hostile_names")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text_of("hostile_names"))


def test_the_page_draws_six_charts_of_a_sweep_and_none_of_one_that_never_arrived() -> None:
    titles = [chart.title for chart in sweep_charts(samples.good())]

    assert titles == [
        "Time to the target",
        "Samples to the target",
        "Steps to the target",
        "Samples against steps",
        "Best learning rate",
        "Best accuracy at equal samples and at equal time",
    ]
    assert list(sweep_charts(samples.never())) == []
    assert get_plotlyjs() not in render_sweep_html(samples.never())


def test_every_chart_stands_in_a_section_that_is_there() -> None:
    keys = {each.key for each in build_sweep_verdict(samples.good()).sections}

    assert {chart.section for chart in sweep_charts(samples.good())} <= keys


def test_the_samples_chart_shows_the_measured_sizes_the_hyperbola_and_the_band() -> None:
    result = samples.good()

    figure = samples_chart(result, result.points)

    assert [trace.name for trace in figure.data] == ["robust curve, 90 %", "hyperbola", "measured, 95 %"]


def test_an_axis_over_a_short_range_has_ticks_too() -> None:
    result = samples.good()
    near = [point for point in result.points if point.steps.value is not None][:2]

    drawn = [tick for tick in pareto_chart(result, near).layout.xaxis.tickvals if near[1].steps.value <= tick <= near[0].steps.value]

    assert len(drawn) > 1


def test_whether_seconds_were_measured_alone_is_said() -> None:
    assert "measured alone" in section(samples.good(), "sizes").sentences[0]
    assert "ran side by side" in section(samples.partial(), "sizes").sentences[0]
    unsteady = samples.good().model_copy(update={"time_source": "alone, unsteady"})
    assert "too unsteadily to rely on: free the machine" in section(unsteady, "sizes").sentences[0]
    assert "which size is soonest may not" in build_sweep_verdict(unsteady).lead[-1]
    assert (build_sweep_verdict(unsteady).status, build_sweep_verdict(samples.good()).status) == ("unstable", "ok")
    assert build_sweep_verdict(unsteady).answer.endswith(" · unsteady times")
    assert build_sweep_verdict(samples.good()).lead == ()
    assert any(key.note.endswith("steps timed alone, unsteady") for key in build_sweep_verdict(unsteady).key_numbers)


def test_the_plan_is_judged_by_its_regret_and_its_rate() -> None:
    first, second = section(samples.good(), "practice").sentences

    assert first.startswith("The plan of rightbatch find is batch 96, between two sizes that were trained: ")
    assert "times the tuned one" in second


def test_the_interval_of_the_time_has_the_units_of_the_time() -> None:
    (note,) = [key.note for key in build_sweep_verdict(samples.good()).key_numbers if key.label == "time to the target"]

    assert re.fullmatch(r"95 % from \d+ ms to \d+ ms, steps timed alone", note)


def test_a_target_that_nothing_reached_says_what_was_reached() -> None:
    verdict = build_sweep_verdict(samples.never())

    assert verdict.headline == "No size reached accuracy >= 0.97."
    assert "best smoothed accuracy was 0.485" in verdict.lead[0]


def test_the_cost_is_set_against_the_full_grid() -> None:
    sentences = section(samples.good(), "cost").sentences

    assert re.search(r"They trained on [\d,]+ samples, \d+ % of the [\d,.e+]+ that all sizes", sentences[1])


def test_sizes_that_only_some_seeds_reached_are_not_said_to_have_failed() -> None:
    class Failing(Law):
        def samples(self, spec: TrialSpec) -> float:
            return math.inf if spec.seed == 2 else super().samples(spec)

    settings = settings_of(sizes=(32, 64), first_size=32)
    result = fit_sweep(settings, summary(), sweep(Failing(), settings), is_complete=True, device_name="planted")

    verdict = build_sweep_verdict(result)
    assert verdict.headline == "No size reached accuracy >= 0.97 with every seed."
    assert verdict.lead[0].startswith("32 and 64 got there with some seeds only.")
    assert "with every seed" in verdict.answer


def test_the_distance_from_a_hyperbola_through_two_sizes_is_not_told() -> None:
    settings = settings_of()
    result = fit_sweep(settings, summary(), sweep(Law(largest=16), settings), is_complete=True, device_name="planted")

    assert sum(point.samples.value is not None for point in result.points) == 2 < len(result.points)
    assert not any("on average" in sentence for sentence in section(result, "critical").sentences)
    assert any("on average" in sentence for sentence in section(samples.good(), "critical").sentences)


def test_a_plan_at_the_best_size_is_said_to_take_the_least_time() -> None:
    settings = settings_of()
    trials = sweep(Law(), settings)
    alone = fit_sweep(settings, summary(), trials, is_complete=True, device_name="planted")
    plan = BatchPlan(global_batch_size=alone.best_size, micro_batch_size=alone.best_size)

    result = fit_sweep(settings, summary(), trials, is_complete=True, device_name="planted", plan=plan)

    assert section(result, "practice").sentences == (
        f"The plan of rightbatch find is batch {alone.best_size}: the least time to the target.",
    )
