"""A device whose memory use follows a planted law, and the naive search for its ceiling."""

from rightbatch.fits.memory_search import next_attempt, safe_touch, touch_sizes
from rightbatch.records.measurements import LiveMoment, MemoryPoint, MemoryTrace, Outcome


def trace_of(*moments, consistent=True, recorded_on="device"):
    return MemoryTrace(
        batch_sizes=(2, 3),
        recorded_on=recorded_on,
        event_count=10,
        moments=tuple(
            LiveMoment(fixed_bytes=f, per_sample_bytes=s, per_sample_squared_bytes=q, module=f"layer{i}", operation="aten.convolution")
            for i, (f, s, q) in enumerate(moments)
        ),
        consistent=consistent,
    )


def recorded(trace, used, sizes=(2, 3, 5)):
    """The same trace, with what a device used while it was recorded."""
    return trace.model_copy(update={"batch_sizes": sizes, "used_bytes": tuple(used(size) for size in sizes), "warm_up_size": sizes[0]})


def peak_of(trace, size):
    peak = 0
    for moment in trace.moments:
        peak = max(peak, moment.fixed_bytes + moment.per_sample_bytes * size + moment.per_sample_squared_bytes * size * size)
    return peak


def ceiling_by_counting(used, limit_bytes, largest_allowed):
    size = 0
    while size < largest_allowed and used(size + 1) <= limit_bytes:
        size += 1
    return size or None


def attempt(trace, used, limit_bytes, size, *, purpose="approach", kills=False):
    bytes_ = used(size)
    if bytes_ > limit_bytes:
        outcome = Outcome.OUT_OF_MEMORY if kills else Outcome.OVER_LIMIT
        return MemoryPoint(
            micro_batch_size=size,
            purpose=purpose,
            outcome=outcome,
            traced_bytes=peak_of(trace, size),
            used_bytes=None if kills else bytes_,
        )
    return MemoryPoint(micro_batch_size=size, purpose=purpose, outcome=Outcome.RAN, traced_bytes=peak_of(trace, size), used_bytes=bytes_)


def search(trace, used, limit_bytes, largest_allowed, *, kills=False):
    """Run touches and approaches as the tuner does; returns the attempts in order."""
    points = []
    for wanted in touch_sizes(trace, limit_bytes, largest_allowed):
        size = safe_touch(trace, limit_bytes, points, wanted)
        if not size:
            break
        points.append(attempt(trace, used, limit_bytes, size, purpose="touch", kills=kills))
        if points[-1].outcome is not Outcome.RAN:
            break
    while points and (size := next_attempt(trace, limit_bytes, points, largest_allowed)) is not None:
        points.append(attempt(trace, used, limit_bytes, size, kills=kills))
    return points


def ceiling_of(points):
    return max((p.micro_batch_size for p in points if p.outcome is Outcome.RAN), default=None)
