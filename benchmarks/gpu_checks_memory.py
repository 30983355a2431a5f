"""GPU checks of memory: what the trace, its calibration and the replay of the allocator say, beside what the device counts."""

import statistics
from functools import partial

import torch

from gpu_checks_context import CheckResult, Context, NetMemory, place_rig
from gpu_checks_nets import Images
from rightbatch.engine.isolation import ChildHost, Completed, OutOfMemory
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import train_step
from rightbatch.fits.caching_allocator import Recording, smooth_ceiling
from rightbatch.fits.forecast import LARGEST_WORKSPACE, LIKELY_WORKSPACE, with_workspaces
from rightbatch.fits.gpus import LARGEST_CONTEXT_BYTES, LEAST_CONTEXT_BYTES
from rightbatch.fits.memory import calibrate, traced_peak_bytes
from rightbatch.probes import memory
from rightbatch.records.measurements import MemoryPoint, Outcome
from rightbatch.units import MIB, format_bytes
from rightbatch.workload.ingredients import Workload

SEGMENT_BYTES = 20 * MIB
"""What the allocator reserves at once for allocations below 10 MiB: errors below that tell where segments end, and nothing of a law."""
_ROUNDING_ERROR = 0.01
"""The allocator counts in blocks of 512 bytes, the trace in bytes."""
_CALIBRATED_ERROR = 0.05
_RESERVED_ERROR = 0.25
"""The largest margin that the search keeps. Segments make what is reserved no straight line: replays alone, without any device, miss by up
to 12 % at the full scale."""
_SCRATCH = range(LARGEST_WORKSPACE + 1)
"""Scratch of a convolution over its result, as forecasts for absent GPUs take it: the range that these checks hold them to."""
_WARM_UP_SIZE = 8
_THRASHING = 1.25
"""Times the greatest smooth ceiling at which the allocator must have had to retry."""
_TOO_MUCH_BYTES = 2**50


def peaks(context: Context, rig: Rig, size: int) -> tuple[int, int]:
    """Take two steps of one size; return the peaks of bytes in use and reserved, above what was there before the model was built."""
    counters = context.counters
    counters.empty_cache()
    counters.reset_peak()
    allocated, reserved = counters.max_memory_allocated(), counters.max_memory_reserved()
    try:
        _two_steps(rig, size)
        counters.synchronize()
        return counters.max_memory_allocated() - allocated, counters.max_memory_reserved() - reserved
    finally:
        counters.empty_cache()


def _two_steps(rig: Rig, size: int) -> None:
    trainee = rig.new_trainee(compiled=False)
    batch = rig.typical_batch(size)
    for _ in range(2):
        train_step(trainee, [batch])


def _measured(context: Context) -> list[NetMemory]:
    """Measure the networks once for all checks that need them; the time of whichever check comes first."""
    if context.measured:
        return context.measured
    _two_steps(context.rig(context.networks()["vgg"]()), _WARM_UP_SIZE)  # cuBLAS keeps what its first calls take
    for name, make in list(context.networks().items())[: context.scale.memory_nets]:
        if context.measured and context.left_s() < 0:
            break
        rig = context.rig(make())
        trace = memory.trace(rig)
        if not trace.moments:
            raise RuntimeError(f"{name} left no trace: {trace.remark}")
        counted = {size: peaks(context, rig, size) for size in context.scale.batch_sizes}
        context.measured.append(
            NetMemory(
                name=name,
                trace=trace,
                allocated_bytes={size: allocated for size, (allocated, _) in counted.items()},
                reserved_bytes={size: reserved for size, (_, reserved) in counted.items()},
            )
        )
    return context.measured


def _coverage(context: Context, nets: list[NetMemory]) -> str:
    return f"{len(nets)} of {context.scale.memory_nets} networks, b = {', '.join(map(str, context.scale.batch_sizes))}"


def trace_against_counters(context: Context) -> CheckResult:
    """Compare live bytes that the trace predicts with ``max_memory_allocated``; what is above is workspace of cuDNN."""
    nets = _measured(context)
    errors: dict[str, dict[int, float]] = {}
    outside: list[str] = []
    above = 0
    for net in nets:
        least, *_, most = _recordings(net)
        errors[net.name] = {size: counted / least.live_bytes(size) - 1 for size, counted in net.allocated_bytes.items()}
        above = max(above, *(counted - least.live_bytes(size) for size, counted in net.allocated_bytes.items()))
        if not all(
            least.live_bytes(size) * (1 - _ROUNDING_ERROR) <= counted <= most.live_bytes(size) * (1 + _ROUNDING_ERROR)
            for size, counted in net.allocated_bytes.items()
        ):
            outside.append(net.name)
    worst = max((abs(error), name) for name, by_size in errors.items() for error in by_size.values())[1]
    words = "; ".join(f"{name} " + " ".join(f"{error:+.2%}" for error in by_size.values()) for name, by_size in errors.items())
    return CheckResult(
        name="trace",
        value=round(max(errors[worst].values(), key=abs), 5),
        unit="measured / predicted without scratch - 1",
        goal=f"on every network and size between scratch of none and {LARGEST_WORKSPACE} times a convolution's result, "
        f"within {_ROUNDING_ERROR:.0%}",
        holds=not outside and len(nets) == context.scale.memory_nets,
        detail=f"{_coverage(context, nets)}: {words}; worst {worst}; at most {format_bytes(above)} above the trace; "
        f"outside the range: {', '.join(outside) or 'none'}",
    )


def calibration(context: Context) -> CheckResult:
    """Calibrate the trace on all sizes but the last, as the probe does, and predict the last: bytes in use, and reserved."""
    nets = _measured(context)
    *touched, largest = context.scale.batch_sizes
    is_counted = context.device.type == "cuda"
    words, in_use, is_near = [], [], True
    for net in nets:
        used = _calibrated(net, net.allocated_bytes, touched, largest) / net.allocated_bytes[largest] - 1
        held = _calibrated(net, net.reserved_bytes, touched, largest) - net.reserved_bytes[largest]
        in_use.append(abs(used))
        is_near &= not is_counted or abs(held) <= max(_RESERVED_ERROR * net.reserved_bytes[largest], 2 * SEGMENT_BYTES)
        words.append(f"{net.name} {used:+.2%}, reserved {held / net.reserved_bytes[largest]:+.1%}")
    reserved = f"<= {_RESERVED_ERROR:.0%} or {format_bytes(2 * SEGMENT_BYTES)}" if is_counted else "not checked on a CPU"
    return CheckResult(
        name="calibration",
        value=round(max(in_use), 5),
        unit="relative error of bytes in use",
        goal=f"<= {_CALIBRATED_ERROR:.0%} on every network; of bytes reserved {reserved}",
        holds=max(in_use) <= _CALIBRATED_ERROR and is_near and len(nets) == context.scale.memory_nets,
        detail=f"from b = {', '.join(map(str, touched))} to {largest}: {'; '.join(words)}",
    )


def _calibrated(net: NetMemory, counted: dict[int, int], touched: list[int], largest: int) -> int:
    points = [
        MemoryPoint(
            micro_batch_size=size,
            purpose="touch",
            outcome=Outcome.RAN,
            traced_bytes=traced_peak_bytes(net.trace, size),
            used_bytes=counted[size],
        )
        for size in touched
    ]
    return calibrate(net.trace, points).used_bytes(traced_peak_bytes(net.trace, largest))


def replayed_allocator(context: Context) -> CheckResult:
    """Replay the caching allocator on the trace, and compare what it reserves with ``max_memory_reserved``."""
    nets, largest = _measured(context), context.scale.batch_sizes[-1]
    errors: list[float] = []
    words, outside = [], []
    for net in nets:
        replayed = {size: [recording.at(size).peak_reserved_bytes for recording in _recordings(net)] for size in net.reserved_bytes}
        counted = net.reserved_bytes[largest]
        errors.append(replayed[largest][LIKELY_WORKSPACE] / counted - 1)
        if not min(replayed[largest]) - SEGMENT_BYTES <= counted <= max(replayed[largest]) + SEGMENT_BYTES:
            outside.append(net.name)
        off = [[round((value - net.reserved_bytes[size]) / MIB) for value in values] for size, values in replayed.items()]
        words.append(f"{net.name} " + " ".join("/".join(f"{value:+d}" for value in values) for values in off))
    return CheckResult(
        name="allocator replay",
        value=round(max(errors, key=abs), 5),
        unit=f"predicted with scratch of {LIKELY_WORKSPACE} times a convolution's result / measured - 1",
        goal=f"on every network at b = {largest} between replays with scratch of none and {LARGEST_WORKSPACE} times a convolution's "
        f"result, within {format_bytes(SEGMENT_BYTES)}",
        holds=not outside and len(nets) == context.scale.memory_nets,
        detail=f"{_coverage(context, nets)}; median {statistics.median(map(abs, errors)):.2%}; predicted - measured by size and scratch, "
        f"MiB: {'; '.join(words)}; outside the range: {', '.join(outside) or 'none'}",
    )


def _recordings(net: NetMemory) -> list[Recording]:
    """The step with more and more scratch."""
    if net.trace.allocations is None:
        raise RuntimeError(f"the trace of {net.name} keeps no allocations: {net.trace.remark}")
    return [Recording(with_workspaces(net.trace.allocations, factor)) for factor in _SCRATCH]


def allocator_retries(context: Context) -> CheckResult:
    """Bound what the allocator may reserve; count its retries at the least smooth ceiling, and at a quarter more than the greatest."""
    name = "residual"
    rig = context.rig(context.networks()[name]())
    trace = memory.trace(rig)
    if trace.allocations is None:
        raise RuntimeError(f"{name} left no trace: {trace.remark}")
    _two_steps(rig, _WARM_UP_SIZE)
    counters = context.counters
    counters.empty_cache()
    counters.reset_peak()
    held = counters.max_memory_reserved()
    ceilings = [smooth_ceiling(with_workspaces(trace.allocations, factor), context.scale.allowed_bytes) for factor in _SCRATCH]
    if None in ceilings:
        raise RuntimeError(f"no sample of {name} fits in {format_bytes(context.scale.allowed_bytes)}")
    ceiling, above = min(ceilings), int(_THRASHING * max(ceilings)) + 1
    counters.allow(context.scale.allowed_bytes + held)
    try:
        smooth, thrashing = _retries(context, rig, ceiling), _retries(context, rig, above)
    finally:
        counters.allow(None)
        counters.empty_cache()
    return CheckResult(
        name="allocator retries",
        value=smooth,
        unit="retries",
        goal=f"0 at the least smooth ceiling that is forecast, some or out of memory at {_THRASHING} times the greatest",
        holds=smooth == 0 and thrashing != 0,
        detail=f"{name} in {format_bytes(context.scale.allowed_bytes)}: b = {ceiling}: {_words(smooth)}; b = {above}: {_words(thrashing)}",
    )


def _retries(context: Context, rig: Rig, size: int) -> int:
    """Return the retries of two steps; -1 when memory ran out."""
    before = context.counters.retries()
    try:
        peaks(context, rig, size)
    except torch.OutOfMemoryError:
        return -1
    return context.counters.retries() - before


def _words(retries: int) -> str:
    return "out of memory" if retries < 0 else f"{retries} retries"


def context_bytes(context: Context) -> CheckResult:
    """What the process holds outside the allocator, and what stays in it with nothing alive: forecasts for absent GPUs assume both."""
    _two_steps(context.rig(context.networks()["vgg"]()), _WARM_UP_SIZE)
    context.counters.empty_cache()
    free, total = torch.cuda.mem_get_info(context.device)
    outside = total - free - torch.cuda.memory_reserved(context.device)
    context.counters.reset_peak()
    kept = context.counters.max_memory_allocated()
    return CheckResult(
        name="context",
        value=outside,
        unit="bytes",
        goal=f"{format_bytes(LEAST_CONTEXT_BYTES)} to {format_bytes(LARGEST_CONTEXT_BYTES)}",
        holds=LEAST_CONTEXT_BYTES <= outside <= LARGEST_CONTEXT_BYTES,
        detail=f"total {format_bytes(total)}; outside the allocator, other processes' use included, {format_bytes(outside)}; "
        f"kept in it with nothing alive (cuBLAS workspaces) {format_bytes(kept)}",
    )


def out_of_memory(context: Context) -> CheckResult:
    """Run out of memory in a child: it must be a value, the child must go on, and this process must still get memory."""
    device = context.device
    workload = Workload(model=torch.nn.Flatten, train=Images(8, 64), loss=torch.nn.functional.cross_entropy)
    host = ChildHost(partial(place_rig, workload, device), lambda _: None)
    try:
        refused = host.call(_too_much)
        again = host.call(_a_little)
    finally:
        host.close()
    here = float(torch.ones(MIB, device=device).sum())
    is_value, goes_on = isinstance(refused, OutOfMemory), isinstance(again, Completed) and again.value == MIB
    return CheckResult(
        name="out of memory",
        value=type(refused).__name__,
        unit="",
        goal="OutOfMemory; the child computes on, and so does this process",
        holds=is_value and goes_on and here == MIB,
        detail=f"{refused.message if isinstance(refused, OutOfMemory) else refused}; child after it {again}; here {here:.0f} of {MIB}",
    )


def _too_much(rig: Rig) -> int:
    return torch.empty(_TOO_MUCH_BYTES, dtype=torch.uint8, device=rig.device).numel()


def _a_little(rig: Rig) -> float:
    return float(torch.ones(MIB, device=rig.device).sum())
