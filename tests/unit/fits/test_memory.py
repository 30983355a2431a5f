import numpy as np
import pytest

from oracles.oracle_memory import attempt, ceiling_by_counting, ceiling_of, peak_of, recorded, search, trace_of
from rightbatch.fits.memory import calibrate, fit_memory, peak_moment, traced_peak_bytes
from rightbatch.fits.memory_search import MAX_ATTEMPTS, next_attempt, safe_touch, touch_sizes
from rightbatch.records.estimates import Status
from rightbatch.records.measurements import LiveMoment, MemoryLimit, MemoryMeasurements, Outcome, RoundedBytes
from rightbatch.units import GIB, MIB

TRACE = trace_of((300 * MIB, 2 * MIB, 0), (100 * MIB, 5 * MIB, 0), (0, MIB, 2048))
EMPTY = trace_of(recorded_on="none", consistent=False)


def _measurements(trace=TRACE, *, points=(), limit=4 * GIB, cap=10**6, stopped_by="limit", source="dataset"):
    return MemoryMeasurements(
        trace=trace,
        limit=MemoryLimit(limit_bytes=limit, source="--limit"),
        points=tuple(points),
        largest_allowed=cap,
        largest_allowed_source=source,
        stopped_by=stopped_by,
        allocator="fake",
    )


@pytest.mark.parametrize("size", [1, 7, 66, 67, 1000, 4000])
def test_traced_peak_is_the_largest_moment(size):
    assert traced_peak_bytes(TRACE, size) == peak_of(TRACE, size)


def test_peak_moment_changes_with_the_size():
    assert peak_moment(TRACE, 1).module == "layer0"
    assert peak_moment(TRACE, 100).module == "layer1"
    assert peak_moment(TRACE, 5000).module == "layer2"


def test_peak_moment_of_an_empty_trace_is_misuse():
    with pytest.raises(ValueError, match="at least one moment"):
        peak_moment(EMPTY, 1)


def test_one_size_calibrates_the_offset_only():
    point = attempt(TRACE, lambda b: peak_of(TRACE, b) + 50 * MIB, 4 * GIB, 8)

    calibration = calibrate(TRACE, [point])

    assert (calibration.scale, calibration.offset_bytes, calibration.error) == (1.0, 50 * MIB, 0.0)


def test_calibration_is_exact_on_an_affine_device():
    points = [attempt(TRACE, lambda b: round(1.25 * peak_of(TRACE, b)) + 70 * MIB, 40 * GIB, size) for size in (4, 40, 400)]

    calibration = calibrate(TRACE, points)

    assert calibration.scale == pytest.approx(1.25, rel=1e-8)
    assert calibration.offset_bytes == pytest.approx(70 * MIB, abs=64)
    assert calibration.error < 1e-6


def test_calibration_equals_weighted_least_squares():
    rng = np.random.default_rng(2)
    points = [
        attempt(TRACE, lambda b: round(1.4 * peak_of(TRACE, b) * rng.uniform(0.95, 1.05)), 40 * GIB, b) for b in (100, 400, 800, 1500)
    ]
    x = np.array([peak_of(TRACE, p.micro_batch_size) for p in points], dtype=float)
    used = np.array([p.used_bytes for p in points], dtype=float)

    slope, offset = np.polyfit(x, used, 1, w=x)

    calibration = calibrate(TRACE, points)
    assert calibration.scale == pytest.approx(slope, rel=1e-6)
    assert calibration.offset_bytes == pytest.approx(offset, rel=1e-4)


def test_senseless_slope_falls_back_to_the_trace_and_shows_in_the_error():
    points = [attempt(TRACE, lambda b: {4: 900 * MIB, 8: 500 * MIB}[b], 4 * GIB, size) for size in (4, 8)]

    calibration = calibrate(TRACE, points)

    assert calibration.scale == 1.0
    assert calibration.error > 0.2


def test_nothing_measured_leaves_the_trace_as_it_is():
    assert calibrate(TRACE, []).used_bytes(123) == 123


def test_touches_can_be_seen_and_stay_small():
    sizes = touch_sizes(TRACE, 16 * GIB, 10**6)

    traced = [peak_of(TRACE, size) - 300 * MIB for size in sizes]
    assert len(sizes) == 2
    assert 50 * MIB < traced[0] <= 64 * MIB
    assert 8 * sizes[1] >= max(size for size in range(1, 20_000) if peak_of(TRACE, size) <= 16 * GIB) > 8 * (sizes[1] - 1)


def test_touches_respect_a_small_limit_and_the_cap():
    assert max(peak_of(TRACE, size) for size in touch_sizes(TRACE, GIB, 10**6)) <= GIB / 2
    assert touch_sizes(TRACE, GIB, 1) == (1,)
    assert touch_sizes(TRACE, 301 * MIB, 10**6) == ()


def test_touch_that_might_not_fit_is_made_as_small_as_it_must_be():
    ran = attempt(TRACE, lambda b: 2 * peak_of(TRACE, b), 2 * GIB, 2)
    limit = 2 * GIB

    size = safe_touch(TRACE, limit, [ran], 4000)

    def steepest(b):
        return ran.used_bytes + 4 * (peak_of(TRACE, b) - peak_of(TRACE, 2))

    assert 2 < size < 4000
    assert steepest(size) <= limit < steepest(size + 1)
    assert safe_touch(TRACE, limit, [ran], size - 1) == size - 1
    assert safe_touch(TRACE, ran.used_bytes, [ran], 4000) == 0


def test_touch_leaves_a_heap_and_a_quarter_where_the_kernel_refuses():
    recording = TRACE.model_copy(update={"batch_sizes": (1, 2), "used_bytes": (peak_of(TRACE, 1), peak_of(TRACE, 2))})
    limit = 4 * GIB

    (size,) = touch_sizes(recording, limit, 10**6, is_refused=True)

    steepest = peak_of(TRACE, 2) + 4 * (peak_of(TRACE, size) - peak_of(TRACE, 2))
    assert 0.99 * limit / 1.25 < steepest <= limit / 1.25


def test_touch_leaves_a_heap_where_that_is_more_than_a_quarter():
    trace = trace_of((20 * MIB, MIB // 8, 0))
    recording = trace.model_copy(update={"batch_sizes": (1, 2), "used_bytes": (peak_of(trace, 1), peak_of(trace, 2))})

    (size,) = touch_sizes(recording, 150 * MIB, 10**6, is_refused=True)

    steepest = peak_of(trace, 2) + 4 * (peak_of(trace, size) - peak_of(trace, 2))
    assert 85 * MIB < steepest <= (150 - 64) * MIB


@pytest.mark.parametrize(("is_refused", "low", "high"), [(True, 0, 2), (False, 20, 100)])
def test_where_use_wanders_by_a_third_only_the_wide_margin_avoids_refusals(is_refused, low, high):
    rng = np.random.default_rng(0)
    refused_searches = 0
    for _ in range(100):
        points = []
        size = touch_sizes(TRACE, 8 * GIB, 10**6, is_refused=is_refused)[-1]
        while size:
            points.append(attempt(TRACE, lambda b: round(peak_of(TRACE, b) * rng.uniform(1.2, 1.55)), 8 * GIB, size))
            size = next_attempt(TRACE, 8 * GIB, points, 10**6, is_refused=is_refused)
        refused_searches += any(point.outcome is not Outcome.RAN for point in points)
    assert low <= refused_searches <= high


def test_search_ends_exactly_at_the_ceiling_of_an_affine_device():
    def used(size):
        return peak_of(TRACE, size) * 5 // 4 + 90 * MIB

    points = search(TRACE, used, 6 * GIB, 10**6)

    assert ceiling_of(points) == ceiling_by_counting(used, 6 * GIB, 10**6)
    assert all(p.outcome is Outcome.RAN for p in points)
    assert len(points) <= MAX_ATTEMPTS


def test_search_stops_at_the_cap_and_at_what_is_affordable():
    points = search(TRACE, lambda b: peak_of(TRACE, b), 6 * GIB, 100)

    assert ceiling_of(points) == 100
    small = [attempt(TRACE, lambda b: peak_of(TRACE, b), 6 * GIB, 4)]
    assert next_attempt(TRACE, 60 * GIB, small, 1000, largest_affordable=20) == 20


def test_growth_is_at_most_eightfold():
    points = [attempt(TRACE, lambda b: peak_of(TRACE, b), 900 * GIB, 4)]

    assert next_attempt(TRACE, 900 * GIB, points, 10**6) == 32


@pytest.mark.parametrize("kills", [False, True])
def test_search_turns_back_after_a_size_that_failed(kills):
    def used(size):
        return peak_of(TRACE, size) * (2 if size >= 128 else 1)

    points = search(TRACE, used, GIB, 10**6, kills=kills)

    failures = [p.micro_batch_size for p in points if p.outcome is not Outcome.RAN]
    assert failures
    assert ceiling_of(points) is not None
    assert len(points) <= MAX_ATTEMPTS
    assert all(
        later.micro_batch_size < failures[0]
        for later in points[points.index(next(p for p in points if p.outcome is not Outcome.RAN)) + 1 :]
    )


def test_first_attempt_without_points_is_a_touch_and_after_a_failure_is_smaller():
    failed = attempt(TRACE, lambda b: 10 * GIB, GIB, 8, kills=True)

    assert next_attempt(TRACE, 16 * GIB, [], 10**6) == touch_sizes(TRACE, 16 * GIB, 10**6)[0]
    assert next_attempt(TRACE, GIB, [failed], 10**6) == 4
    assert next_attempt(TRACE, GIB, [attempt(TRACE, lambda b: 10 * GIB, GIB, 1, kills=True)], 10**6) is None


def test_noisy_device_stays_below_the_limit_by_the_error():
    rng = np.random.default_rng(4)
    over = 0
    for _ in range(40):
        points = search(TRACE, lambda b: round(peak_of(TRACE, b) * rng.uniform(0.95, 1.05) + 80 * MIB), 6 * GIB, 10**6)
        over += any(p.outcome is not Outcome.RAN for p in points)
        assert ceiling_of(points) > 0.7 * ceiling_by_counting(lambda b: peak_of(TRACE, b) + 80 * MIB, 6 * GIB, 10**6)
        assert len(points) <= MAX_ATTEMPTS
    assert over <= 20


def test_use_measured_while_recording_leaves_one_touch_and_the_ceiling():
    def used(size):
        return peak_of(TRACE, size) * 5 // 4 + 90 * MIB

    points = search(recorded(TRACE, used), used, 6 * GIB, 10**6)

    assert [p.purpose for p in points] == ["touch", "approach"]
    assert ceiling_of(points) == ceiling_by_counting(used, 6 * GIB, 10**6)


def test_the_first_recording_does_not_calibrate_and_none_does_without_an_attempt():
    def used(size):
        return peak_of(TRACE, size) + (GIB if size == 2 else 90 * MIB)

    trace = recorded(TRACE, used)

    assert calibrate(trace, [attempt(trace, used, 6 * GIB, 40)]).offset_bytes == pytest.approx(90 * MIB)
    assert calibrate(trace, []).offset_bytes == 0


def test_recordings_that_an_attempt_hardly_exceeds_tell_no_slope():
    def used(size):
        return peak_of(TRACE, size) + {2: 90, 3: 70, 5: 60}.get(size, 80) * MIB

    trace = recorded(TRACE, used)
    near = next_attempt(trace, 6 * GIB, [attempt(trace, used, 6 * GIB, 8)], 10**6)
    close = next_attempt(trace, 500 * MIB, [attempt(trace, used, 500 * MIB, 8)], 10**6)

    assert near == 64
    assert used(8) + 4 * (peak_of(TRACE, close) - peak_of(TRACE, 8)) <= 500 * MIB


def test_readings_that_agree_by_chance_still_leave_a_margin():
    def used(size):
        return round(1.3 * peak_of(TRACE, size)) + (100 if size < 10 else 80) * MIB

    trace = recorded(TRACE, used)
    points = search(trace, used, 6 * GIB, 10**6)

    last = points[-1]
    assert last.outcome is Outcome.RAN
    assert 0.975 * 6 * GIB < last.used_bytes <= 0.982 * 6 * GIB


def test_search_without_a_trace_finds_a_ceiling():
    def used(size):
        return 200 * MIB + 3 * MIB * size

    points = search(EMPTY, used, 2 * GIB, 10**6)

    best = ceiling_by_counting(used, 2 * GIB, 10**6)
    assert 0.6 * best <= ceiling_of(points) <= best


def test_curve_names_the_ceiling_the_prediction_and_the_shares():
    trace = TRACE.model_copy(update={"parameter_bytes": 90 * MIB, "input_bytes_per_sample": 1000})
    points = search(trace, lambda b: peak_of(trace, b) + 90 * MIB, 4 * GIB, 300)

    curve = fit_memory(_measurements(trace, points=points, cap=300, stopped_by="cap"))

    assert curve.status is Status.OK
    assert curve.ceiling == 300
    assert not curve.ceiling_is_limit
    assert curve.predicted_ceiling == ceiling_by_counting(lambda b: peak_of(trace, b) + 90 * MIB, 4 * GIB, 10**6)
    assert sum(share.size_bytes for share in curve.shares) == peak_of(trace, 300)
    assert curve.bytes_at_one == pytest.approx(peak_of(trace, 1) + 90 * MIB, abs=16)
    assert curve.peak_module == "layer1"
    assert 30 <= len(curve.curve) <= 40
    assert any("memory alone would allow" in remark for remark in curve.remarks)


def test_prediction_stays_below_a_size_that_failed():
    points = [attempt(TRACE, lambda b: peak_of(TRACE, b), 4 * GIB, 50), attempt(TRACE, lambda b: 99 * GIB, 4 * GIB, 200, kills=True)]

    assert fit_memory(_measurements(points=points, stopped_by="failure")).predicted_ceiling == 199


def test_nothing_fits_when_one_sample_is_over_the_limit():
    curve = fit_memory(_measurements(limit=200 * MIB))

    assert curve.status is Status.NOTHING_FITS
    assert curve.ceiling is None
    assert curve.predicted_ceiling is None
    assert "layer0" in curve.remarks[0]


def test_nothing_fits_when_one_sample_failed():
    points = [attempt(TRACE, lambda b: 10 * GIB, GIB, 1, kills=True)]

    assert fit_memory(_measurements(points=points, stopped_by="failure")).status is Status.NOTHING_FITS


def test_nothing_tried_is_indeterminate():
    assert fit_memory(_measurements(stopped_by="budget")).status is Status.INDETERMINATE


def test_inconsistent_trace_is_said():
    trace = trace_of((0, MIB, 0), consistent=False)
    points = [attempt(trace, lambda b: peak_of(trace, b), GIB, 8)]

    curve = fit_memory(_measurements(trace, points=points))

    assert curve.status is Status.INCONSISTENT
    assert any("disagree" in remark for remark in curve.remarks)


def test_missing_trace_gives_a_ceiling_without_a_prediction():
    points = search(EMPTY, lambda b: 200 * MIB + 3 * MIB * b, 2 * GIB, 10**6)

    curve = fit_memory(_measurements(EMPTY, points=points, limit=2 * GIB))

    assert curve.status is Status.OK
    assert curve.ceiling == ceiling_of(points)
    assert (curve.predicted_ceiling, curve.calibration_scale) == (None, None)
    assert curve.bytes_at_one == pytest.approx(203 * MIB, rel=1e-3)


def test_budget_that_ended_the_search_is_said():
    points = [attempt(TRACE, lambda b: peak_of(TRACE, b), 4 * GIB, 50)]

    assert any("--budget" in remark for remark in fit_memory(_measurements(points=points, stopped_by="budget")).remarks)


def test_a_moment_counts_at_its_own_sizes_only_and_rounds_its_steps_up():
    steps = RoundedBytes(fixed_bytes=0, per_sample_bytes=3, multiple_bytes=10)
    few = LiveMoment(fixed_bytes=500, per_sample_bytes=0, largest_size=1, module="", operation="a")
    some = LiveMoment(fixed_bytes=1, per_sample_bytes=2, rounded=(steps, steps), smallest_size=2, largest_size=9, module="", operation="b")
    many = LiveMoment(fixed_bytes=0, per_sample_bytes=0, per_sample_cubed_bytes=4, smallest_size=10, module="", operation="c")
    trace = TRACE.model_copy(update={"moments": (few, some, many)})

    peaks = [traced_peak_bytes(trace, size) for size in (0, 1, 2, 4, 9, 10)]

    assert peaks == [500, 500, 5 + 20, 9 + 40, 19 + 60, 4000]
    assert [peak_moment(trace, size).operation for size in (1, 9, 10)] == ["a", "b", "c"]
