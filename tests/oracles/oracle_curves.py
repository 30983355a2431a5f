"""Measurements and estimates with planted laws, for fits and decisions, and the naive optimum."""

import math

import numpy as np

from rightbatch.records.environment import Environment
from rightbatch.records.estimates import Estimate, LoaderCurve, MemoryCurve, NoiseScale, Status
from rightbatch.records.measurements import Contention, MemoryLimit, StepTimeMeasurements, StepTimePoint, WorkloadSummary

QUIET = Contention(load_average_1m=0.1, cpu_count=4, other_processes_cpu=0.0)
ENVIRONMENT = Environment(
    device="cpu",
    device_name="fake",
    device_total_bytes=2**34,
    cpu_count=4,
    threads=1,
    operating_system="fake",
    versions=(),
    precision="fp32",
    isolation="child",
    seed=0,
)


def law_s(size, fixed_s, rate, exponent=1.0):
    return (fixed_s**exponent + (size / rate) ** exponent) ** (1 / exponent)


def timed(times_s, *, rounds=7, jitter=0.0, seed=0, contention=QUIET, energy=None, optimizer_s=0.0):
    """Step-time measurements around planted medians: {size: seconds}."""
    rng = np.random.default_rng(seed)
    return StepTimeMeasurements(
        points=tuple(
            StepTimePoint(
                micro_batch_size=size,
                step_times_s=tuple(float(seconds * math.exp(jitter * rng.standard_normal())) for _ in range(rounds)),
                energy_per_step_j=() if energy is None else (energy[size],) * rounds,
            )
            for size, seconds in times_s.items()
        ),
        optimizer_times_s=(optimizer_s,) * rounds,
        contention=contention,
    )


def workload(**changes):
    summary = WorkloadSummary(
        name="planted",
        train_size=60_000,
        valid_size=None,
        parameter_count=1000,
        trainable_parameter_count=1000,
        batch_norm=False,
        loss_reduction="mean",
        optimizer="SGD",
        optimizer_given=True,
        momentum=0.9,
        lr=0.1,
        lr_batch_size=128,
        num_workers=None,
        precision="fp32",
        channels_last=False,
        compiled=False,
    )
    return summary.model_copy(update=changes)


def noise(value=300.0, *, factor=1.5, pilot_samples=5000, status=Status.OK):
    known = status is Status.OK
    return NoiseScale(
        value=value if known else None,
        low=None if status is Status.INDETERMINATE else value / factor,
        high=value * factor if known else None,
        n=4096,
        status=status,
        snapshots=(),
        pilot_samples=pilot_samples,
    )


def loader(rate):
    estimate = Estimate(value=rate, low=rate * 0.98, high=rate * 1.02, n=5)
    return LoaderCurve(points=({"num_workers": 2, "samples_per_s": estimate},), num_workers=2, samples_per_s=estimate)


def memory(ceiling, *, stopped_by="limit", status=Status.OK, source="dataset"):
    return MemoryCurve(
        status=status,
        ceiling=ceiling,
        ceiling_is_limit=stopped_by == "limit",
        predicted_ceiling=ceiling,
        stopped_by=stopped_by,
        largest_allowed=10**6,
        largest_allowed_source=source,
        limit=MemoryLimit(limit_bytes=2**30, source="--limit"),
        calibration_scale=1.0,
        calibration_offset_bytes=0.0,
        calibration_error=0.0,
        bytes_at_one=2**20,
        points=(),
        curve=tuple((2**k, min(2**k * 2**30 // (ceiling or 1), 2**40)) for k in range(14)),
        shares=(),
        peak_module="",
        peak_operation="",
        recorded_on="device",
        allocator="fake",
    )


def regret_by_loops(draws):
    """Expected regret of each candidate for time, one draw and one candidate at a time."""
    step_s, sizes = draws.step_time_s(), draws.sizes
    total = [0.0] * len(sizes)
    for i, critical in enumerate(draws.critical_batch_size):
        costs = [(1 + critical / size) * step_s[i, j] for j, size in enumerate(sizes)]
        for j, cost in enumerate(costs):
            total[j] += cost / min(costs) - 1
    return [value / len(step_s) for value in total]
