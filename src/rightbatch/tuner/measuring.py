"""Running the probes one after another: what each one needs from those before it, and how much time it may take."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from rightbatch.engine.isolation import ChildHost, Completed, Host, InProcessHost
from rightbatch.engine.provenance import environment
from rightbatch.engine.ranks import Ranks, SingleRank
from rightbatch.engine.rig import Rig
from rightbatch.errors import IsolationError, NothingFitsError, UsageError
from rightbatch.fits import lr_range as lr_range_fit
from rightbatch.fits import noise_scale as noise_fit
from rightbatch.fits import power_of_two
from rightbatch.fits import step_time as step_time_fit
from rightbatch.probes import branch, gradient_noise, loader, lr_range, memory, step_time
from rightbatch.records.environment import Environment
from rightbatch.records.lr_range_measurements import LrRangeMeasurements
from rightbatch.records.measurements import (
    GradientNoiseMeasurements,
    LoaderMeasurements,
    MemoryMeasurements,
    NoiseProblem,
    Outcome,
    StepTimeMeasurements,
    WorkloadSummary,
)
from rightbatch.records.plan import Findings, Goal
from rightbatch.records.training import BranchMeasurements
from rightbatch.tuner.memory_search import MemorySearch, words
from rightbatch.tuner.request import Part, Progress, Request
from rightbatch.tuner.verifying import no_branches, plan_verification

T = TypeVar("T")

MALLOC_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "tight": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
}
"""Variables of glibc: ``tight`` maps every tensor of its own and gives it back at once, so that what is resident is what lives."""

SHARES: Mapping[Part, float] = {
    Part.MEMORY: 0.2,
    Part.STEP_TIME: 0.3,
    Part.LOADER: 0.1,
    Part.LR_RANGE: 0.3,
    Part.GRADIENT_NOISE: 0.4,
    Part.BRANCHES: 1.0,
}
"""How the budget is divided among the parts that are still to be measured: a check by training takes about half of it."""

_BUDGET_IN_USE = 0.95
"""The rest is for steps that overrun, and for judging."""
_LEAST_OF_SHARE = 0.5
"""Of the time that a part was meant to have, it gets so much however late it begins: no part starves because those before it overran."""
_LARGEST_ROUND_SHARE = 0.1
"""No size is timed whose step alone takes more of the part's time than this."""
_NEIGHBOURS_SHARE = 0.1
"""Of the part's time, for the sizes beside a power of two."""
_NEIGHBOUR_STEPS = 28
"""Steps that their fewest rounds take where one step fills a round: four sizes, warmed up."""
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
        if request.malloc != "default" and request.isolation != "child":
            raise UsageError(
                f"--malloc {request.malloc} needs a process of its own, since an allocator is set when a process starts; got --isolation "
                f"{request.isolation}; leave that out, or start this process with {_words_of(MALLOC_SETTINGS[request.malloc])}."
            )
        self._start_s = clock_s()
        self._stage = "starting"
        self._say("loading the workload")
        if Part.BRANCHES in request.parts:
            build = partial(_build_beside_scipy, build)
        self._host: Host = (
            ChildHost(build, self._say, environment=MALLOC_SETTINGS[request.malloc])
            if request.isolation == "child"
            else InProcessHost(build, self._say)
        )
        _load_scipy()
        self._all_shares = 0.0

    def close(self) -> None:
        """End the host."""
        self._host.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the budget began."""
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
                f"one sample must fit in memory to train at all; it does not ({words(described)}); use a smaller model or input."
            )
        if self._request.objective.goal is Goal.ENERGY and not self._required(_has_energy_meter):
            raise UsageError("--goal energy needs an energy meter, which NVIDIA devices have; this device has none: use --goal time.")
        return described.value, self._required(environment, self._request.isolation)

    def on_host(self, probe: Callable[[Rig], T]) -> T:
        """Run something small beside the workload."""
        return self._required(probe)

    def start_budget(self) -> None:
        """Count the budget from now: it is for the probes, and getting ready may take longer than a small one."""
        self._start_s = self._clock_s()

    def share_s(self, part: Part, waiting: frozenset[Part]) -> float:
        """Return the seconds that a part may take: its share of what is left, or half of what it was meant to have if that is more.

        So the parts together may take half as long again as the budget, beside what each needs for its fewest steps.

        Args:
            part: The part that begins.
            waiting: It, and the parts after it; those of the first call divide the budget.
        """
        shares = sum(SHARES[other] for other in waiting)
        self._all_shares = self._all_shares or shares
        usable_s = _BUDGET_IN_USE * self._request.budget_s
        left_s = usable_s - self.elapsed_s
        return max(left_s / shares, _LEAST_OF_SHARE * usable_s / self._all_shares) * SHARES[part]

    def memory(
        self, workload: WorkloadSummary, budget_s: float, *, ranks: Ranks | None = None, bucket_bytes: int = 0
    ) -> MemoryMeasurements:
        """Trace, touch, approach, and prove if that is asked: only the proof may need more than the limit by the calibrated trace.

        Args:
            workload: What is trained.
            budget_s: Seconds that this may take.
            ranks: The processes that search together; none for this one alone.
            bucket_bytes: Gradient buckets that each of several processes keeps.
        """
        self._stage = "memory"
        limit, allocator = self._required(memory.limit, self._request.limit_bytes)
        if limit.once_a_process:  # take the limit where the attempts start, too: in a process that has run nothing
            self._host.renew()
            limit, allocator = self._required(memory.limit, self._request.limit_bytes)
        search = MemorySearch(
            host=self._host,
            request=self._request,
            workload=workload,
            clock_s=self._clock_s,
            ranks=ranks or SingleRank(),
            bucket_bytes=bucket_bytes,
        )
        return search.run(limit, allocator, budget_s)

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
        seconds_a_sample = min(seconds / size for size, seconds in (*scan, *ran.items()) if seconds > 0)
        largest = ceiling if ran[ceiling] <= affordable_s else max(scan[-1][0], _power_of_two_below(affordable_s / seconds_a_sample))
        wanted = [size for size in (*_COMMON_SIZES, workload.lr_batch_size or _COMMON_SIZES[0]) if size <= largest]
        sizes = step_time_fit.candidate_sizes(scan, largest=min(largest, ceiling), must_include=wanted)
        measure = partial(
            step_time.measure,
            is_decided=step_time_fit.is_decided,
            budget_s=budget_s * 0.65,
            machine=machine,
            largest_affordable=None if largest >= ceiling else largest,
        )
        while len(sizes) > 1:
            outcome = self._host.call(measure, sizes)
            if isinstance(outcome, Completed):
                return self._with_neighbours(outcome.value, min(largest, ceiling), budget_s * _NEIGHBOURS_SHARE)
            self._say(f"memory ran out beside the batches of the other sizes: leaving out {sizes[-1]}")
            sizes = sizes[:-1]
        return self._required(measure, sizes)

    def _with_neighbours(self, timed: StepTimeMeasurements, largest: int, budget_s: float) -> StepTimeMeasurements:
        """Add the sizes beside a power of two near the knee, where they fit and their fewest rounds are cheap."""
        curve = step_time_fit.fit_step_time(timed)
        sizes = power_of_two.neighbours(curve.knee or 1, largest)
        slowest_s = max(
            (point.step_time_s.value or 0.0 for point in curve.points if point.micro_batch_size <= (curve.knee or 1)), default=0.0
        )
        if not sizes or slowest_s > budget_s / _NEIGHBOUR_STEPS:
            return timed
        outcome = self._host.call(step_time.measure_neighbours, sizes, budget_s=budget_s)
        return timed.model_copy(update={"neighbours": outcome.value}) if isinstance(outcome, Completed) else timed

    def loader(self, budget_s: float) -> LoaderMeasurements:
        """Time the data loader."""
        self._stage = "data loader"
        return self._required(partial(loader.measure, budget_s=budget_s))

    def gradient_noise(
        self, workload: WorkloadSummary, found: MemoryMeasurements, timed: StepTimeMeasurements | None, budget_s: float
    ) -> GradientNoiseMeasurements:
        """Measure the noise at a micro-batch size that the hardware runs well and the dataset holds many of.

        The pilot takes the rate that a range test found, where that stands in for a tuned one: a rate k times too small shows about k
        times the noise.

        Args:
            workload: What is trained; with the tested rate, where one was tested.
            found: Sizes that ran.
            timed: Step times; none where they were not measured.
            budget_s: Seconds that this may take.

        Source:
            McCandlish et al. 2018, arXiv:1812.06162, appendix C (temperature).
        """
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
                pilot_lr=workload.lr if workload.lr_is_tested else None,
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
            remark=words(outcome),
        )

    def branches(self, findings: Findings, budget_s: float) -> BranchMeasurements:
        """Train from one checkpoint at the recommended size, then at those whose result would tell most."""
        self._stage = "check by training"
        plan = plan_verification(findings, budget_s)
        if isinstance(plan, str):
            return no_branches(plan)
        outcome = self._host.call(
            partial(
                branch.measure,
                checkpoint=plan.checkpoint,
                design=plan,
                budget_s=budget_s,
                noise_micro_batch_size=plan.noise_micro_batch_size,
                is_decided=noise_fit.is_decided,
            )
        )
        if isinstance(outcome, Completed):
            return outcome.value
        return no_branches(f"The answer was not checked by training, because memory ran out ({words(outcome)}).")

    def lr_range(self, workload: WorkloadSummary, found: MemoryMeasurements, budget_s: float) -> LrRangeMeasurements:
        """Test learning rates at the size that the pilot run takes: where the workload's own was tuned, if that is known."""
        self._stage = "learning rate"
        ceiling = max(point.micro_batch_size for point in found.points if point.outcome is Outcome.RAN)
        batch_size = min(workload.lr_batch_size or _DEFAULT_PILOT_BATCH, ceiling, workload.train_size)
        outcome = self._host.call(
            partial(
                lr_range.measure,
                batch_size=batch_size,
                first_rates=lr_range_fit.first_rates,
                next_rate=lr_range_fit.next_rate,
                contenders=lr_range_fit.contenders,
                budget_s=budget_s,
            )
        )
        if isinstance(outcome, Completed):
            return outcome.value
        return LrRangeMeasurements(
            batch_size=batch_size,
            optimizer=workload.optimizer,
            pilot_samples=0,
            sweep=(),
            rounds=(),
            stopped_by="failure",
            remark=f"It ended with {words(outcome)}.",
        )

    def _required(self, probe: Callable[..., T], *args: object) -> T:
        """Run a probe that has no business failing for lack of memory."""
        outcome = self._host.call(probe, *args)
        if isinstance(outcome, Completed):
            return outcome.value
        raise IsolationError(f"the {self._stage} probe must run at a few samples; it ended with {words(outcome)}; is memory short?")

    def _say(self, detail: str) -> None:
        self._progress.update(self._stage, min(1.0, self.elapsed_s / self._request.budget_s), detail)


def _load_scipy() -> None:
    """Import what the fits need, before the budget's clock starts."""
    import scipy.optimize  # noqa: F401


def _build_beside_scipy(build: Callable[[], Rig]) -> Rig:
    """Build the rig where branches are judged too."""
    _load_scipy()
    return build()


def _words_of(settings: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _has_energy_meter(rig: Rig) -> bool:
    return rig.meters.energy is not None


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
