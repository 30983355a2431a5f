"""Number of devices, in words: what more of them bring, and where they stop paying."""

from rightbatch.records.devices import DeviceCurve, DevicePoint
from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.plan import Findings
from rightbatch.report.document import Section, Table
from rightbatch.report.phrases import estimate, number, percent, split
from rightbatch.units import format_bytes, format_duration_s


def devices(findings: Findings) -> Section | None:
    """Say how time and efficiency follow the number of devices, and what was assumed about the exchange of gradients."""
    curve = findings.recommendation.devices
    if curve is None or len(curve.points) < 2:
        return None
    header = ("devices", "batch", "each", "time", "efficiency", "evidence")
    table = Table(caption="Best batch for each number", header=header, rows=tuple(_row(point) for point in curve.points))
    return Section(key="devices", title="Number of devices", sentences=(_pays(curve), _spread(curve), *_assumption(curve)), tables=(table,))


def _pays(curve: DeviceCurve) -> str:
    limit = curve.pays_up_to
    last = number(limit.value or 1)
    if limit.status is Status.AT_LEAST:
        return f"Up to {last} devices, the most that the dataset, --max-global-batch or the table allows, efficiency stays at 50 % or more."
    beyond = next((point for point in curve.points if point.ranks > (limit.value or 1)), curve.points[-1])
    efficiency = percent(beyond.efficiency.value or 0.0)
    plural = "device" if last == "1" else "devices"
    return f"Beyond {last} {plural} more stop paying: with {beyond.ranks} the efficiency is {efficiency}, below 50 %."


def _spread(curve: DeviceCurve) -> str:
    low, high = curve.pays_up_to.low or 1, curve.pays_up_to.high
    reach = f"{number(low)} or more" if high is None else number(high) if low == high else f"{number(low)} to {number(high)}"
    return f"With everything that is uncertain, that number is {reach} (90 % interval)."


def _assumption(curve: DeviceCurve) -> tuple[str, ...]:
    """Name what is not measured: steps on more than one device."""
    link = curve.interconnect
    size = format_bytes(curve.gradient_bytes)
    if link is None:
        return (
            "Only one device was timed. The exchange of gradients is taken to cost nothing, so these are bounds from above: "
            f"state --link-speed to count it ({size} a step).",
        )
    latency = f" and {format_duration_s(link.latency_s)} a message" if link.latency_s else ""
    return (
        f"Only one device was timed. The exchange of {size} a step is computed for a ring at {format_bytes(link.bytes_per_s)}/s{latency}, "
        "not overlapped with computing.",
    )


def _row(point: DevicePoint) -> tuple[str, ...]:
    alone = point.ranks == 1
    return (
        str(point.ranks),
        str(point.global_batch_size),
        split(point.micro_batch_size, point.accumulation_steps),
        "1" if alone else estimate(point.relative_time),
        percent(1.0) if alone else _efficiency(point.efficiency),
        point.evidence,
    )


def _efficiency(value: Estimate) -> str:
    """Write an efficiency with its interval: ``86 % [78, 94]``."""
    return estimate(value, percent).replace(" %,", ",").replace(" %]", "]")
