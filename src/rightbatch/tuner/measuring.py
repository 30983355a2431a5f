"""Running the probes one after another: what each one needs from those before it, and how much time it may take."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeVar

from rightbatch.engine.isolation import ChildHost, Completed, Host, InProcessHost, Killed, OutOfMemory
from rightbatch.engine.provenance import environment
from rightbatch.engine.rig import Rig
from rightbatch.errors import IsolationError, NothingFitsError, UsageError
from rightbatch.fits import memory as memory_fit
from rightbatch.fits import noise_scale as noise_fit
from rightbatch.fits import step_time as step_time_fit
from rightbatch.probes import gradient_noise, loader, memory, step_time
from rightbatch.records.environment import Environment
from rightbatch.records.measurements import (
    GradientNoiseMeasurements,
    LoaderMeasurements,
    MemoryMeasurements,
    MemoryPoint,
    MemoryTrace,
    NoiseProblem,
    Outcome,
    StepTimeMeasurements,
    WorkloadSummary,
)
from rightbatch.records.plan import Goal
from rightbatch.tuner.request import Part, Progress, Request

T = TypeVar("T")
Purpose = Literal["touch", "approach", "proof"]

SHARES: Mapping[Part, float] = {Part.MEMORY: 0.2, Part.STEP_TIME: 0.3, Part.LOADER: 0.1, Part.GRADIENT_NOISE: 0.4}
"""How the budget is divided among the parts that are still to be measured."""

_BUDGET_IN_USE = 0.95
"""The rest is for steps that overrun, and for judging."""
_FIRST_SAMPLES = 8
_TRACE_STEPS = 2
_ATTEMPT_STEPS = 3.0
"""An attempt takes two steps, and its batch and model must be made: about the time of three."""
_LARGEST_ROUND_SHARE = 0.1
"""No size is timed whose step alone takes more of the part's time than this."""
_COMMON_SIZES = (32, 128)
"""Always timed, because people ask what they would cost; 64 and 256 come with the knee or are interpolated."""
_DEFAULT_PILOT_BATCH = 64
_NOISE_MICRO_BATCH = 32
_GHOST_BATCH = 8


class Measuring:
    """Runs probes on one host, within one budget.

    Args:
        build: Builds the rig where the probes run.
        request: What is asked.
        progress: Where to say what goes on.
        clock_s: Seconds of the budget's clock.
    """

    def __init__(self, build: Callable[[], Rig], request: Request, progress: Progress, clock_s: Callable[[], float]) -> None:
        self._request = request
        self._progress = progress
        self._clock_s = clock_s
        self._start_s = clock_s()
        self._stage = "starting"
        self._say("loading the workload")
        host = ChildHost if request.isolation == "child" else InProcessHost
        self._host: Host = host(build, self._say)
        self._start_s = clock_s()  # the budget is for the probes: importing torch and reading the data may take longer than a small one

    def close(self) -> None:
        """End the host."""
        self._host.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the workload was loaded."""
        return self._clock_s() - self._start_s

    def describe(self) -> tuple[WorkloadSummary, Environment]:
        """Ask what the workload is, and where it runs.

        Raises:
            NothingFitsError: Memory runs out on a single sample, without any training.
            UsageError: The goal is energy and the device has no meter for it.
        """
        self._stage = "workload"
        described = self._host.call(Rig.describe)
        if not isinstance(described, Completed):
            described = self._host.call(Rig.describe, 1)
        if not isinstance(described, Completed):
            raise NothingFitsError(
                f"one sample must fit in memory to train at all; it does not ({_words(described)}); use a smaller model or input."
            )
        if self._request.objective.goal is Goal.ENERGY and not self._required(_has_energy_meter):
            raise UsageError("--goal energy needs an energy meter, which NVIDIA devices have; this device has none: use --goal time.")
        return described.value, self._required(environment, self._request.isolation)

    def on_host(self, probe: Callable[[Rig], T]) -> T:
        """Run something small beside the workload."""
        return self._required(probe)

    def share_s(self, part: Part, waiting: frozenset[Part]) -> float:
        """Return the seconds that a part may take: its share of what is left for the parts still waiting."""
        left_s = max(0.0, _BUDGET_IN_USE * self._request.budget_s - self.elapsed_s)
        return left_s * SHARES[part] / sum(SHARES[other] for other in waiting)

    def memory(self, workload: WorkloadSummary, budget_s: float) -> MemoryMeasurements:
        """Trace, touch, approach. No size is tried that the calibrated trace puts above the limit."""
        self._stage = "memory"
        end_s = self._clock_s() + budget_s
        limit, allocator = self._required(memory.limit, self._request.limit_bytes)
        cap = min(workload.train_size, self._request.max_batch or workload.train_size)
        trace, pace_s = self._trace()
        points: list[MemoryPoint] = []
        for wanted in memory_fit.touch_sizes(trace, limit.limit_bytes, cap):
            size = _affordable_touch(points, wanted, pace_s, end_s - self._clock_s())
            if memory_fit.touch_is_safe(trace, limit.limit_bytes, points, size):
                points.append(self._attempt(size, "touch", trace, limit.limit_bytes))
        while memory_fit.next_attempt(trace, limit.limit_bytes, points, cap) is not None:
            affordable = min(cap, _affordable(points, end_s - self._clock_s()))
            size_in_time = memory_fit.next_attempt(trace, limit.limit_bytes, points, affordable)
            if size_in_time is None:
                break
            points.append(self._attempt(size_in_time, "approach", trace, limit.limit_bytes))
        is_settled = memory_fit.next_attempt(trace, limit.limit_bytes, points, cap) is None
        largest = max((point.micro_batch_size for point in points if point.outcome is Outcome.RAN), default=0)
        has_failed = any(point.outcome is not Outcome.RAN for point in points)
        return MemoryMeasurements(
            trace=trace,
            limit=limit,
            points=tuple(points),
            largest_allowed=cap,
            largest_allowed_source="dataset" if cap == workload.train_size else "--max-batch",
            stopped_by="cap" if largest >= cap else "failure" if has_failed else "limit" if is_settled else "budget",
            allocator=allocator,
        )

    def _trace(self) -> tuple[MemoryTrace, float]:
        """Record the allocations of a step; also return the seconds a sample that this took, which bounds a step's pace."""
        start_s = self._clock_s()
        traced = self._host.call(memory.trace)
        trace = traced.value if isinstance(traced, Completed) else memory.no_trace(f"Memory ran out while recording ({_words(traced)}).")
        return trace, (self._clock_s() - start_s) / sum(_TRACE_STEPS * size for size in trace.batch_sizes)

    def _attempt(self, size: int, purpose: Purpose, trace: MemoryTrace, limit_bytes: int) -> MemoryPoint:
        traced_bytes = memory_fit.traced_peak_bytes(trace, size)
        outcome = self._host.call(partial(memory.attempt, traced_bytes=traced_bytes, limit_bytes=limit_bytes), size, purpose)
        if isinstance(outcome, Completed):
            return outcome.value
        return MemoryPoint(
            micro_batch_size=size,
            purpose=purpose,
            outcome=Outcome.OUT_OF_MEMORY if isinstance(outcome, OutOfMemory) else Outcome.KILLED,
            traced_bytes=traced_bytes,
            detail=_words(outcome),
        )

    def step_time(self, workload: WorkloadSummary, found: MemoryMeasurements, budget_s: float) -> StepTimeMeasurements:
        """Look at the machine, scan, then time the sizes that matter."""
        self._stage = "step time"
        ran = {point.micro_batch_size: point.step_time_s or 0.0 for point in found.points if point.outcome is Outcome.RAN}
        ceiling = max(ran)
        machine = self._required(step_time.contention)
        affordable_s = budget_s * _LARGEST_ROUND_SHARE
        scan = self._required(
            partial(step_time.scan, largest=ceiling, budget_s=budget_s * 0.25, affordable_step_s=affordable_s),
        )
        seconds_a_sample = min(seconds / size for size, seconds in scan)
        largest = ceiling if ran[ceiling] <= affordable_s else max(scan[-1][0], _power_of_two_below(affordable_s / seconds_a_sample))
        wanted = [size for size in (*_COMMON_SIZES, workload.lr_batch_size or _COMMON_SIZES[0]) if size <= largest]
        sizes = step_time_fit.candidate_sizes(scan, largest=min(largest, ceiling), must_include=wanted)
        measure = partial(
            step_time.measure,
            is_decided=step_time_fit.is_decided,
            budget_s=budget_s * 0.7,
            machine=machine,
            largest_affordable=None if largest >= ceiling else largest,
        )
        while len(sizes) > 1:
            outcome = self._host.call(measure, sizes)
            if isinstance(outcome, Completed):
                return outcome.value
            self._say(f"memory ran out beside the batches of the other sizes: leaving out {sizes[-1]}")
            sizes = sizes[:-1]
        return self._required(measure, sizes)

    def loader(self, budget_s: float) -> LoaderMeasurements:
        """Time the data loader."""
        self._stage = "data loader"
        return self._required(partial(loader.measure, budget_s=budget_s))

    def gradient_noise(
        self, workload: WorkloadSummary, found: MemoryMeasurements, timed: StepTimeMeasurements | None, budget_s: float
    ) -> GradientNoiseMeasurements:
        """Measure the noise at a micro-batch size that the hardware runs well and the dataset holds many of."""
        self._stage = "gradient noise"
        ceiling = max(point.micro_batch_size for point in found.points if point.outcome is Outcome.RAN)
        pilot_batch_size = min(workload.lr_batch_size or _DEFAULT_PILOT_BATCH, ceiling, workload.train_size)
        micro_batch_size = _noise_micro_batch_size(workload, ceiling, timed)
        outcome = self._host.call(
            partial(
                gradient_noise.measure,
                micro_batch_size=micro_batch_size,
                pilot_batch_size=pilot_batch_size,
                batch_norm=workload.batch_norm,
                is_decided=noise_fit.is_decided,
                budget_s=budget_s,
            )
        )
        if isinstance(outcome, Completed):
            return outcome.value
        return GradientNoiseMeasurements(
            snapshots=(),
            pilot_batch_size=pilot_batch_size,
            pilot_lr=None,
            pilot_samples=0,
            batch_norm=workload.batch_norm,
            problem=NoiseProblem.OUT_OF_MEMORY,
            remark=_words(outcome),
        )

    def _required(self, probe: Callable[..., T], *args: object) -> T:
        """Run a probe that has no business failing for lack of memory."""
        outcome = self._host.call(probe, *args)
        if isinstance(outcome, Completed):
            return outcome.value
        raise IsolationError(f"the {self._stage} probe must run at a few samples; it ended with {_words(outcome)}; is memory short?")

    def _say(self, detail: str) -> None:
        self._progress.update(self._stage, min(1.0, self.elapsed_s / self._request.budget_s), detail)


def _has_energy_meter(rig: Rig) -> bool:
    return rig.meters.energy is not None


def _words(outcome: OutOfMemory | Killed) -> str:
    return outcome.message if isinstance(outcome, OutOfMemory) else f"killed by {outcome.signal_name}"


def _affordable_touch(points: list[MemoryPoint], wanted: int, pace_s: float, left_s: float) -> int:
    """The touch that is wanted, or a smaller one when time is short.

    Before anything ran only the recording tells a pace, and far too slow a one; if even that pace is fast enough there is nothing to
    fear, else a handful of samples go first.
    """
    if points:
        return max(1, min(wanted, _affordable(points, left_s)))
    return wanted if _ATTEMPT_STEPS * pace_s * wanted <= left_s else min(wanted, _FIRST_SAMPLES)


def _affordable(points: list[MemoryPoint], left_s: float) -> int:
    """Largest size whose attempt should end in the time left, by a line through the step times of the two largest that ran.

    A sample more is taken to cost a tenth of the mean at least: step times are noisy, and rarely flat.
    """
    ran = sorted((point.micro_batch_size, point.step_time_s) for point in points if point.step_time_s)
    if not ran:
        return 1 if left_s <= 0 else 2**62
    size, time_s = ran[-1]
    slope_s = time_s / size
    if len(ran) > 1:
        smaller, smaller_time_s = ran[-2]
        slope_s = max(slope_s / 10, (time_s - smaller_time_s) / (size - smaller))
    return max(0, size + int((left_s / _ATTEMPT_STEPS - time_s) / slope_s))


def _power_of_two_below(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


def _noise_micro_batch_size(workload: WorkloadSummary, ceiling: int, timed: StepTimeMeasurements | None) -> int:
    """A quarter of the best-throughput size or so: small micro-batches say most about the noise a sample, large ones run fastest."""
    preferred = _NOISE_MICRO_BATCH
    if timed is not None:
        best = max(timed.points, key=lambda point: point.micro_batch_size / sorted(point.step_times_s)[len(point.step_times_s) // 2])
        preferred = max(_GHOST_BATCH, min(128, best.micro_batch_size // 4))
    least = _GHOST_BATCH if workload.batch_norm else 1
    return max(1, min(max(least, min(preferred, workload.train_size // 64)), ceiling, max(1, workload.train_size // 2)))
