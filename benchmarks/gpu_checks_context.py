"""What every GPU check is given, and what it returns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from gpu_checks_devices import CountedHost, Counters, CudaCounters
from gpu_checks_nets import Made, networks
from rightbatch.engine.meters import meters_for
from rightbatch.engine.rig import Rig
from rightbatch.fits.intervals import median_estimate
from rightbatch.records.measurements import MemoryTrace
from rightbatch.records.plan import Findings
from rightbatch.tuner.find import find
from rightbatch.tuner.request import Request, SilentProgress
from rightbatch.units import GIB, MIB
from rightbatch.workload.ingredients import Workload

Value = float | int | str | None


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What one check found.

    Attributes:
        name: Of the check.
        value: The figure it is judged by; none when it did not run.
        unit: Of the value.
        goal: What the value must be, in words.
        holds: Whether it is; none where nothing was promised, or the check did not run.
        detail: Every figure behind the value, or why there is none.
        seconds: What the check took.
    """

    name: str
    value: Value
    unit: str
    goal: str
    holds: bool | None
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is: for a GPU, or small enough to rehearse on a CPU.

    Attributes:
        side: Side of the images.
        width: Channels of the first layer.
        batch_sizes: Sizes whose memory is compared; the last is judged.
        memory_nets: How many networks are compared.
        allowed_bytes: What the allocator may reserve where its retries are counted.
        limit_bytes: Limit of the finder.
        finder_nets: Networks whose ceiling is proven.
        largest_timed: Largest size of the step-time curve.
        powers: Powers of two that are compared with their neighbours.
        timed_size: Size at which one switch is turned on and off.
        rounds: Interleaved rounds of a comparison.
        noise_batches: Micro-batches whose gradients are compared.
        noise_size: Samples in each.
        find_width: Width of the ResNet-18 of the whole run.
        find_samples: Images of its data set when no file is given.
        find_budget_s: What the whole run may take.
        compile_cap_s: When compiling is given up.
    """

    side: int = 64
    width: int = 32
    batch_sizes: tuple[int, ...] = (7, 32, 100)
    memory_nets: int = 11
    allowed_bytes: int = GIB
    limit_bytes: int = 2 * GIB
    finder_nets: tuple[str, ...] = ("residual", "dense", "unet")
    largest_timed: int = 2048
    powers: tuple[int, ...] = (64, 256)
    timed_size: int = 256
    rounds: int = 20
    noise_batches: int = 16
    noise_size: int = 32
    find_width: int = 64
    find_samples: int = 50_000
    find_budget_s: float = 60.0
    compile_cap_s: float = 90.0


REHEARSAL = Scale(
    side=16,
    width=8,
    memory_nets=8,
    allowed_bytes=24 * MIB,
    limit_bytes=96 * MIB,
    finder_nets=("residual",),
    largest_timed=64,
    powers=(16,),
    timed_size=16,
    rounds=5,
    noise_batches=4,
    noise_size=8,
    find_width=4,
    find_samples=640,
    find_budget_s=8.0,
    compile_cap_s=20.0,
)


@dataclass(frozen=True, kw_only=True)
class NetMemory:
    """The trace of one network and what the counters said beside it.

    Attributes:
        name: Of the network.
        trace: Recorded at small sizes.
        allocated_bytes: Peak of two steps above what was in use before, by batch size.
        reserved_bytes: The same of what was reserved.
    """

    name: str
    trace: MemoryTrace
    allocated_bytes: dict[int, int]
    reserved_bytes: dict[int, int]


def _found(source: Made, request: Request) -> Findings:
    return find(source, request, SilentProgress()).findings


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything a check may use.

    Attributes:
        device: Where it runs.
        counters: What the device's allocator counts.
        scale: How large.
        data: CIFAR-10; none takes synthetic images.
        clock_s: Clock of the budget.
        end_s: When the check should be done, by that clock.
        find: The tuner.
        build_rig: Places a workload on the device; the default takes the device's own meters.
        measured: Memory of networks that an earlier check has measured already.
    """

    device: torch.device
    counters: Counters
    scale: Scale = field(default_factory=Scale)
    data: str | None = None
    clock_s: Callable[[], float] = time.monotonic
    end_s: float = float("inf")
    find: Callable[[Made, Request], Findings] = _found
    build_rig: Callable[[Workload, torch.device], Rig] | None = None
    measured: list[NetMemory] = field(default_factory=list)

    def left_s(self) -> float:
        """Seconds until the check should be done."""
        return self.end_s - self.clock_s()

    def until(self, end_s: float) -> "Context":
        """Return the context of a check that should be done then."""
        return replace(self, end_s=end_s)

    def rig(self, workload: Workload, device: torch.device | None = None) -> Rig:
        """Place a workload on the device, or on another."""
        place = device or self.device
        if self.build_rig is not None:
            return self.build_rig(workload, place)
        return place_rig(workload, place)

    def networks(self) -> dict[str, Callable[[], Workload]]:
        """Return the networks at this scale."""
        return networks(self.scale.side, self.scale.width)


def place_rig(workload: Workload, device: torch.device) -> Rig:
    """Place a workload on a device with the device's own meters."""
    return Rig(workload=workload, device=device, meters=meters_for(device))


def context_for(device: torch.device, *, data: str | None) -> Context:
    """Return the context of a device: at full scale on CUDA, a rehearsal elsewhere."""
    if device.type == "cuda":
        return Context(device=device, counters=CudaCounters(device), data=data)
    return Context(device=device, counters=CountedHost(), scale=REHEARSAL, data=data)


@dataclass(frozen=True)
class Ratio:
    """A median ratio with its 95 % interval over paired rounds."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n {self.n}"


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Median of above / below, round by round, with a bootstrap interval; rounds that only one of them has are left out."""
    ratios = [first / second for first, second in zip(above, below, strict=False)]
    estimate = median_estimate(ratios, np.random.default_rng(0))
    if estimate.value is None or estimate.low is None or estimate.high is None:
        raise ValueError(f"a ratio with an interval needs two rounds of each; got {len(above)} and {len(below)}.")
    return Ratio(estimate.value, estimate.low, estimate.high, estimate.n)
