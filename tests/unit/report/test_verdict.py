from datetime import UTC, datetime

import pytest

import findings_samples as samples
from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.plan import BatchPlan, Binding, Findings
from rightbatch.report import phrases
from rightbatch.report.document import Section
from rightbatch.report.verdict import answer_line, build_verdict, headline


def with_plan(findings: Findings, plan: BatchPlan, **changes: object) -> Findings:
    return findings.model_copy(update={"recommendation": findings.recommendation.model_copy(update={"plan": plan}), **changes})


def section(findings: Findings, key: str) -> Section:
    return next(each for each in build_verdict(findings).sections if each.key == key)


def test_the_answer_line_is_the_documented_one() -> None:
    expected = "batch 512 = micro 128 x accumulate 4, lr 0.2 (from 0.1 @ 128) · ceiling 1640 · knee 128 · noise scale 480 [350, 690]"

    assert answer_line(samples.good()) == expected


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (BatchPlan(global_batch_size=512, micro_batch_size=512), "batch 512"),
        (BatchPlan(global_batch_size=512, micro_batch_size=128, world_size=4), "batch 512 = micro 128 x ranks 4"),
        (
            BatchPlan(global_batch_size=512, micro_batch_size=64, accumulation_steps=2, world_size=4),
            "batch 512 = micro 64 x accumulate 2 x ranks 4",
        ),
        (BatchPlan(global_batch_size=128, micro_batch_size=128, lr=0.0003), "batch 128, lr 0.0003"),
    ],
)
def test_what_a_plan_does_not_have_is_left_out(plan: BatchPlan, words: str) -> None:
    bare = with_plan(samples.good(), plan, memory=None, step_time=None, noise_scale=None)

    assert answer_line(bare) == words


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (samples.memory_only, "ceiling 1640"),
        (samples.inconclusive, "batch 128, lr 0.1 · ceiling 1640 · knee 128 · inconclusive"),
        (samples.nothing_fits, "nothing fits: one sample needs 3.10 GiB, the limit is 2.00 GiB"),
    ],
)
def test_a_result_that_is_no_clear_answer_says_so_in_its_line(sample, words: str) -> None:
    assert answer_line(sample()) == words


def test_one_sided_bounds_are_written_as_bounds() -> None:
    line = answer_line(samples.at_least())

    assert "ceiling >= 1640" in line
    assert line.endswith("noise scale >= 200")


def test_an_unstable_line_ends_with_its_status() -> None:
    assert answer_line(samples.unstable()).endswith("· unstable")


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (samples.good, "Train with batches of 512"),
        (samples.memory_only, "largest micro-batch that fits is 1640"),
        (samples.inconclusive, "hardware alone"),
        (samples.nothing_fits, "Not even one sample fits"),
        (samples.unstable, "Too unsteady to rely on"),
    ],
)
def test_every_status_has_its_own_headline(sample, words: str) -> None:
    assert words in headline(sample())


@pytest.mark.parametrize("sample", [samples.memory_only, samples.inconclusive, samples.nothing_fits, samples.unstable])
def test_a_result_that_is_no_clear_answer_says_what_to_do_next(sample) -> None:
    lead = " ".join(build_verdict(sample()).lead)

    assert any(word in lead for word in ("--budget", "--fresh", "Raise the limit", "no recommendation"))


def test_a_loss_that_is_not_finite_stands_above_unsteady_timings() -> None:
    findings = samples.unstable()
    why = "The plan rests on speed alone, because the gradient noise was not determined. The loss or a gradient is not finite."
    recommendation = findings.recommendation
    without_noise = recommendation.model_copy(update={"evidence_level": 0, "advice": (recommendation.advice[0], why)})

    verdict = build_verdict(findings.model_copy(update={"recommendation": without_noise}))

    assert verdict.lead[0] == why
    assert "advice" not in {each.key for each in verdict.sections}


def test_parts_that_were_not_measured_are_named_and_have_no_section() -> None:
    verdict = build_verdict(samples.memory_only())

    assert {each.key for each in verdict.sections} == {"memory", "limits", "provenance"}
    assert (
        "Not measured in this run: speed, the data loader, gradient noise and the cost until a target."
        in section(samples.memory_only(), "limits").sentences
    )


def test_a_loader_slower_than_the_fastest_size_is_said_to_hold_up_such_sizes_only() -> None:
    slow = samples.loader().model_copy(update={"samples_per_s": Estimate(value=900.0, low=880.0, high=920.0, n=5)})

    spoken = " ".join(section(samples.good().model_copy(update={"loader": slow}), "speed").sentences)

    assert "sizes that the device takes faster wait for it" in spoken
    assert "wait for it" not in " ".join(section(samples.good(), "speed").sentences)


def test_without_predicted_costs_no_time_is_called_relative() -> None:
    good = samples.good()
    unknown = Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE)
    points = tuple(
        point.model_copy(update={"relative_time": unknown, "relative_samples": unknown, "regret": None}) for point in good.tradeoff.points
    )

    said = section(good.model_copy(update={"tradeoff": good.tradeoff.model_copy(update={"points": points})}), "sizes").sentences

    assert not any("relative" in sentence for sentence in said)


def test_a_bound_on_the_global_batch_is_not_taken_for_one_on_the_micro_batch() -> None:
    good = samples.good()
    bound = good.recommendation.model_copy(update={"binding_constraint": Binding.MAX_BATCH})

    assert any("--max-global-batch" in sentence for sentence in section(good.model_copy(update={"recommendation": bound}), "why").sentences)


def test_common_practice_is_compared_with_signed_intervals() -> None:
    rows = {row[0]: row[2] for row in section(samples.good(), "practice").tables[0].rows}

    assert rows["32"] == "+68 % [+51, +87]"


def test_the_age_is_told_only_with_a_clock() -> None:
    later = datetime(2026, 3, 5, 10, 0, tzinfo=UTC)

    aged = dict(build_verdict(samples.good(), now=later).sections[-1].tables[0].rows)["measured"]

    assert "(3 days ago)" in aged
    assert "ago" not in dict(section(samples.good(), "provenance").tables[0].rows)["measured"]


def test_control_and_direction_characters_are_taken_out_of_names() -> None:
    assert phrases.plain("a\x1b[31m\u202eb\nc") == "a?[31m?b?c"


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(value=1.14, low=1.09, high=1.19, n=9), "+14 % [+9, +19]"),
        (Estimate(value=7.6, low=1.8, high=15.0, n=9), "7.6x [1.8, 15]"),
        (Estimate(value=1.0, low=1.0, high=1.0, n=9), "the same"),
        (Estimate(value=0.97, low=0.94, high=1.01, n=9), "-3 % [-6, +1]"),
        (Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE), "unknown"),
    ],
)
def test_excess_is_a_signed_percentage(estimate: Estimate, words: str) -> None:
    assert phrases.excess(estimate) == words


def test_lists_read_like_a_sentence() -> None:
    assert [phrases.listed(words) for words in ((), (64,), (64, 128), (64, 128, 256))] == ["", "64", "64 and 128", "64, 128 and 256"]


def test_a_point_without_a_value_is_unknown_and_never_zero() -> None:
    lost = Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE)
    curve = samples.step_time()
    curve = curve.model_copy(
        update={"points": (curve.points[0].model_copy(update={"samples_per_s": lost, "step_time_s": lost}), *curve.points[1:])}
    )
    findings = samples.inconclusive().model_copy(update={"step_time": curve})

    assert build_verdict(findings).sizes[0].samples_per_s == "unknown"
    assert section(findings, "speed").tables[0].rows[0] == ("8", "unknown", "unknown")


def test_costs_that_were_not_predicted_are_left_empty() -> None:
    lost = Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE)
    tradeoff = samples.tradeoff()
    points = tuple(point.model_copy(update={"relative_time": lost, "relative_samples": lost, "regret": None}) for point in tradeoff.points)
    findings = samples.inconclusive().model_copy(
        update={"tradeoff": tradeoff.model_copy(update={"points": points, "critical_batch_size": lost})}
    )

    verdict = build_verdict(findings)

    assert {row.relative_time for row in verdict.sizes} == {""}
    assert {row[1] for row in section(findings, "sizes").tables[0].rows} == {"unknown"}
