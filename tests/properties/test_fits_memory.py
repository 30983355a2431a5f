from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oracles.oracle_memory import attempt, ceiling_by_counting, ceiling_of, peak_of, search, trace_of
from rightbatch.fits.memory import calibrate, traced_peak_bytes
from rightbatch.fits.memory_search import MAX_ATTEMPTS, next_attempt, touch_sizes
from rightbatch.records.measurements import Outcome
from rightbatch.units import MIB

traces = st.lists(st.tuples(st.integers(0, 500 * MIB), st.integers(MIB // 64, 16 * MIB), st.integers(0, 64)), min_size=1, max_size=4).map(
    lambda moments: trace_of(*moments)
)
limits = st.integers(600 * MIB, 12_000 * MIB)


@settings(max_examples=60, deadline=None)
@given(trace=traces, limit=limits, extra=st.integers(0, 4000 * MIB), offset=st.integers(0, 100 * MIB))
def test_more_memory_never_lowers_the_ceiling(trace, limit, extra, offset):
    def used(size):
        return peak_of(trace, size) + offset

    less, more = (ceiling_of(search(trace, used, bytes_, 10**6)) for bytes_ in (limit, limit + extra))

    assert (more or 0) >= (less or 0)


@settings(max_examples=40, deadline=None)
@given(trace=traces, limit=st.integers(600 * MIB, 3000 * MIB), offset=st.integers(0, 100 * MIB))
def test_ceiling_of_a_deterministic_device_is_exact(trace, limit, offset):
    def used(size):
        return peak_of(trace, size) + offset

    assume(used(4) <= limit)
    points = search(trace, used, limit, 3000)

    assert ceiling_of(points) == ceiling_by_counting(used, limit, 3000)


@settings(max_examples=60, deadline=None)
@given(trace=traces, limit=limits, noise=st.lists(st.floats(0.9, 1.1), min_size=MAX_ATTEMPTS, max_size=MAX_ATTEMPTS))
def test_attempts_stay_within_the_prediction_and_end(trace, limit, noise):
    points = [attempt(trace, lambda b: round(noise[0] * peak_of(trace, b)), limit, size) for size in touch_sizes(trace, limit, 10**6)[:1]]

    while points and (size := next_attempt(trace, limit, points, 10**6)) is not None:
        assert len(points) < MAX_ATTEMPTS
        assert all(p.outcome is Outcome.RAN or size < p.micro_batch_size for p in points)
        if any(p.outcome is Outcome.RAN for p in points):
            assert calibrate(trace, points).used_bytes(traced_peak_bytes(trace, size)) <= limit
        factor = noise[len(points)]
        points.append(attempt(trace, lambda b, factor=factor: round(factor * peak_of(trace, b)), limit, size))
