"""The report says where more devices stop paying, and on what assumption that rests."""

from findings_samples import good
from rightbatch.records.estimates import Status
from rightbatch.report.device_section import devices


def _said(**changes):
    findings = good()
    curve = findings.recommendation.devices.model_copy(update=changes)
    section = devices(findings.model_copy(update={"recommendation": findings.recommendation.model_copy(update={"devices": curve})}))
    return " ".join(section.sentences) if section else None


def test_number_beyond_which_devices_stop_paying_is_named_with_its_efficiency():
    curve = good().recommendation.devices
    limit = round(curve.pays_up_to.value)
    beyond = next(point for point in curve.points if point.ranks > limit)

    assert f"Beyond {limit} devices more stop paying: with {beyond.ranks} the efficiency is" in _said()
    assert f"that number is {limit // 2} to {2 * limit} (90 % interval)" in _said()


def test_efficiency_that_never_falls_below_half_is_a_bound():
    estimate = good().recommendation.devices.pays_up_to.model_copy(update={"status": Status.AT_LEAST, "value": 16.0, "high": None})

    assert "Up to 16 devices" in _said(pays_up_to=estimate)
    assert "or more (90 % interval)" in _said(pays_up_to=estimate)


def test_assumption_about_the_exchange_is_stated():
    assert "The exchange of 38.2 MiB a step is computed for a ring at 10.0 GiB/s and 20.0 us a message" in _said()
    assert "taken to cost nothing" in _said(interconnect=None)


def test_one_device_alone_needs_no_section():
    assert _said(points=good().recommendation.devices.points[:1]) is None
