"""GPU checks of the whole tool: the proven ceiling, a complete run, and who else is seen on the device."""

from functools import partial

import torch

from gpu_checks_context import CheckResult, Context, place_rig
from gpu_checks_nets import Images, Made, cifar10_resnet18
from rightbatch.engine.isolation import ChildHost
from rightbatch.engine.nvml import other_gpu_processes
from rightbatch.engine.rig import Rig
from rightbatch.records.estimates import MemoryCurve
from rightbatch.records.measurements import Outcome
from rightbatch.tuner.request import Part, Request
from rightbatch.units import format_bytes
from rightbatch.workload.ingredients import Workload

_MOST_PROBES = 6
_OVERRUN = 1.15
_LEAST_S = 5.0


def proven_ceiling(context: Context) -> CheckResult:
    """Search the memory ceiling of a few networks under a limit with a proof: probes, out-of-memory errors, the size one above."""
    words, errors, all_hold = [], 0, True
    names = context.scale.finder_nets
    for index, name in enumerate(names):
        budget_s = max(_LEAST_S, min(30.0, context.left_s() / (len(names) - index)))
        request = Request(
            parts=frozenset({Part.MEMORY}),
            device=str(context.device),
            limit_bytes=context.scale.limit_bytes,
            budget_s=budget_s,
            certify=True,
            save=False,
        )
        curve = context.find(Made(context.networks()[name], name), request).memory
        if curve is None:
            raise RuntimeError(f"the search found nothing about the memory of {name}")
        searched = [point for point in curve.points if point.purpose != "proof"]
        failed = sum(point.outcome in {Outcome.OUT_OF_MEMORY, Outcome.KILLED} for point in searched)
        errors += failed
        is_proven = curve.certificate is not None and curve.certificate.holds
        all_hold &= is_proven and failed == 0 and len(searched) <= _MOST_PROBES
        words.append(f"{name}: {_told(curve, len(searched), failed)}")
    return CheckResult(
        name="proven ceiling",
        value=errors,
        unit="out-of-memory errors before the proof",
        goal=f"0, in at most {_MOST_PROBES} probes, and one sample more fails, on every network",
        holds=all_hold,
        detail=f"limit {format_bytes(context.scale.limit_bytes)}; {'; '.join(words)}",
    )


def _told(curve: MemoryCurve, probes: int, failed: int) -> str:
    proof = "no proof" if curve.certificate is None else f"{curve.certificate.micro_batch_size} {curve.certificate.outcome.value}"
    return (
        f"ceiling {curve.ceiling}, predicted {curve.predicted_ceiling}, smooth {curve.smooth_ceiling}, "
        f"{probes} probes, {failed} out of memory, {proof}"
    )


def whole_run(context: Context) -> CheckResult:
    """Run ``find`` end to end on ResNet-18 and images of CIFAR-10's shape; it must name a plan within its budget."""
    scale = context.scale
    budget_s = min(scale.find_budget_s, max(_LEAST_S, context.left_s()))
    make = partial(cifar10_resnet18, scale.find_width, scale.find_samples, context.data)
    findings = context.find(Made(make, "resnet18"), Request(device=str(context.device), budget_s=budget_s, save=False))
    plan, noise = findings.recommendation.plan, findings.noise_scale
    data = "CIFAR-10 from a file" if context.data else f"{scale.find_samples} synthetic images of CIFAR-10's shape, not CIFAR-10"
    return CheckResult(
        name="find",
        value=None if plan is None else plan.global_batch_size,
        unit="samples",
        goal=f"a plan within {_OVERRUN:g} times {budget_s:.0f} s",
        holds=plan is not None and findings.duration_s <= _OVERRUN * budget_s,
        detail=f"{data}; ResNet-18 of width {scale.find_width}; status {findings.recommendation.status}; {findings.duration_s:.1f} s; "
        f"ceiling {findings.memory.ceiling if findings.memory else None}, knee {findings.step_time.knee if findings.step_time else None}, "
        f"noise scale {noise.value if noise else None} [{noise.low if noise else None}, {noise.high if noise else None}], "
        f"lr {plan.lr if plan else None}; {' '.join(findings.step_time.reasons if findings.step_time else ())}".rstrip("; "),
    )


def contention(context: Context) -> CheckResult:
    """Count other processes on the device, alone and while a child of this process computes there."""
    workload = Workload(model=torch.nn.Flatten, train=Images(8, 64), loss=torch.nn.functional.cross_entropy)
    torch.ones(1, device=context.device)
    before = other_gpu_processes(context.device)
    host = ChildHost(partial(place_rig, workload, context.device), lambda _: None)
    try:
        seen_by_child = host.call(_others_in_child)
        during = other_gpu_processes(context.device)
    finally:
        host.close()
    return CheckResult(
        name="contention",
        value=during - before,
        unit="processes more while a child computes",
        goal="1, none before",
        holds=before == 0 and during == 1,
        detail=f"before {before}, during {during}; the child, whose parent has a context, sees {seen_by_child}",
    )


def _others_in_child(rig: Rig) -> int:
    torch.ones(1, device=rig.device)
    return other_gpu_processes(rig.device)
