"""What fits on GPUs that are not here: record the workload's step in a child process, and replay it for each of them."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rightbatch.engine.isolation import ChildHost, Completed, Host, Killed
from rightbatch.errors import NothingFitsError
from rightbatch.fits.caching_allocator import LARGEST_SIZE
from rightbatch.fits.forecast import forecast
from rightbatch.fits.gpus import Gpu
from rightbatch.records.estimates import MemoryForecast
from rightbatch.records.measurements import MemoryTrace
from rightbatch.tuner.request import Progress, Request
from rightbatch.workload.source import Source

if TYPE_CHECKING:
    from rightbatch.engine.rig import Rig


def forecast_memory(
    source: Source,
    request: Request,
    gpus: Sequence[Gpu],
    progress: Progress,
    *,
    build_rig: "Callable[[], Rig] | None" = None,
    clock_s: Callable[[], float] = time.monotonic,
) -> MemoryForecast:
    """Record the workload once, whatever the number of GPUs, and forecast its ceiling on each.

    Args:
        source: Where the workload comes from.
        request: Of this only the precision, the seed, the threads, the isolation and the largest micro-batch matter.
        gpus: Where the workload is to run.
        progress: Where to say what goes on.
        build_rig: Builds the rig that is recorded; the default loads the source on the CPU.
        clock_s: Clock of the time budget, in seconds; the budget is only shown, a forecast is too short to be cut.

    Raises:
        NothingFitsError: The recording itself, of a few samples, does not fit in the memory of this machine.
        RightbatchError: The workload cannot be loaded or run.
    """
    start_s = clock_s()

    def say(detail: str) -> None:
        progress.update("memory forecast", min(1.0, (clock_s() - start_s) / request.budget_s), detail)

    trace, train_size = _record(source, request, say, build_rig)
    say(f"replaying the allocator of {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}")
    return forecast(trace, gpus, largest=request.max_batch or LARGEST_SIZE, train_size=train_size)


def _record(source: Source, request: Request, say: Callable[[str], None], build_rig: "Callable[[], Rig] | None") -> tuple[MemoryTrace, int]:
    """Return the trace and how many samples the training set holds."""
    build = build_rig or partial(_loaded, source, request)
    say("loading the workload")
    host = ChildHost(build, say) if request.isolation == "child" else _in_process(build, say)
    try:
        outcome = host.call(_recorded)
    finally:
        host.close()
    if isinstance(outcome, Completed):
        return outcome.value
    why = f"killed by {outcome.signal_name}" if isinstance(outcome, Killed) else outcome.message
    raise NothingFitsError(
        f"a few samples must fit in this machine's memory to record their step; they do not ({why}); use a smaller model."
    )


def _in_process(build: "Callable[[], Rig]", say: Callable[[str], None]) -> Host:
    from rightbatch.engine.isolation import InProcessHost  # with torch, which this process does without otherwise

    return InProcessHost(build, say)


# These run where the workload is, in a child as a rule: only there is torch imported, and only once.


def _loaded(source: Source, request: Request) -> "Rig":
    from rightbatch.engine.rig import build_rig

    return build_rig(source.load, device="cpu", precision=request.precision, threads=request.threads, seed=request.seed)


def _recorded(rig: "Rig") -> tuple[MemoryTrace, int]:
    from rightbatch.probes.absent_device import record

    return record(rig), rig.train_size
