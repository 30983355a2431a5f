"""What a training step would hold on a CUDA device that is not here: recorded without memory where that is exact, else on the CPU."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rightbatch.engine.rig import Rig
from rightbatch.probes.memory import record_step, trace
from rightbatch.records.measurements import MemoryTrace

_COMPARED_SIZE = 2
_OWN_KERNELS = {"scaled_dot_product": "attention", "RNN": "recurrent layers", "LSTM": "recurrent layers", "GRU": "recurrent layers"}
"""By a part of the name of an operation or of a module's class: what CUDA runs in kernels with other workspaces than the CPU's."""


def record(rig: Rig) -> MemoryTrace:
    """Record two optimizer steps as a CUDA device would take them.

    Optimizers update all parameters at once (``foreach``), dropout keeps a boolean mask and oneDNN takes no part, as is the default there.

    Args:
        rig: The workload on the CPU.

    Returns:
        The trace; its remark says what the recording cannot know.
    """
    rig.say("recording the allocations of a step as on a CUDA device")
    on_cuda = replace(rig, workload=replace(rig.workload, optimizer=_foreach(rig)), _loss_is_sum=rig.loss_is_sum)
    with _FusedDropout(), _without_onednn():
        recorded = record_without_memory(on_cuda)
    remarks = [recorded.remark, *_differences_on_cuda(on_cuda, recorded)]
    return recorded.model_copy(update={"remark": " ".join(filter(None, remarks))})


def record_without_memory(rig: Rig) -> MemoryTrace:
    """Record two optimizer steps on meta tensors, which hold no memory, where these tell the truth, else on the rig's real CPU tensors.

    One size is recorded on both. Where they do not log the same allocations, meta tensors run other kernels or none at all, and the
    remark says so.

    Args:
        rig: The workload on the CPU.
    """
    empty = replace(rig.workload, model=lambda: _without_data(rig.new_model()))
    meta = replace(rig, workload=empty, device=torch.device("meta"), _loss_is_sum=rig.loss_is_sum)
    reason = _difference(rig, meta)
    recorded = trace(rig if reason else meta)
    remark = f"Recorded on CPU tensors, because a recording without memory differs: {reason}." if reason else ""
    place = recorded.recorded_on if recorded.recorded_on == "none" else "cpu" if reason else "meta"
    return recorded.model_copy(update={"recorded_on": place, "used_bytes": (), "remark": f"{recorded.remark} {remark}".strip()})


def _without_data(model: nn.Module) -> nn.Module:
    """Copy a model onto meta tensors: a function that always gives the same model would get one back that has lost its weights."""
    tensors: dict[int, Tensor] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    tensors |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return copy.deepcopy(model, tensors)


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


def _differences_on_cuda(rig: Rig, recorded: MemoryTrace) -> list[str]:
    names = [type(module).__name__ for module in rig.new_trainee(compiled=False).model.modules()]
    names += recorded.allocations.operations if recorded.allocations is not None else ()
    own = sorted({kind for part, kind in _OWN_KERNELS.items() for name in names if part in name})
    remarks = [f"CUDA runs {' and '.join(own)} in kernels of its own, whose workspaces are not known here."] if own else []
    if rig.workload.precision in ("bf16", "fp16"):
        remarks.append("CUDA's autocast keeps more operations in single precision than the CPU's, which was recorded.")
    return remarks


def _foreach(rig: Rig) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Return the workload's optimizer factory with the update over all parameters at once where the user left it open."""

    def build(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        make = rig.workload.optimizer
        optimizer = torch.optim.Adam(parameters) if make is None else make(parameters)
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
        return optimizer

    return build


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    was_enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # its stub shows the property's class
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


class _FusedDropout(TorchFunctionMode):
    """Runs dropout as CUDA does: one kernel that keeps a boolean mask, where gradients are wanted and it is not in place."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is nn.functional.dropout:
            return _dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002, FBT001, FBT002  # torch's names
    if training and not inplace and 0.0 < p < 1.0 and input.requires_grad:
        dropped: Tensor = torch.native_dropout(input, p, True)[0]  # noqa: FBT003
        return dropped
    return nn.functional.dropout(input, p, training, inplace)
