"""The search for the memory ceiling: trace, touch, approach, prove; on several ranks every decision is the smallest of theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from rightbatch.engine.isolation import Completed, Host, Killed, OutOfMemory
from rightbatch.engine.ranks import Ranks, share_of_limit
from rightbatch.engine.rig import Rig
from rightbatch.fits import memory as memory_fit
from rightbatch.fits import memory_search
from rightbatch.probes import memory
from rightbatch.records.measurements import (
    AlternativeTrace,
    MemoryLimit,
    MemoryMeasurements,
    MemoryPoint,
    MemoryTrace,
    Outcome,
    WorkloadSummary,
)
from rightbatch.tuner.request import Request

T = TypeVar("T")
Purpose = Literal["touch", "approach", "proof"]

_FEWEST_SAMPLES = 2
"""However short the time: batch normalisation cannot train on one."""
_FIRST_SAMPLES = 8
_TRACE_STEPS = 2
_ATTEMPT_STEPS = 3.0
"""An attempt takes two steps, and its batch and model must be made: about the time of three."""


@dataclass(frozen=True, kw_only=True)
class MemorySearch:
    """One search on one host.

    Attributes:
        host: Runs the probes.
        request: What is asked.
        workload: What is trained.
        clock_s: Seconds of the budget's clock.
        ranks: The processes that search together.
        bucket_bytes: Gradient buckets that each of several processes keeps, held during every attempt.
    """

    host: Host
    request: Request
    workload: WorkloadSummary
    clock_s: Callable[[], float]
    ranks: Ranks
    bucket_bytes: int = 0

    def run(self, limit: MemoryLimit, allocator: str, budget_s: float) -> MemoryMeasurements:
        """Find the ceiling within a limit and a time.

        Args:
            limit: What this process may use.
            allocator: How that is measured.
            budget_s: Seconds that the search may take.
        """
        end_s = self.clock_s() + budget_s
        limit = share_of_limit(limit, self.ranks)
        limit = limit.model_copy(update={"limit_bytes": self._agreed(limit.limit_bytes, "limit")})
        cap = self._agreed(min(self.workload.train_size, self.request.max_batch or self.workload.train_size), "largest size")
        trace, pace_s = self._trace(limit.limit_bytes)
        points = self._touch(trace, limit, cap, pace_s, end_s)
        self._approach(points, trace, limit, cap, end_s)
        is_settled = self._next(trace, limit, points, cap) is None
        largest = max((point.micro_batch_size for point in points if point.outcome is Outcome.RAN), default=0)
        has_failed = any(point.outcome is not Outcome.RAN for point in points)
        if self.request.certify and largest and largest < cap and (is_settled or has_failed):
            self._prove(points, trace, limit, cap)
            largest = max(point.micro_batch_size for point in points if point.outcome is Outcome.RAN)
        return MemoryMeasurements(
            trace=trace,
            limit=limit,
            points=tuple(points),
            largest_allowed=cap,
            largest_allowed_source="dataset" if cap == self.workload.train_size else "--max-batch",
            stopped_by="cap" if largest >= cap else "failure" if has_failed else "limit" if is_settled else "budget",
            allocator=allocator,
            accumulation_trace=None
            if self.workload.couples_samples
            else self._side_trace(partial(memory.trace, accumulation_steps=2, limit_bytes=limit.limit_bytes)),
            evaluation_trace=self._side_trace(partial(memory.evaluation_trace, limit_bytes=limit.limit_bytes)),
            alternatives=self._alternatives(end_s, limit.limit_bytes),
            world_size=self.ranks.world_size,
            bucket_bytes=self.bucket_bytes,
        )

    def _touch(self, trace: MemoryTrace, limit: MemoryLimit, cap: int, pace_s: float, end_s: float) -> list[MemoryPoint]:
        points: list[MemoryPoint] = []
        touches = memory_search.touch_sizes(trace, limit.limit_bytes, cap, is_refused=self._is_refused(limit))
        for place in range(self._agreed(len(touches), "touches")):
            size = _affordable_touch(points, touches[place], pace_s, end_s - self.clock_s())
            size = self._agreed(memory_search.safe_touch(trace, limit.limit_bytes, points, size), "touch")
            if size > max((point.micro_batch_size for point in points), default=0):
                points.append(self._attempt(size, "touch", trace, limit))
        return points

    def _approach(self, points: list[MemoryPoint], trace: MemoryTrace, limit: MemoryLimit, cap: int, end_s: float) -> None:
        while self._next(trace, limit, points, cap) is not None:
            affordable = min(cap, _affordable(points, end_s - self.clock_s()))
            size = self._next(trace, limit, points, affordable)
            if size is None:
                return
            points.append(self._attempt(size, "approach", trace, limit))

    def _next(self, trace: MemoryTrace, limit: MemoryLimit, points: list[MemoryPoint], cap: int) -> int | None:
        """The next size that every rank would try; none when one of them has its answer."""
        size = memory_search.next_attempt(trace, limit.limit_bytes, points, cap, is_refused=self._is_refused(limit))
        return self._agreed(size or 0, "next size") or None

    def _is_refused(self, limit: MemoryLimit) -> bool:
        """Whether going over the limit is refused by the kernel in the middle of a step, under an allocator of no fixed use."""
        return limit.once_a_process and self.request.malloc == "default"

    def _prove(self, points: list[MemoryPoint], trace: MemoryTrace, limit: MemoryLimit, cap: int) -> None:
        """Try one sample more than the largest that ran, which must fail; if it runs it is the ceiling, and nothing is proved."""
        size = max(point.micro_batch_size for point in points if point.outcome is Outcome.RAN) + 1
        if size <= cap and all(point.micro_batch_size != size for point in points):
            points.append(self._attempt(size, "proof", trace, limit))

    def _trace(self, limit_bytes: int) -> tuple[MemoryTrace, float]:
        """Record the allocations of a step once for all ranks; also return the seconds a sample that this took, which bounds a pace."""
        start_s = self.clock_s()
        text = self.ranks.share_text(lambda: self._recorded(limit_bytes).model_dump_json(), stage="trace")
        trace = MemoryTrace.model_validate_json(text)
        if self.ranks.world_size > 1:
            trace = trace.model_copy(update={"used_bytes": ()})  # of another device, and without the buckets
        return trace, (self.clock_s() - start_s) / sum(_TRACE_STEPS * size for size in trace.batch_sizes or (1,))

    def _recorded(self, limit_bytes: int) -> MemoryTrace:
        traced = self.host.call(partial(memory.trace, limit_bytes=limit_bytes))
        return traced.value if isinstance(traced, Completed) else memory.no_trace(f"Memory ran out while recording ({words(traced)}).")

    def _side_trace(self, probe: Callable[[Rig], MemoryTrace]) -> MemoryTrace | None:
        """Record another way of running the model on the first rank; what cannot be recorded is left out."""
        if self.ranks.rank != 0:
            return None
        traced = self.host.call(probe)
        return traced.value if isinstance(traced, Completed) and traced.value.moments else None

    def _alternatives(self, end_s: float, limit_bytes: int) -> tuple[AlternativeTrace, ...]:
        if not self.request.alternatives or self.ranks.rank != 0 or self.clock_s() >= end_s:
            return ()
        traced = self.host.call(partial(memory.alternatives, limit_bytes=limit_bytes))
        return traced.value if isinstance(traced, Completed) else ()

    def _attempt(self, size: int, purpose: Purpose, trace: MemoryTrace, limit: MemoryLimit) -> MemoryPoint:
        """Try a size; on several ranks it ran only if it ran on all."""
        if limit.once_a_process:
            self.host.renew()
        traced_bytes = memory_fit.traced_peak_bytes(trace, size) + self.bucket_bytes
        probe = partial(memory.attempt, traced_bytes=traced_bytes, limit_bytes=limit.limit_bytes, ballast_bytes=self.bucket_bytes)
        outcome = self.host.call(probe, size, purpose)
        point = outcome.value if isinstance(outcome, Completed) else _failed(size, purpose, traced_bytes, outcome)
        if self._agreed(int(point.outcome is Outcome.RAN), f"outcome at {size}") or point.outcome is not Outcome.RAN:
            return point
        return point.model_copy(update={"outcome": Outcome.OVER_LIMIT, "detail": "did not fit on another rank"})

    def _agreed(self, value: int, stage: str) -> int:
        return self.ranks.agree_min(value, stage=stage)


def _failed(size: int, purpose: Purpose, traced_bytes: int, outcome: OutOfMemory | Killed) -> MemoryPoint:
    return MemoryPoint(
        micro_batch_size=size,
        purpose=purpose,
        outcome=Outcome.OUT_OF_MEMORY if isinstance(outcome, OutOfMemory) else Outcome.KILLED,
        traced_bytes=traced_bytes,
        detail=words(outcome),
    )


def words(outcome: OutOfMemory | Killed) -> str:
    """Say how a probe ended that did not complete."""
    return outcome.message if isinstance(outcome, OutOfMemory) else f"killed by {outcome.signal_name}"


def _affordable_touch(points: list[MemoryPoint], wanted: int, pace_s: float, left_s: float) -> int:
    """The touch that is wanted, or a smaller one when time is short.

    Before anything ran only the recording tells a pace, and far too slow a one: what it affords is safe, and so is a handful of samples.
    """
    if points:
        return min(wanted, max(_FEWEST_SAMPLES, _affordable(points, left_s)))
    return min(wanted, max(_FIRST_SAMPLES, int(left_s / (_ATTEMPT_STEPS * pace_s)))) if pace_s > 0 else wanted


def _affordable(points: list[MemoryPoint], left_s: float) -> int:
    """Largest size whose attempt should end in the time left, by a line through the step times of the two largest that ran.

    A sample more is taken to cost a tenth of the mean at least: step times are noisy, and rarely flat.
    """
    ran = sorted((point.micro_batch_size, point.step_time_s) for point in points if point.step_time_s)
    if not ran:
        return _FEWEST_SAMPLES if left_s <= 0 else 2**62
    size, time_s = ran[-1]
    slope_s = time_s / size
    if len(ran) > 1:
        smaller, smaller_time_s = ran[-2]
        slope_s = max(slope_s / 10, (time_s - smaller_time_s) / (size - smaller))
    return max(0, size + int((left_s / _ATTEMPT_STEPS - time_s) / slope_s))
