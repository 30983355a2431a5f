"""``find`` tests learning rates where no tuned one is known, couples the answer to the plan, and keeps it."""

from dataclasses import replace

import pytest

from fakes import FakeDevice, GivenSource, planted_rig, planted_samples, planted_workload
from rightbatch.records.estimates import Status
from rightbatch.records.run import RunFolder
from rightbatch.tuner.find import find
from rightbatch.tuner.request import STANDARD_PARTS, Part, Request, SilentProgress

REQUEST = Request(isolation="in-process", budget_s=60.0, lr_range_if_untuned=True)


def found_by(workload, device, request):
    run = find(GivenSource(workload), request, SilentProgress(), build_rig=planted_rig(device, workload), clock_s=device.now_s)
    return run.findings


@pytest.fixture(scope="module")
def untuned():
    """A device, and a noisy quadratic with an optimizer that does not say where its rate was tuned."""
    device = FakeDevice(fixed_time_s=0.05, load_time_s=1e-4)
    return device, planted_workload(device, planted_samples(8.0, 3000, 0), lr=0.01)


@pytest.fixture(scope="module")
def kept(untuned, tmp_path_factory):
    """Where the first run keeps everything, and what it found."""
    device, workload = untuned
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, found_by(workload, device, replace(REQUEST, out=out))


def test_tested_rate_takes_the_place_of_a_tuned_one(kept):
    _, findings = kept
    tested, lr, plan = findings.lr_range, findings.recommendation.lr, findings.recommendation.plan

    assert tested.status is Status.OK
    assert tested.value <= 1.0 < tested.divergence_edge
    assert (lr.base_lr, lr.base_batch_size, lr.base_is_tested) == (tested.value, 64, True)
    assert plan.lr == pytest.approx(tested.value * lr.factor)
    assert findings.workload.lr_batch_size is None


def test_noise_is_measured_along_a_pilot_at_the_tested_rate(kept):
    out, findings = kept
    assert findings.workload.lr != findings.lr_range.value
    assert RunFolder.open(out).read_measurements().gradient_noise.pilot_lr == pytest.approx(findings.lr_range.value)


def test_noise_of_another_rate_is_measured_again_once_a_rate_was_tested(untuned, tmp_path):
    device, workload = untuned
    noise_first = replace(REQUEST, out=tmp_path / "run", parts=frozenset({Part.GRADIENT_NOISE}), lr_range_if_untuned=False)
    found_by(workload, device, noise_first)
    before = RunFolder.open(tmp_path / "run").read_measurements().gradient_noise

    findings = found_by(workload, device, replace(REQUEST, out=tmp_path / "run"))

    after = RunFolder.open(tmp_path / "run").read_measurements().gradient_noise
    assert findings.reused_parts == (Part.MEMORY.value,)
    assert (before.pilot_lr, after.pilot_lr) == (0.01, pytest.approx(findings.lr_range.value))


def test_noise_of_another_rate_is_not_taken_from_a_folder_whose_run_was_cut_off_behind_the_test(untuned, tmp_path):
    device, workload = untuned
    request = replace(REQUEST, out=tmp_path / "run", parts=frozenset({Part.GRADIENT_NOISE}), lr_range_if_untuned=False)
    found_by(workload, device, request)
    found_by(workload, device, replace(request, parts=frozenset({Part.LR_RANGE})))

    again = found_by(workload, device, request)

    assert again.reused_parts == (Part.MEMORY.value, Part.LR_RANGE.value)


def test_test_takes_no_more_than_its_share_of_the_budget(untuned, kept):
    assert kept[1].duration_s <= 60.0
    share = 0.3 / 1.3
    device, _ = untuned
    at_the_same_rate = planted_workload(device, planted_samples(8.0, 3000, 0), lr=kept[1].lr_range.value)
    before = device.now
    rates_only = found_by(at_the_same_rate, device, replace(REQUEST, save=False, lr_range_if_untuned=False))
    without_s = device.now - before
    assert rates_only.lr_range is None
    assert kept[1].duration_s - without_s <= share * 60.0


def test_repeating_the_command_measures_nothing_anew(untuned, kept):
    device, workload = untuned
    out, findings = kept
    before = device.now

    again = found_by(workload, device, replace(REQUEST, out=out))

    assert device.now == before
    assert again.reused_parts == tuple(
        part.value for part in (Part.MEMORY, Part.STEP_TIME, Part.LOADER, Part.LR_RANGE, Part.GRADIENT_NOISE)
    )
    assert again.lr_range == findings.lr_range
    assert RunFolder.open(out).read_measurements().lr_range.rounds


def test_tuned_rate_is_tested_on_request_only_and_stays_the_base(untuned, tmp_path):
    device, plain = untuned
    workload = replace(plain, lr_batch_size=32)

    silent = found_by(workload, device, replace(REQUEST, out=tmp_path / "run"))
    asked = found_by(workload, device, replace(REQUEST, out=tmp_path / "run", parts=STANDARD_PARTS | {Part.LR_RANGE}))

    assert silent.lr_range is None
    assert asked.lr_range.batch_size == 32
    assert Part.GRADIENT_NOISE.value in asked.reused_parts
    assert (asked.recommendation.lr.base_lr, asked.recommendation.lr.base_is_tested) == (0.01, False)


def test_stand_in_optimizer_is_tested_where_none_is_given(untuned):
    device, workload = untuned

    findings = found_by(replace(workload, optimizer=None), device, replace(REQUEST, save=False))

    assert findings.lr_range.optimizer == "Adam"
    assert findings.recommendation.lr.base_is_tested == (findings.lr_range.value is not None)
