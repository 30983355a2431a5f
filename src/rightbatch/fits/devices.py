"""Number of devices: how much sooner more of them reach the target, and where they stop paying.

Symbols: r number of devices, b global batch size, t(m) step time of a device at m = b / r samples, x(r) time of the exchange;
T(b, r) = (1 + B_crit / b) (t(b / r) + x(r)).
"""

from dataclasses import dataclass, replace

import numpy as np

from rightbatch.fits.intervals import FloatArray
from rightbatch.fits.tradeoff import Candidate, CostDraws, Evidence, accumulated_time_s
from rightbatch.records.devices import DeviceCurve, DevicePoint, Interconnect
from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import Constraints

PAYS_FROM_EFFICIENCY = 0.5
"""Below it, twice the devices bring less than the same devices would on two trainings."""
FEWEST_SHOWN = 8
"""Numbers of devices up to this are always shown where the dataset allows them."""
MOST_RANKS = 1024
_GRADIENT_BYTES = {"fp64": 8}
"""A parameter; autocast keeps the gradients of float32 parameters in float32."""


@dataclass(frozen=True)
class _Choice:
    """The best global batch of one number of devices: draws of its time to target, up to a constant."""

    candidate: Candidate
    time: FloatArray


def fit_devices(draws: CostDraws, *, workload: WorkloadSummary, constraints: Constraints) -> DeviceCurve | None:
    """Time and efficiency for 1, 2, 4, 8, ... devices, each at the global batch that is best for so many, draw by draw.

    The step of one device was timed; only the exchange of gradients is modelled. Every number of devices sees the same draws, so what is
    uncertain about all of them cancels. For t(m) = t0 + m / tau without an exchange, with x = B_crit / (t0 tau), the efficiency is

        ((1 + sqrt(x)) / (sqrt(r) + sqrt(x)))**2.

    Args:
        draws: What each candidate costs, and the step times behind it.
        workload: Its trainable parameters are what is exchanged.
        constraints: The cap on the global batch, the number of devices planned for, and the interconnect.

    Returns:
        None without a noise scale: nothing is known then about what larger batches are worth.

    Source:
        docs/theory/devices.md.
    """
    if draws.critical_batch_size is None:
        return None
    gradient_bytes = workload.trainable_parameter_count * _GRADIENT_BYTES.get(workload.precision, 4)
    cap = min(workload.train_size, constraints.max_global_batch_size or workload.train_size)
    single = _best(draws, 1, 0.0, cap)
    if single is None:
        return None
    points = [_point(single, single, 1, 0.0)]
    efficiencies = [np.ones_like(single.time)]
    for ranks in _numbers(constraints.world_size):
        exchange_s = exchange_time_s(gradient_bytes, ranks, constraints.interconnect)
        best = _best(draws, ranks, exchange_s, cap)
        if best is None:
            break
        points.append(_point(best, single, ranks, exchange_s))
        efficiencies.append(single.time / best.time / ranks)
        surely_below = float(np.percentile(efficiencies[-1], 95)) < PAYS_FROM_EFFICIENCY
        if surely_below and ranks >= max(FEWEST_SHOWN, constraints.world_size):
            break
    return DeviceCurve(
        points=_shown(points, constraints.world_size),
        pays_up_to=_pays_up_to([point.ranks for point in points], np.column_stack(efficiencies)),
        interconnect=constraints.interconnect,
        gradient_bytes=gradient_bytes,
    )


def exchange_time_s(gradient_bytes: int, ranks: int, interconnect: Interconnect | None) -> float:
    """Seconds of a ring all-reduce, not overlapped with computing; 0 without an interconnect or a partner.

        x(r) = 2 (r - 1) (latency + n / (r * bandwidth))

    Args:
        gradient_bytes: n, bytes that each device holds.
        ranks: r.
        interconnect: Bandwidth and latency of a device's link.

    Source:
        Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations, J. Parallel Distrib. Comput. 69.
    """
    if interconnect is None or ranks == 1:
        return 0.0
    return 2 * (ranks - 1) * (interconnect.latency_s + gradient_bytes / (ranks * interconnect.bytes_per_s))


def _numbers(planned: int) -> list[int]:
    """2, 4, 8, ... and the number that is planned for."""
    return sorted({*(2**power for power in range(1, MOST_RANKS.bit_length())), *({planned} - {1})})


def _best(draws: CostDraws, ranks: int, exchange_s: float, cap: int) -> _Choice | None:
    """The candidate with the least expected time on so many devices; none when the cap leaves none."""
    candidates, compute_s = _on_ranks(draws, ranks, cap)
    if not candidates:
        return None
    shared = replace(draws, candidates=candidates, compute_time_s=compute_s + exchange_s, world_size=ranks)
    time = shared.time()
    chosen = int(np.argmin((time / time.min(axis=1, keepdims=True)).mean(axis=0)))
    return _Choice(candidates[chosen], time[:, chosen])


def _on_ranks(draws: CostDraws, ranks: int, cap: int) -> tuple[tuple[Candidate, ...], FloatArray]:
    """What one device can do in a step, as global batches of so many devices within the cap, and its draws of seconds."""
    column = {int(size): i for i, size in enumerate(draws.measured_sizes)}
    splits = {(size, 1) for size in column} | {(c.micro_batch_size, c.accumulation_steps) for c in draws.candidates}
    kept = sorted((micro * steps * ranks, micro, steps) for micro, steps in splits if micro * steps * ranks <= cap)
    candidates = tuple(Candidate(size, micro, steps, _evidence(ranks, steps)) for size, micro, steps in kept)
    times_s = [accumulated_time_s(draws.measured_time_s[:, column[micro]], draws.optimizer_time_s, steps) for _, micro, steps in kept]
    return candidates, np.column_stack(times_s) if times_s else np.empty((0, 0))


def _evidence(ranks: int, accumulation_steps: int) -> Evidence:
    if ranks > 1:
        return "extrapolated"
    return "measured" if accumulation_steps == 1 else "composed"


def _shown(points: list[DevicePoint], planned: int) -> tuple[DevicePoint, ...]:
    """Points up to the first that stops paying, and up to ``FEWEST_SHOWN`` and the planned number in any case."""
    stops = next((point.ranks for point in points if (point.efficiency.value or 0.0) < PAYS_FROM_EFFICIENCY), MOST_RANKS)
    return tuple(point for point in points if point.ranks <= max(stops, FEWEST_SHOWN, planned))


def _point(best: _Choice, single: _Choice, ranks: int, exchange_s: float) -> DevicePoint:
    relative = best.time / single.time
    return DevicePoint(
        ranks=ranks,
        global_batch_size=best.candidate.global_batch_size,
        micro_batch_size=best.candidate.micro_batch_size,
        accumulation_steps=best.candidate.accumulation_steps,
        exchange_time_s=exchange_s,
        relative_time=_median(relative),
        efficiency=_median(1 / relative / ranks),
        evidence=best.candidate.evidence,
    )


def _median(values: FloatArray) -> Estimate:
    low, median, high = (float(value) for value in np.percentile(values, [5, 50, 95]))
    return Estimate(value=median, low=low, high=high, n=len(values))


def _pays_up_to(numbers: list[int], efficiencies: FloatArray) -> Estimate:
    """The last number before the efficiency first falls below half: by its median, and in 90 % of the draws.

    Args:
        numbers: Devices, ascending.
        efficiencies: Shape (draws, numbers).
    """
    sizes = np.array(numbers)
    pays = np.logical_and.accumulate(efficiencies >= PAYS_FROM_EFFICIENCY, axis=1).sum(axis=1) - 1
    by_median = np.logical_and.accumulate(np.median(efficiencies, axis=0) >= PAYS_FROM_EFFICIENCY).sum() - 1
    value = float(sizes[by_median])
    low, high = (float(sizes[int(place)]) for place in np.percentile(pays, [5, 95], method="nearest"))
    open_above = int(high) == numbers[-1]
    status = Status.AT_LEAST if by_median == len(sizes) - 1 else Status.OK
    return Estimate(value=value, low=min(low, value), high=None if open_above else max(high, value), n=len(efficiencies), status=status)
