"""The report says where the learning rate comes from, and how far a range test may be believed."""

from findings_samples import good, lr_range, unstable, untuned
from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.training import ProbeOutcome, SweepEvidence, TrainingProbe
from rightbatch.report.lr_section import learning_rate
from rightbatch.report.verdict import answer_line


def _said(findings):
    return " ".join(learning_rate(findings).sentences)


def test_tested_rate_is_told_from_a_tuned_one():
    assert "1.2 is 6 times the rate that the range test found at 64 (0.2), by the saturating linear rule." in _said(untuned())
    assert "0.2 is 2 times the rate tuned at 128 (0.1), by the square root rule." in _said(good())
    assert "lr 1.2 (from 0.2 @ 64, tested)" in answer_line(untuned())


def test_the_rates_of_further_parameter_groups_are_given_too():
    grouped = good().model_copy(update={"workload": good().workload.model_copy(update={"further_lrs": (0.01, 0.5)})})

    assert "first parameter group; the others' follow by the same factor: 0.01 becomes 0.02 and 0.5 becomes 1." in _said(grouped)


def _chosen_at(size, **workload):
    """A tested rate that is used at the very size of its test."""
    findings = untuned()
    plan = findings.recommendation.plan.model_copy(update={"global_batch_size": size, "micro_batch_size": size, "accumulation_steps": 1})
    lr = findings.recommendation.lr.model_copy(update={"base_batch_size": size, "factor": 1.0})
    recommendation = findings.recommendation.model_copy(update={"plan": plan, "lr": lr})
    work = findings.workload.model_copy(update=workload)
    return findings.model_copy(update={"recommendation": recommendation, "workload": work})


def test_a_rate_used_where_it_was_tested_is_still_told_from_a_tuned_one():
    assert "lr 1.2 (tested)" in answer_line(_chosen_at(64))
    assert "range test found at 64 (0.2)." in _said(_chosen_at(64))


def test_the_answer_names_the_optimizer_that_stood_in():
    assert "lr 1.2 (tested with Adam)" in answer_line(_chosen_at(64, optimizer_given=False, optimizer="Adam"))


def test_a_rate_that_a_sweep_tuned_is_not_called_a_range_tests():
    probe = TrainingProbe(global_batch_size=64, lr=1.2, outcome=ProbeOutcome.REACHED, samples=5000.0, log_error=0.1)
    swept = SweepEvidence(target="accuracy >= 0.97", folder="runs/sweep", probes=(probe,))
    findings = _chosen_at(64).model_copy(update={"swept": swept})

    assert "lr 1.2 (swept)" in answer_line(findings)
    assert "1.2 is the rate that the sweep tuned at 64 (0.2)." in _said(findings)


def test_a_rate_that_was_trained_is_told_from_the_rules():
    findings = good()
    recommendation = findings.recommendation
    over_rule = Estimate(value=1.5, low=1.1, high=1.9, n=4)
    lr = recommendation.lr.model_copy(update={"over_rule": over_rule})
    plan = recommendation.plan.model_copy(update={"lr": 0.3})
    checked = findings.model_copy(update={"recommendation": recommendation.model_copy(update={"lr": lr, "plan": plan})})

    assert "lr 0.3 (from 0.1 @ 128, trained)" in answer_line(checked)
    assert "0.2 is 2 times the rate tuned at 128 (0.1), by the square root rule." in _said(checked)
    assert "Trained from one checkpoint, the best rate is 1.5 [1.1, 1.9] times that, so 0.3 is given." in _said(checked)


def test_range_test_is_given_with_its_interval_its_edge_and_its_bias():
    said = _said(untuned())
    assert "Range test at batch 64 with SGD: 0.2 [0.0707, 0.283] from 76800 samples of short runs; the loss diverges at 0.8." in said
    assert "Short runs favour rates that pay off soon" in said
    assert [row[-1] for row in learning_rate(untuned()).tables[-1].rows] == ["", "", *["as good as the best"] * 2, "", "diverged"]


def test_open_ends_are_said():
    bound = lr_range().model_copy(update={"status": Status.AT_LEAST, "high": None, "divergence_edge": None})
    said = _said(untuned().model_copy(update={"lr_range": bound}))
    assert "0.2 [0.0707, open]" in said
    assert "none of them diverged" in said


def test_optimizer_that_stood_in_is_named():
    work = untuned().workload.model_copy(update={"optimizer_given": False, "lr": None})
    tested = lr_range().model_copy(update={"optimizer": "Adam"})
    said = _said(untuned().model_copy(update={"workload": work, "lr_range": tested}))
    assert "with Adam, in place of the optimizer that is not given" in said


def test_tuned_rate_stays_the_base_beside_a_test_on_request():
    assert "The workload's own rate, 0.1, is 0.5 times that; it stays the base" in _said(good().model_copy(update={"lr_range": lr_range()}))


def test_test_that_found_nothing_says_why():
    nothing = lr_range().model_copy(
        update={
            "status": Status.INDETERMINATE,
            "value": None,
            "low": None,
            "high": None,
            "verdicts": (),
            "remarks": ("Every rate diverged.",),
        }
    )
    findings = unstable().model_copy(update={"lr_range": nothing})
    assert _said(findings).endswith("Every rate diverged.")
