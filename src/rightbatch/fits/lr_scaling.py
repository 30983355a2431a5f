"""Learning rate: how it and its company follow the batch size, by the optimizer's family."""

import math
from typing import Literal, TypeAlias

from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import LrCoupling
from rightbatch.units import format_number

LrRule: TypeAlias = Literal["saturating linear", "square root", "none"]

SGD_FAMILY = frozenset({"SGD", "ASGD"})
ADAPTIVE_FAMILY = frozenset({"Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop"})
_BATCH_NORM_MOMENTUM = 0.1
_EMA_DECAY = 0.999


def couple_lr(workload: WorkloadSummary, noise_scale_samples: float | None, global_batch_size: int) -> LrCoupling:
    """Learning rate at ``global_batch_size`` from the rate tuned at ``workload.lr_batch_size``.

    With b0 the tuned size, b the new one, kappa = b / b0 and B the noise scale:
    stochastic gradient descent, (1 + B / b0) / (1 + B / b), which is linear below B and saturates above;
    adaptive optimizers, sqrt(kappa); others, no rule.

    Args:
        workload: Optimizer, its settings, the tuned rate and its batch size.
        noise_scale_samples: B in samples; none when it is not known.
        global_batch_size: Samples of one optimizer step.

    Returns:
        The coupling; factor 1 where there is no rule or no tuned size to start from, and ``validity`` says which.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.6; Johnson et al. 2020 (AdaScale), arXiv:2007.05105;
        Malladi et al. 2022, arXiv:2205.10287 (square root rule).
    """
    base = workload.lr_batch_size
    if workload.optimizer not in SGD_FAMILY | ADAPTIVE_FAMILY:
        reason = f"No rule is established for {workload.optimizer}: keep its rate, or tune it at the chosen size."
        return LrCoupling(rule="none", factor=1.0, base_lr=workload.lr, base_batch_size=base, validity=reason)
    rule, factor, validity = _rule(workload, noise_scale_samples, base, global_batch_size)
    companions = () if base is None or base == global_batch_size else _companions(workload, global_batch_size / base, factor)
    return LrCoupling(rule=rule, factor=factor, base_lr=workload.lr, base_batch_size=base, validity=validity, companions=companions)


def _rule(workload: WorkloadSummary, noise_scale: float | None, base: int | None, size: int) -> tuple[LrRule, float, str]:
    rule: LrRule = "saturating linear" if workload.optimizer in SGD_FAMILY else "square root"
    if base is None:
        return (
            rule,
            1.0,
            "The batch size at which the rate was tuned is unknown: give lr_batch_size= to couple the rate to the size.",
        )
    kappa = size / base
    if rule == "square root":
        where = f"; beyond the noise scale, {format_number(noise_scale)}, the best rate stops growing" if noise_scale else ""
        return rule, math.sqrt(kappa), f"The square root rule holds while gradient noise dominates{where}."
    if noise_scale is None:
        blind = "a smaller batch gets a rate in proportion" if kappa < 1 else "a larger batch keeps the rate"
        return rule, min(kappa, 1.0), f"The noise scale is unknown, and so is where the linear rule stops: {blind} until it is measured."
    factor = (1 + noise_scale / base) / (1 + noise_scale / size)
    return (
        rule,
        factor,
        f"Linear well below the noise scale, {format_number(noise_scale)}, and saturating above it; keep momentum and warm up.",
    )


def _companions(workload: WorkloadSummary, kappa: float, factor: float) -> tuple[tuple[str, str], ...]:
    """Other settings, scaled so that each keeps its memory in samples rather than in steps."""
    companions: list[tuple[str, str]] = []
    if workload.optimizer in ADAPTIVE_FAMILY and workload.betas is not None:
        first, second = (beta**kappa for beta in workload.betas)
        old = f"{workload.betas[0]:g}, {workload.betas[1]:g}"
        companions.append(("betas", f"{format_number(first)}, {format_number(second, 4)} keep the half-life in samples of {old}"))
    if workload.optimizer == "AdamW" and workload.weight_decay:
        decay = workload.weight_decay * kappa / factor
        companions.append(("weight decay", f"{format_number(decay)} keeps batch size / (rate x decay) of {workload.weight_decay:g}"))
    if workload.batch_norm:
        momentum = 1 - (1 - _BATCH_NORM_MOMENTUM) ** kappa
        text = f"{format_number(momentum)} instead of {_BATCH_NORM_MOMENTUM:g} without accumulation; statistics update once a micro-batch"
        companions.append(("batch norm momentum", text))
    companions.append(
        ("EMA decay", f"{format_number(_EMA_DECAY**kappa, 4)} instead of {_EMA_DECAY:g}, if the model has an average of weights")
    )
    companions.append(("warm-up", f"the same number of samples: {format_number(1 / kappa)} times the steps"))
    return tuple(companions)
