"""Learning rate: how it follows the batch size, by the optimizer's family."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from rightbatch.fits.intervals import FloatArray
from rightbatch.fits.lr_company import company, is_layerwise
from rightbatch.records.estimates import NoiseScale, NoiseSnapshot, Status
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import LrCoupling
from rightbatch.units import format_number

LrRule: TypeAlias = Literal["saturating linear", "square root", "saturating power", "none"]

SATURATION = 2.0
"""Size beyond which tuned rates of SGD stop growing, over the noise scale along a pilot (docs/decisions/023-rates-in-the-check.md)."""
HOTTEST = 2.0
"""Most that the check may raise rate over size above the user's own (docs/decisions/025-how-hot-the-check-may-go.md)."""
SGD_FAMILY = frozenset({"SGD", "ASGD"})
ADAPTIVE_FAMILY = frozenset({"Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop"})
_POWERS = {"LARS": (0.39, 0.30), "LAMB": (0.70, 0.56)}
"""Powers of the saturating gain, and of kappa alone, that tuned MLPerf runs followed: ResNet with LARS, BERT with LAMB (theory page)."""


@dataclass(frozen=True)
class RateLimit:
    """How far training may raise the rate of a size above the rule's: rate over size stays below ``HOTTEST`` times that of the tuned rate.

    Noise about the way of stochastic gradient descent goes with rate over size, and in the end keeps the loss above a target. A short
    branch does not see that end.

    Source:
        Smith and Le 2018, arXiv:1710.06451, for the noise; docs/theory/branches.md.
    """

    base_size: float
    """At which the rate was tuned, in samples."""
    saturation: float
    """Size beyond which the rule's rates stop growing, in samples."""

    def over_rule(self, sizes: FloatArray) -> FloatArray:
        """The largest rate over the rule's at each size; the rule's own always is allowed."""
        linear_over_rule = (sizes + self.saturation) / (self.base_size + self.saturation)
        return np.asarray(np.maximum(HOTTEST * linear_over_rule, 1.0))


def rate_limit(workload: WorkloadSummary, noise_scale_samples: float | None) -> RateLimit | None:
    """Return how far training may raise the rate above the rule's; none where that is not known, or the optimizer is none of SGD's family.

    Args:
        workload: Optimizer, and the batch size of its tuned rate.
        noise_scale_samples: B in samples; none when it is not known.
    """
    if workload.optimizer not in SGD_FAMILY or workload.lr_batch_size is None or noise_scale_samples is None:
        return None
    return RateLimit(workload.lr_batch_size, SATURATION * noise_scale_samples)


def known_noise_scale(noise: NoiseScale | None) -> float | None:
    """The measured noise scale in samples, or its lower bound; none when it is unknown.

    None too where every gradient was the same, which has a noise scale of 0: nothing tells then where a rate stops growing.
    """
    if noise is None:
        return None
    known = noise.low if noise.status is Status.AT_LEAST else noise.value if noise.status is Status.OK else None
    return known if known is not None and known > 0 else None


def couple_lr(
    workload: WorkloadSummary,
    noise_scale_samples: float | None,
    global_batch_size: int,
    *,
    micro_batch_size: int | None = None,
    snapshot: NoiseSnapshot | None = None,
) -> LrCoupling:
    """Learning rate at ``global_batch_size`` from the rate tuned at ``workload.lr_batch_size``.

    With b0 the tuned size, b the new one, kappa = b / b0, B the noise scale and g(B) = (1 + B / b0) / (1 + B / b):
    stochastic gradient descent, g(2 B), which is linear below 2 B and saturates above; adaptive optimizers, sqrt(kappa);
    LARS and LAMB, g(B) to a power of their family; others, no rule.

    Args:
        workload: Optimizer, its settings, the tuned rate and its batch size.
        noise_scale_samples: B in samples; none when it is not known.
        global_batch_size: Samples of one optimizer step.
        micro_batch_size: Samples that go through the model at once; none takes the global batch.
        snapshot: The latest noise snapshot, for the clip threshold.

    Returns:
        The coupling; factor 1 where there is no rule or no tuned size to start from, and ``validity`` says which.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.6; Johnson et al. 2020 (AdaScale), arXiv:2007.05105;
        Malladi et al. 2022, arXiv:2205.10287 (square root rule); Li et al. 2024, arXiv:2405.14578 (where it ends).
    """
    base = workload.lr_batch_size
    rule = rule_of(workload.optimizer)
    factor = 1.0 if base is None else rate_factor(workload.optimizer, noise_scale_samples, base, global_batch_size)
    companions = (
        ()
        if rule == "none"
        else company(workload, size=global_batch_size, lr_factor=factor, micro_batch_size=micro_batch_size, snapshot=snapshot)
    )
    return LrCoupling(
        rule=rule,
        factor=factor,
        base_lr=workload.lr,
        base_batch_size=base,
        base_is_tested=workload.lr_is_tested,
        validity=_validity(workload.optimizer, noise_scale_samples, base, global_batch_size),
        companions=companions,
    )


def saturating_gain(noise_scale: float, base_size: float, size: float) -> float:
    """(1 + B / b0) / (1 + B / b): kappa far below B, and 1 + B / b0 at most.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.6; equal to the gain of Johnson et al. 2020, arXiv:2007.05105.
    """
    return (1 + noise_scale / base_size) / (1 + noise_scale / size)


def surge_gain(noise_scale: float, base_size: float, size: float) -> float:
    """(sqrt(B / b0) + sqrt(b0 / B)) / (sqrt(B / b) + sqrt(b / B)): sqrt(kappa) far below B, greatest at b = B, and falling above.

    The best rate of an optimizer whose steps are near the sign of the gradient, as Adam's are. Shown as the limit of the square root rule;
    B here is a noise scale in the geometry of signs, for which the simple one only stands in.

    Source:
        Li et al. 2024, Surge phenomenon in optimal learning rate and batch size scaling, arXiv:2405.14578.
    """
    return (math.sqrt(noise_scale / base_size) + math.sqrt(base_size / noise_scale)) / (
        math.sqrt(noise_scale / size) + math.sqrt(size / noise_scale)
    )


def rule_of(optimizer: str) -> LrRule:
    """Name the rule of an optimizer, by its class name."""
    if optimizer in SGD_FAMILY:
        return "saturating linear"
    if optimizer in ADAPTIVE_FAMILY:
        return "square root"
    return "saturating power" if is_layerwise(optimizer) else "none"


def rate_factor(optimizer: str, noise_scale: float | None, base_size: int, size: int) -> float:
    """New rate over the one tuned at ``base_size``; 1 where there is no rule.

    Args:
        optimizer: Class name.
        noise_scale: B in samples; none when it is not known.
        base_size: b0, in samples.
        size: b, in samples.

    Source:
        As ``couple_lr``.
    """
    rule, kappa = rule_of(optimizer), size / base_size
    if rule == "square root":
        return math.sqrt(kappa)
    if rule == "saturating power":
        power, power_alone = _POWERS[_layerwise_family(optimizer)]
        return math.pow(kappa, power_alone) if noise_scale is None else math.pow(saturating_gain(noise_scale, base_size, size), power)
    if rule == "saturating linear":
        return min(kappa, 1.0) if noise_scale is None else saturating_gain(SATURATION * noise_scale, base_size, size)
    return 1.0


def _layerwise_family(optimizer: str) -> str:
    return "LARS" if optimizer.upper().endswith("LARS") else "LAMB"


def _validity(optimizer: str, noise_scale: float | None, base: int | None, size: int) -> str:
    """Where the rule holds, in a sentence."""
    rule = rule_of(optimizer)
    if rule == "none":
        return f"No rule is established for {optimizer}: keep its rate, or tune it at the chosen size."
    if base is None:
        return "The batch size at which the rate was tuned is unknown: give lr_batch_size= to couple the rate to the size."
    if rule == "square root":
        return _square_root_validity(noise_scale, base, size)
    if rule == "saturating power":
        family = _layerwise_family(optimizer)
        return f"The power is that of tuned MLPerf runs with {family}, and differs between models: try half and twice the rate."
    if noise_scale is None:
        blind = "a smaller batch gets a rate in proportion" if size < base else "a larger batch keeps the rate"
        return f"The noise scale is unknown, and so is where the linear rule stops: {blind} until it is measured."
    limit = format_number(SATURATION * noise_scale)
    return f"Linear well below twice the noise scale, {limit}, and saturating above it; keep momentum and warm up."


def _square_root_validity(noise_scale: float | None, base: int, size: int) -> str:
    if not noise_scale:
        return "The square root rule holds while gradient noise dominates."
    limit = (
        f"The square root rule holds while gradient noise dominates; beyond the noise scale, {format_number(noise_scale)}, the best rate"
    )
    if size <= noise_scale:
        return f"{limit} falls again."
    return f"{limit} falls again: by Li et al. (2024) this size takes {format_number(surge_gain(noise_scale, base, size))} times the rate."
