from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from oracles.oracle_memory import attempt, ceiling_by_counting, ceiling_of, peak_of, recorded, search, trace_of
from rightbatch.fits.memory import calibrate, traced_peak_bytes
from rightbatch.fits.memory_search import MAX_ATTEMPTS, next_attempt, touch_sizes
from rightbatch.records.measurements import Outcome
from rightbatch.units import MIB

traces = st.lists(st.tuples(st.integers(0, 500 * MIB), st.integers(MIB // 64, 16 * MIB), st.integers(0, 64)), min_size=1, max_size=4).map(
    lambda moments: trace_of(*moments)
)
scales = st.integers(8, 24)
"""Eighths of the traced growth that a device needs."""
limits = st.integers(600 * MIB, 12_000 * MIB)


@settings(max_examples=80, deadline=None)
@example(trace=trace_of((0, 16384, 55)), limit=764267533, extra=822996, scale=20, offset=0, measures=True)  # uses of half a byte
@given(trace=traces, limit=limits, extra=st.integers(0, 4000 * MIB), scale=scales, offset=st.integers(0, 100 * MIB), measures=st.booleans())
def test_more_memory_never_lowers_the_ceiling(trace, limit, extra, scale, offset, measures):
    def used(size):
        return scale * peak_of(trace, size) // 8 + offset

    given_trace = recorded(trace, used) if measures else trace
    less, more = (ceiling_of(search(given_trace, used, bytes_, 10**6)) for bytes_ in (limit, limit + extra))

    assert (more or 0) >= (less or 0)


@settings(max_examples=60, deadline=None)
@example(trace=trace_of((106154271, 27338, 64)), limit=645895424, scale=24, offset=41648247, measures=False)  # the second touch is not safe
@example(trace=trace_of((314448926, 20706, 3)), limit=629145601, scale=8, offset=21245, measures=False)
@example(trace=trace_of((85330157, 16777196, 0)), limit=629145620, scale=24, offset=62472371, measures=False)
@given(trace=traces, limit=st.integers(600 * MIB, 3000 * MIB), scale=scales, offset=st.integers(0, 100 * MIB), measures=st.booleans())
def test_ceiling_of_a_deterministic_device_is_exact(trace, limit, scale, offset, measures):
    def used(size):
        return scale * peak_of(trace, size) // 8 + offset

    assume(used(5) <= limit)
    points = search(recorded(trace, used) if measures else trace, used, limit, 3000)

    assert ceiling_of(points) == ceiling_by_counting(used, limit, 3000)
    assert all(p.outcome is Outcome.RAN for p in points)
    assert len(points) <= (3 if measures else MAX_ATTEMPTS)


@settings(max_examples=60, deadline=None)
@given(trace=traces, limit=limits, noise=st.lists(st.floats(0.9, 1.1), min_size=12, max_size=12), measures=st.booleans())
def test_attempts_stay_within_the_prediction_and_end(trace, limit, noise, measures):
    factors = iter(noise)

    def used(size):
        return round(next(factors) * peak_of(trace, size))

    trace = recorded(trace, used) if measures else trace
    points = [attempt(trace, used, limit, size) for size in touch_sizes(trace, limit, 10**6)[:1]]

    while points and (size := next_attempt(trace, limit, points, 10**6)) is not None:
        assert len(points) < MAX_ATTEMPTS
        assert all(p.outcome is Outcome.RAN or size < p.micro_batch_size for p in points)
        if any(p.outcome is Outcome.RAN for p in points):
            assert calibrate(trace, points).used_bytes(traced_peak_bytes(trace, size)) <= limit
        points.append(attempt(trace, used, limit, size))


@settings(max_examples=80, deadline=None)
@given(trace=traces, limit=limits, scale=st.integers(4, 32), offset=st.integers(0, 100 * MIB))
def test_a_touch_fits_whatever_sane_multiple_of_the_trace_a_device_needs(trace, limit, scale, offset):
    def used(size):
        return scale * peak_of(trace, size) // 8 + offset

    assume(used(5) <= limit)

    assert all(used(size) <= limit for size in touch_sizes(recorded(trace, used), limit, 10**6))
