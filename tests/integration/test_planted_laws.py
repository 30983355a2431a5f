"""The whole of ``find`` on devices whose laws are known: it must recover each law, and say so where a law hides one from it."""

import math
from functools import cache

import pytest

from planted_cases import CASES, PlantedCase, find_planted, planted_device, planted_knee
from rightbatch.errors import NothingFitsError
from rightbatch.fits.critical_batch import CALIBRATION_MEDIAN, GROWTH_WITH_PILOT_MEDIAN
from rightbatch.records.estimates import Status
from rightbatch.records.plan import Binding, Findings

BY_NAME = {case.name: case for case in CASES}
FITTING = [case for case in CASES if not case.out_of_memory_at_one]
TRACED_SAMPLES = 7
"""The trace itself runs up to so many samples; where fewer fit, it runs out of memory and is caught."""
MOST_MISSES = 3
"""Of 22 intervals at 95 %, so many may miss the truth by chance: more happen once in about 100 drawings."""


@cache
def found(case: PlantedCase) -> tuple[Findings, int, int]:
    """Findings, out-of-memory errors and the largest size that ran: each case runs once for all tests."""
    findings, device = find_planted(case)
    return findings, device.out_of_memory_errors, device.largest_run


def each(cases: list[PlantedCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@each(FITTING)
def test_ceiling_is_the_planted_one(case):
    findings, _, _ = found(case)

    assert findings.memory.status is Status.OK
    assert findings.memory.ceiling == (case.ceiling or case.train_size)
    assert findings.memory.ceiling_is_limit is (case.ceiling is not None)


@each(FITTING)
def test_nothing_is_tried_above_the_limit(case):
    findings, out_of_memory_errors, largest_run = found(case)

    assert largest_run == findings.memory.ceiling
    assert (out_of_memory_errors == 0) == (findings.memory.ceiling >= TRACED_SAMPLES)
    assert findings.memory.predicted_ceiling is None or largest_run <= findings.memory.predicted_ceiling


def test_nothing_fits_where_not_even_one_sample_does():
    device = planted_device(BY_NAME["out of memory at one sample"])

    with pytest.raises(NothingFitsError, match=f"one sample must fit .* of {device.capacity_bytes} bytes"):
        find_planted(BY_NAME["out of memory at one sample"])


@each(FITTING)
def test_knee_is_the_planted_one_or_its_neighbour(case):
    curve = found(case)[0].step_time
    sizes = tuple(point.micro_batch_size for point in curve.points)

    distance = abs(sizes.index(curve.knee) - sizes.index(planted_knee(case, sizes)))

    assert distance <= (1 if case.jitter else 0)
    assert curve.status is Status.OK


@each([case for case in FITTING if case.jitter == 0])
def test_step_time_law_is_the_planted_one(case):
    curve = found(case)[0].step_time

    for point in curve.points:
        planted_s = (case.half_saturation + point.micro_batch_size) / case.saturated_samples_per_s
        assert point.step_time_s.value == pytest.approx(planted_s, rel=1e-6)


@each([case for case in FITTING if case.name != "noise swamps the signal"])
def test_noise_scale_is_near_the_planted_one(case):
    """Each within twice its own interval (in logarithms), which chance leaves once in ten thousand."""
    noise = found(case)[0].noise_scale

    assert noise.status is Status.OK
    half_width = math.log(noise.high / noise.low) / 2
    assert abs(math.log(noise.value / case.noise_scale)) < 2 * half_width
    assert half_width < math.log(2.4)


def test_intervals_of_the_noise_scale_hold_the_planted_one():
    missed = [case.name for case in FITTING if not holds(found(case)[0], case)]

    assert len(missed) <= MOST_MISSES


def holds(findings: Findings, case: PlantedCase) -> bool:
    noise = findings.noise_scale
    return noise.low <= case.noise_scale and (noise.high is None or case.noise_scale <= noise.high)


def test_noise_that_cannot_be_bounded_is_a_lower_bound_below_the_truth():
    case = BY_NAME["noise swamps the signal"]

    findings, _, _ = found(case)

    assert findings.noise_scale.status is Status.AT_LEAST
    assert findings.noise_scale.high is None
    assert 0 < findings.noise_scale.low < case.noise_scale
    assert findings.noise_scale.remarks
    assert findings.recommendation.status == "inconclusive"
    assert findings.recommendation.plan is not None


@each([case for case in FITTING if case.name != "noise swamps the signal"])
def test_answer_is_ok_and_one_of_the_equivalent_sizes(case):
    recommendation = found(case)[0].recommendation

    assert recommendation.status == "ok"
    assert recommendation.plan.global_batch_size in recommendation.equivalent_batch_sizes


def test_throughput_that_is_flat_from_the_start_makes_the_smallest_size_best():
    findings, _, _ = found(BY_NAME["saturated throughput"])

    smallest = findings.step_time.points[0].micro_batch_size
    assert findings.step_time.knee == smallest
    assert findings.recommendation.plan.global_batch_size == smallest
    assert findings.recommendation.binding_constraint is Binding.SMALLEST


def test_loader_that_is_slower_than_the_device_binds_and_is_said():
    case = BY_NAME["loader-bound"]

    findings, _, _ = found(case)

    assert findings.loader.samples_per_s.value == pytest.approx(case.loader_samples_per_s, rel=1e-3)
    assert findings.recommendation.binding_constraint is Binding.LOADER
    assert any("data loader delivers" in advice for advice in findings.recommendation.advice)


def test_loader_that_is_faster_than_the_device_does_not_bind():
    findings, _, _ = found(BY_NAME["noise scale 1500"])

    assert findings.recommendation.binding_constraint is Binding.OPTIMUM
    assert not any(point.loader_bound for point in findings.tradeoff.points)


def test_memory_binds_where_the_best_size_is_above_the_ceiling():
    findings, _, _ = found(BY_NAME["ceiling 7"])

    assert findings.recommendation.binding_constraint is Binding.MEMORY
    assert findings.recommendation.plan.global_batch_size == 7


def test_larger_planted_noise_never_lowers_the_recommended_size():
    by_noise = sorted((case for case in CASES if case.name.startswith("noise scale ")), key=lambda case: case.noise_scale)

    sizes = [found(case)[0].recommendation.plan.global_batch_size for case in by_noise]

    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_recommended_size_costs_at_most_a_tenth_more_than_the_planted_best():
    """Time to target by the planted laws: (1 + B_crit / b) * t(b), with B_crit what the stated priors expect of the noise scale."""
    believed = CALIBRATION_MEDIAN * GROWTH_WITH_PILOT_MEDIAN
    for case in FITTING:
        if case.name in {"noise swamps the signal", "loader-bound"}:
            continue
        findings, _, _ = found(case)
        cost = {
            point.global_batch_size: (1 + believed * case.noise_scale / point.global_batch_size)
            * (case.half_saturation + point.global_batch_size)
            for point in findings.tradeoff.points
            if point.accumulation_steps == 1
        }
        chosen = findings.recommendation.plan.global_batch_size
        assert cost[chosen] <= 1.1 * min(cost.values()), case.name
