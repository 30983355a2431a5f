"""What a training step would hold on a CUDA device that is not here: recorded without memory where that is exact, else on the CPU."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rightbatch.engine.rig import Rig
from rightbatch.probes.memory import record_step, trace
from rightbatch.records.measurements import MemoryTrace

_COMPARED_SIZE = 2
_FUSED_ON_CUDA = (nn.RNNBase, nn.MultiheadAttention)
"""Modules whose CUDA kernels keep other workspaces than the CPU's."""


def record(rig: Rig) -> MemoryTrace:
    """Record two optimizer steps as a CUDA device would take them.

    Optimizers update all parameters at once (``foreach``) and dropout keeps a boolean mask, as they do there by default. One step is
    recorded on real CPU tensors and on meta tensors, which hold no memory: where both log the same allocations the rest is recorded on
    meta, else on the CPU.

    Args:
        rig: The workload on the CPU.

    Returns:
        The trace; its remark says what the recording cannot know.
    """
    rig.say("recording the allocations of a step as on a CUDA device")
    with _FusedDropout():
        real = replace(rig, workload=replace(rig.workload, optimizer=_foreach(rig)), _loss_is_sum=rig.loss_is_sum)
        meta = replace(real, device=torch.device("meta"))
        reason = _difference(real, meta)
        recorded = trace(real if reason else meta)
    remarks = [recorded.remark] if recorded.remark else []
    if reason:
        remarks.append(f"Recorded on CPU tensors, because a recording without memory differs: {reason}.")
    fused = sorted(
        {type(module).__name__ for module in real.new_trainee(compiled=False).model.modules() if isinstance(module, _FUSED_ON_CUDA)}
    )
    if fused:
        remarks.append(f"CUDA runs {' and '.join(fused)} in kernels of its own, whose workspaces are not known here.")
    place = recorded.recorded_on if recorded.recorded_on == "none" else "cpu" if reason else "meta"
    return recorded.model_copy(update={"recorded_on": place, "remark": " ".join(remarks)})


def _difference(real: Rig, meta: Rig) -> str:
    """Say how the meta recording differs from the real one at two samples; nothing when it does not."""
    try:
        imagined = record_step(meta, _COMPARED_SIZE)
    except Exception as error:  # noqa: BLE001  # a user's code may do anything that meta tensors cannot: .item(), data-dependent shapes
        return f"{type(error).__name__} on meta tensors"
    actual = record_step(real, _COMPARED_SIZE)
    if len(actual.allocations) != len(imagined.allocations):
        return f"{len(imagined.allocations)} allocations instead of {len(actual.allocations)}"
    for one, other in zip(actual.allocations, imagined.allocations, strict=True):
        if (one.operation, one.size_bytes, one.death) != (other.operation, other.size_bytes, other.death):
            return f"{other.operation} stands for {one.operation}" if one.operation != other.operation else f"{one.operation} differs"
    return ""


def _foreach(rig: Rig):  # type: ignore[no-untyped-def]  # the workload's own type of optimizer factory
    """Return the workload's optimizer factory with the update over all parameters at once where the user left it open."""

    def build(parameters):  # type: ignore[no-untyped-def]
        make = rig.workload.optimizer
        optimizer = torch.optim.Adam(parameters) if make is None else make(parameters)
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
        return optimizer

    return build


class _FusedDropout(TorchFunctionMode):
    """Runs dropout as CUDA does: one kernel that keeps a boolean mask."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is nn.functional.dropout:
            return _dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002, FBT001, FBT002  # torch's names
    if not training or p == 0.0:
        return input
    dropped: Tensor = torch.native_dropout(input, p, True)[0]  # noqa: FBT003
    return input.copy_(dropped) if inplace and not input.requires_grad else dropped
