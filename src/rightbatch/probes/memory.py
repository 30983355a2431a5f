"""What a training step holds: its trace at small sizes, and its measured peak at a given size."""

from typing import Literal

from rightbatch.engine.memory_trace import AllocationLog, UnmatchedLogsError, match, record
from rightbatch.engine.rig import Rig, held_tensors
from rightbatch.engine.step import train_step
from rightbatch.records.measurements import MemoryLimit, MemoryPoint, MemoryTrace, Outcome
from rightbatch.workload.ingredients import tensors_of

_TRACED_SIZES = (2, 3, 5, 7)


def limit(rig: Rig, requested_bytes: int | None) -> tuple[MemoryLimit, str]:
    """Return how much memory training may use now, and how it will be measured."""
    rig.meters.memory.start()
    return rig.meters.memory.limit(requested_bytes), rig.meters.memory.description


def trace(rig: Rig) -> MemoryTrace:
    """Record two optimizer steps at sizes 2, 3, 5 and 7 on the target device, and join the recordings.

    Two steps, because the first has no optimizer state yet. A compiled model is traced as it runs without compilation.
    """
    rig.say("recording the allocations of a step")
    shares = _Shares()
    try:
        logs = [_record(rig, size, shares) for size in _TRACED_SIZES]
        moments, remark = match(logs), ""
    except UnmatchedLogsError as error:
        moments, remark = (), f"The trace was given up: {error}; the ceiling is searched for by measuring alone."
    return MemoryTrace(
        batch_sizes=_TRACED_SIZES,
        recorded_on="device" if moments else "none",
        event_count=shares.event_count,
        moments=moments,
        consistent=bool(moments),
        remark=remark,
        parameter_bytes=shares.parameter_bytes,
        gradient_bytes=shares.gradient_bytes,
        optimizer_state_bytes=shares.optimizer_state_bytes,
        buffer_bytes=shares.buffer_bytes,
        input_bytes_per_sample=shares.input_bytes_per_sample,
    )


def no_trace(remark: str) -> MemoryTrace:
    """Return the trace that says that there is none."""
    return MemoryTrace(batch_sizes=_TRACED_SIZES, recorded_on="none", event_count=0, moments=(), consistent=False, remark=remark)


class _Shares:
    """Bytes by kind, filled in while recording."""

    event_count = 0
    parameter_bytes = 0
    gradient_bytes = 0
    optimizer_state_bytes = 0
    buffer_bytes = 0
    input_bytes_per_sample = 0


def _record(rig: Rig, size: int, shares: _Shares) -> AllocationLog:
    trainee = rig.new_trainee(compiled=False)
    batch = rig.typical_batch(size)

    def two_steps() -> None:
        train_step(trainee, [batch])
        train_step(trainee, [batch])

    log = record(size, held_tensors(trainee, batch), two_steps)
    shares.event_count = len(log.allocations)
    shares.parameter_bytes = _total_bytes(list(trainee.model.parameters()))
    shares.gradient_bytes = _total_bytes([parameter.grad for parameter in trainee.parameters])
    shares.optimizer_state_bytes = _total_bytes(list(trainee.optimizer.state.values()))
    shares.buffer_bytes = _total_bytes(list(trainee.model.buffers()))
    shares.input_bytes_per_sample = _total_bytes(batch) // size
    return log


def _total_bytes(nested: object) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(nested))


def attempt(rig: Rig, size: int, purpose: Literal["touch", "approach", "proof"], *, traced_bytes: int, limit_bytes: int) -> MemoryPoint:
    """Take two optimizer steps at one size and measure their peak.

    Args:
        rig: The workload on its device.
        size: Micro-batch size, in samples.
        purpose: Why it is tried.
        traced_bytes: What the trace predicts, to be kept beside the measurement.
        limit_bytes: More than this is over the limit even if it ran.
    """
    rig.say(f"running two steps of {size} samples")
    rig.meters.memory.start()
    trainee = rig.new_trainee()
    batch = rig.typical_batch(size)
    train_step(trainee, [batch])
    start_s = rig.meters.clock.now_s()
    train_step(trainee, [batch])
    step_time_s = rig.meters.clock.now_s() - start_s
    used_bytes = rig.meters.memory.peak_bytes()
    return MemoryPoint(
        micro_batch_size=size,
        purpose=purpose,
        outcome=Outcome.RAN if used_bytes <= limit_bytes else Outcome.OVER_LIMIT,
        traced_bytes=traced_bytes,
        used_bytes=used_bytes,
        step_time_s=step_time_s,
    )
