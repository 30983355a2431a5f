"""What a training step holds: its trace at small sizes, and its measured peak at a given size."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rightbatch.engine.losses import loss_sum
from rightbatch.engine.memory_trace import AllocationLog, Mark, record, storages_of
from rightbatch.engine.meters import capped
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import Trainee, train_step
from rightbatch.engine.trace_sizes import learn
from rightbatch.records.measurements import (
    AllocationKind,
    AlternativeTrace,
    MemoryLimit,
    MemoryPoint,
    MemoryTrace,
    Outcome,
)
from rightbatch.workload.ingredients import Batch, Workload, tensors_of

Change = Literal["bf16", "checkpointing", "sgd", "sgd with momentum", "adam"]


def limit(rig: Rig, requested_bytes: int | None) -> tuple[MemoryLimit, str]:
    """Return how much memory training may use now, and how it will be measured."""
    rig.meters.memory.start()
    return rig.meters.memory.limit(requested_bytes), rig.meters.memory.description


def trace(rig: Rig, *, accumulation_steps: int = 1, limit_bytes: int | None = None) -> MemoryTrace:
    """Record two optimizer steps at a few sizes on the rig's device, and join the recordings.

    Two steps, because the first has no optimizer state yet. A compiled model is traced as it runs without compilation.

    Args:
        rig: The workload on its device.
        accumulation_steps: Micro-batches a step; more than two need no more memory than two.
        limit_bytes: What the device may hold; the recordings stay far below.
    """
    rig.say("recording the allocations of a step")
    return _trace(rig, limit_bytes, lambda trainee, batch, mark: _two_steps(trainee, [batch] * accumulation_steps, mark))


def record_step(rig: Rig, size: int, *, accumulation_steps: int = 1) -> AllocationLog:
    """Log the allocations of two optimizer steps at one size."""
    return _record(rig, size, _Shares(), lambda trainee, batch, mark: _two_steps(trainee, [batch] * accumulation_steps, mark))


def _two_steps(trainee: Trainee, micro_batches: Sequence[Batch], mark: Mark) -> None:
    for _ in range(2):
        train_step(trainee, micro_batches)
        mark(AllocationKind.GRADIENT, [p.grad for p in trainee.model.parameters() if p.grad is not None])
        mark(AllocationKind.OPTIMIZER_STATE, tensors_of(list(trainee.optimizer.state.values())))


def evaluation_trace(rig: Rig, *, limit_bytes: int | None = None) -> MemoryTrace:
    """Record a forward pass in evaluation mode without gradients, with the loss, as a validation loop runs it; see ``trace``."""
    rig.say("recording the allocations of an evaluation")

    def forward(trainee: Trainee, batch: Batch, _mark: Mark) -> None:
        trainee.model.eval()
        with torch.no_grad():
            loss_sum(trainee.objective, trainee.model, batch)

    return _trace(rig, limit_bytes, forward)


def alternatives(rig: Rig, *, limit_bytes: int | None = None) -> tuple[AlternativeTrace, ...]:
    """Trace the workload again with one thing changed at a time; a change that does not run, or changes nothing, is left out."""
    current = rig.new_trainee(compiled=False).optimizer
    has_momentum = bool(current.defaults.get("momentum"))
    changes: dict[Change, Workload] = {}
    if rig.workload.precision == "fp32":
        changes["bf16"] = replace(rig.workload, precision="bf16")
    changes["checkpointing"] = replace(rig.workload, model=lambda: _checkpointed(rig.new_model()))
    if type(current) is not torch.optim.SGD or has_momentum:
        changes["sgd"] = replace(rig.workload, optimizer=lambda params: torch.optim.SGD(params, lr=1e-3))
    if type(current) is not torch.optim.SGD or not has_momentum:
        changes["sgd with momentum"] = replace(rig.workload, optimizer=lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9))
    if not isinstance(current, torch.optim.Adam | torch.optim.AdamW):
        changes["adam"] = replace(rig.workload, optimizer=torch.optim.Adam)
    traced = []
    for change, workload in changes.items():
        rig.say(f"recording the allocations of a step with {change}")
        with contextlib.suppress(Exception):  # the user never asked for this change: that it fails is no news
            found = trace(replace(rig, workload=workload, _loss_is_sum=rig.loss_is_sum), limit_bytes=limit_bytes)
            if found.moments:
                traced.append(AlternativeTrace(change=change, trace=found))
    return tuple(traced)


def _checkpointed(model: nn.Module) -> nn.Module:
    """Let every block recompute its activations in the backward pass.

    Blocks are the composite children of containers, else of the model; a single chain of layers is cut into about as many segments as each
    has layers.
    """
    chains = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    containers = [*chains, *(module for module in model.modules() if isinstance(module, nn.ModuleList)), model]
    blocks = {child for container in containers for child in container.children() if _is_block(child)}
    outermost = [block for block in blocks if not any(block is not other and block in set(other.modules()) for other in blocks)]
    for block in outermost:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if not outermost and chains:
        chain = max(chains, key=len)
        chain.forward = functools.partial(_run_in_segments, tuple(chain))  # type: ignore[method-assign]
    return model


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not isinstance(module, nn.ModuleList)


def _run_in_segments(layers: tuple[nn.Module, ...], hidden: Tensor) -> Tensor:
    length = max(1, round(len(layers) ** 0.5))
    for start in range(0, len(layers), length):
        segment = functools.partial(_run_layers, layers[start : start + length])
        hidden = segment(hidden) if start + length >= len(layers) else checkpoint(segment, hidden, use_reentrant=False)
    return hidden


def _run_layers(layers: tuple[nn.Module, ...], hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden)
    return hidden


def _trace(rig: Rig, limit_bytes: int | None, run: Callable[[Trainee, Batch, Mark], None]) -> MemoryTrace:
    shares = _Shares()
    others: list[Rig] = []
    used_bytes: dict[int, int] = {}

    def record_at(size: int, draw: int) -> AllocationLog:
        if draw and not others:
            others.append(rig.redrawn())
        chosen = others[0] if draw else rig
        chosen.typical_batch(1)  # the samples that batches are made of stay, and count for no recording
        rig.meters.memory.start()
        log = _record(chosen, size, shares, run)
        used_bytes[size] = rig.meters.memory.peak_bytes()
        return log

    learned = learn(record_at, limit_bytes=limit_bytes)
    return MemoryTrace(
        batch_sizes=learned.sizes,
        used_bytes=() if rig.device.type == "meta" else tuple(used_bytes[size] for size in learned.sizes),
        warm_up_size=next(iter(used_bytes), None),
        recorded_on=_recorded_on(rig) if learned.moments else "none",
        event_count=shares.event_count,
        moments=learned.moments,
        consistent=learned.is_exact,
        remark=learned.remark,
        allocations=learned.table,
        parameter_bytes=shares.parameter_bytes,
        gradient_bytes=shares.gradient_bytes,
        optimizer_state_bytes=shares.optimizer_state_bytes,
        buffer_bytes=shares.buffer_bytes,
        input_bytes_per_sample=shares.input_bytes_per_sample,
    )


def _recorded_on(rig: Rig) -> Literal["device", "meta"]:
    return "meta" if rig.device.type == "meta" else "device"


def no_trace(remark: str) -> MemoryTrace:
    """Return the trace that says that there is none."""
    return MemoryTrace(batch_sizes=(), recorded_on="none", event_count=0, moments=(), consistent=False, remark=remark)


class _Shares:
    """Bytes by kind, filled in by the first recording."""

    event_count = 0
    parameter_bytes = 0
    gradient_bytes = 0
    optimizer_state_bytes = 0
    buffer_bytes = 0
    input_bytes_per_sample = 0


def _record(rig: Rig, size: int, shares: _Shares, run: Callable[[Trainee, Batch, Mark], None]) -> AllocationLog:
    trainee = rig.new_trainee(compiled=False)
    batch = rig.typical_batch(size)
    held: dict[AllocationKind, Sequence[Tensor]] = {
        AllocationKind.PARAMETER: list(trainee.model.parameters()),
        AllocationKind.BUFFER: list(trainee.model.buffers()),
        AllocationKind.INPUT: tensors_of(batch),
    }
    if trainee.average is not None:
        held[AllocationKind.AVERAGE] = [*trainee.average.parameters(), *trainee.average.buffers()]
    log = record(size, trainee.model, held, lambda mark: run(trainee, batch, mark))
    if shares.event_count:
        return log
    shares.event_count = len(log.allocations)
    shares.parameter_bytes = _total_bytes(held[AllocationKind.PARAMETER])
    shares.gradient_bytes = _total_bytes([parameter.grad for parameter in trainee.parameters])
    shares.optimizer_state_bytes = _total_bytes(list(trainee.optimizer.state.values()))
    shares.buffer_bytes = _total_bytes(held[AllocationKind.BUFFER])
    shares.input_bytes_per_sample = _total_bytes(batch) // size
    return log


def _total_bytes(nested: object) -> int:
    return sum(tensor.nbytes if tensor.layout is torch.strided else _stored_bytes(tensor) for tensor in tensors_of(nested))


def _stored_bytes(tensor: Tensor) -> int:
    return sum(storage.nbytes() for storage in storages_of(tensor))


def attempt(
    rig: Rig, size: int, purpose: Literal["touch", "approach", "proof"], *, traced_bytes: int, limit_bytes: int, ballast_bytes: int = 0
) -> MemoryPoint:
    """Take two optimizer steps at one size and measure their peak.

    Args:
        rig: The workload on its device.
        size: Micro-batch size, in samples.
        purpose: Why it is tried.
        traced_bytes: What the trace predicts, to be kept beside the measurement.
        limit_bytes: More than this is over the limit even if it ran.
        ballast_bytes: Held on the device beside the step, as the gradient buckets of data-parallel training are.
    """
    rig.say(f"running two steps of {size} samples")
    rig.meters.memory.start()
    with capped(rig.device, limit_bytes) if purpose == "proof" else contextlib.nullcontext(lambda: False) as has_retried:
        ballast = torch.zeros(ballast_bytes, dtype=torch.uint8, device=rig.device)
        trainee = rig.new_trainee()
        batch = rig.typical_batch(size)
        train_step(trainee, [batch])
        start_s = rig.meters.clock.now_s()
        train_step(trainee, [batch])
        step_time_s = rig.meters.clock.now_s() - start_s
        used_bytes = rig.meters.memory.peak_bytes()
        is_squeezed = has_retried()
        del ballast
    return MemoryPoint(
        micro_batch_size=size,
        purpose=purpose,
        outcome=Outcome.OVER_LIMIT if is_squeezed or used_bytes > limit_bytes else Outcome.RAN,
        traced_bytes=traced_bytes,
        used_bytes=used_bytes,
        step_time_s=step_time_s,
        detail="it ran only because the allocator freed its cache and tried again" if is_squeezed else "",
    )
