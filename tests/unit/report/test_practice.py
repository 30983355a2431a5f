"""Common practice is reported with intervals, powers of two among it."""

from findings_samples import good, inconclusive
from rightbatch.records.estimates import Estimate
from rightbatch.report.decision_sections import practice


def _said(low, value, high):
    findings = good()
    ratio = Estimate(value=value, low=low, high=high, n=9)
    test = findings.step_time.power_of_two.model_copy(update={"relative_time": ratio})
    curve = findings.step_time.model_copy(update={"power_of_two": test})
    return " ".join(practice(findings.model_copy(update={"step_time": curve})).sentences)


def test_power_that_is_faster_or_slower_is_said_with_its_interval():
    assert "a step of 128 is 3.1 % faster [-4.4, -2 %] than steps of 127 and 129, their mean." in _said(0.956, 0.969, 0.98)
    assert "a step of 128 is 3 % slower [+2, +4 %] than steps of" in _said(1.02, 1.03, 1.04)


def test_power_that_makes_no_difference_is_said_to():
    assert "a step of 128 is neither faster nor slower [-1, +2 %] than" in _said(0.99, 1.0, 1.02)


def test_single_round_decides_nothing():
    assert "not known to be faster" in _said(None, 0.9, None)


def test_powers_are_reported_without_a_predicted_cost():
    section = practice(inconclusive())
    assert section.tables == ()
    assert section.sentences[0].startswith("Powers of two, tested")
