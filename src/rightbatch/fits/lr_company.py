"""The learning rate's company: settings that have to move when the batch size does, so that each keeps its meaning in samples.

Symbols: kappa = b / b0, new size over the one that everything was tuned at. Every rule is neutral at kappa = 1, and two steps compose:
scaling by kappa1 and then by kappa2 is scaling by kappa1 kappa2.
"""

import math

from rightbatch.records.estimates import NoiseSnapshot
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.units import format_number

_BATCH_NORM_MOMENTUM = 0.1
_EMA_DECAY = 0.999
_DECOUPLED = frozenset({"AdamW"})
_LAYERWISE = frozenset({"LARS", "LAMB", "Lars", "Lamb", "FusedLAMB", "FusedMixedPrecisionLamb", "NVLAMB"})


def decay_by_half_life(decay: float, kappa: float) -> float:
    """decay**kappa: an exponential average that is updated 1 / kappa times as often forgets as many samples ago.

    For Adam's betas and for averages of the weights. Holds while kappa is so small that the average still spans several steps.

    Source:
        Malladi et al. 2022, arXiv:2205.10287 (betas, as 1 - kappa (1 - beta), which this is to first order); Busbridge et al. 2023, How to
        scale your EMA, arXiv:2307.13813 (averages).
    """
    return math.pow(decay, kappa)


def batch_norm_momentum(momentum: float, kappa: float) -> float:
    """1 - (1 - momentum)**kappa: torch's momentum is the weight of the new batch, so its complement is the decay.

    Args:
        momentum: Weight of the newest batch, between 0 and 1.
        kappa: Here of the micro-batch: running statistics are updated once a micro-batch.

    Source:
        The same half-life as ``decay_by_half_life``; derived in docs/theory/lr_scaling.md.
    """
    return 1 - math.pow(1 - momentum, kappa)


def decoupled_weight_decay(weight_decay: float, kappa: float, lr_factor: float) -> float:
    """weight_decay * kappa / lr_factor, which keeps b / (lr * weight_decay), the samples over which old weights are forgotten.

    Source:
        Wang and Aitchison 2024, arXiv:2405.13698 (the time scale of AdamW's average of updates, in epochs).
    """
    return weight_decay * kappa / lr_factor


def clip_factor(grad_sq_norm: float, grad_noise_trace: float, base_size: int, size: int) -> float:
    """sqrt((|G|**2 + tr Sigma / b) / (|G|**2 + tr Sigma / b0)): the root mean square norm of a batch's gradient shrinks so much.

    A threshold scaled with it clips as large a share of the steps as before, as long as norms spread about their mean alike.

    Args:
        grad_sq_norm: |G|**2 of the true gradient, not negative.
        grad_noise_trace: tr Sigma of one sample's gradient, not negative; not both zero.
        base_size: b0, in samples.
        size: b, in samples.

    Source:
        E |g_b|**2 = |G|**2 + tr Sigma / b: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    """
    return math.sqrt((grad_sq_norm + grad_noise_trace / size) / (grad_sq_norm + grad_noise_trace / base_size))


def is_layerwise(optimizer: str) -> bool:
    """Whether an optimizer, by its class name, sets each layer's rate by the norm of its weights."""
    return optimizer in _LAYERWISE


def is_decoupled(optimizer: str) -> bool:
    """Whether an optimizer, by its class name, decays weights apart from the gradient."""
    return optimizer in _DECOUPLED


def company(
    workload: WorkloadSummary, *, size: int, lr_factor: float, micro_batch_size: int | None, snapshot: NoiseSnapshot | None
) -> tuple[tuple[str, str], ...]:
    """Name each setting of a workload that moves with the size, and its new value in words.

    Args:
        workload: Its optimizer and its tuned size; ``lr_batch_size`` must be known.
        size: The new global batch size, in samples.
        lr_factor: New rate over the tuned one.
        micro_batch_size: Samples that batch normalisation will see; none takes ``size``.
        snapshot: The latest noise snapshot, for the clip threshold; none when the noise is unknown.
    """
    base = workload.lr_batch_size
    if base is None or base == size:
        return ()
    kappa = size / base
    layerwise = is_layerwise(workload.optimizer)
    companions = [
        ("betas", _betas(workload, kappa)),
        ("weight decay", _weight_decay(workload, kappa, lr_factor)),
        ("batch norm momentum", _batch_norm(workload, (micro_batch_size or size) / base)),
        ("clip threshold", _clip(workload, base, size, snapshot)),
        (
            "EMA decay",
            f"{format_number(decay_by_half_life(_EMA_DECAY, kappa), 4)} instead of {_EMA_DECAY:g}, if the model has an average of weights",
        ),
        (
            "warm-up",
            f"the same number of steps: {format_number(kappa)} times the samples"
            if layerwise
            else f"the same number of samples: {format_number(1 / kappa)} times the steps",
        ),
        ("schedule", f"by samples, not steps: milestones and length at {format_number(1 / kappa)} times the steps"),
    ]
    return tuple((name, words) for name, words in companions if words)


def _betas(workload: WorkloadSummary, kappa: float) -> str:
    if workload.betas is None or is_layerwise(workload.optimizer):
        return ""
    first, second = (decay_by_half_life(beta, kappa) for beta in workload.betas)
    old = f"{workload.betas[0]:g}, {workload.betas[1]:g}"
    return f"{format_number(first)}, {format_number(second, 4)} keep the half-life in samples of {old}"


def _weight_decay(workload: WorkloadSummary, kappa: float, lr_factor: float) -> str:
    if not is_decoupled(workload.optimizer) or not workload.weight_decay:
        return ""
    decay = decoupled_weight_decay(workload.weight_decay, kappa, lr_factor)
    return f"{format_number(decay)} keeps batch size / (rate x decay) of {workload.weight_decay:g}"


def _batch_norm(workload: WorkloadSummary, kappa: float) -> str:
    if not workload.batch_norm or kappa == 1:
        return ""
    momentum = batch_norm_momentum(_BATCH_NORM_MOMENTUM, kappa)
    return f"{format_number(momentum)} instead of {_BATCH_NORM_MOMENTUM:g}; statistics update once a micro-batch"


def _clip(workload: WorkloadSummary, base: int, size: int, snapshot: NoiseSnapshot | None) -> str:
    """Say the new threshold; nothing when the workload does not clip, and why not when the norms are unknown."""
    if workload.clip_norm is None:
        return ""
    signal = None if snapshot is None else snapshot.grad_sq_norm.value
    noise = None if snapshot is None else snapshot.grad_noise_trace.value
    if signal is None or noise is None or signal <= 0 or noise <= 0:
        return f"{format_number(workload.clip_norm)} has to be found again: the norm of the mean gradient is below its noise"
    threshold = workload.clip_norm * clip_factor(signal, noise, base, size)
    return f"{format_number(threshold)} instead of {format_number(workload.clip_norm)} clips as many steps"
