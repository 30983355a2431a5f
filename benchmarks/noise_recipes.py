"""How other libraries reduce the same gradients to a noise scale, each rewritten from its published source.

Every recipe takes the per-sample gradients of a run, shape (steps, micro-batches, samples, parameters), and returns what it would show at
its end. None of them corrects for a finite dataset, and none gives an interval.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def fairscale(gradients: Floats) -> float:
    """AdaScale: sums of each step clamped at zero before averaging; moving averages with smoothing 1 - K / 1000.

    Source: facebookresearch/fairscale, fairscale/optim/adascale.py (the paper's appendix B.3).
    """
    micro, step = _means(gradients)
    count = gradients.shape[1]
    variance = np.maximum(count / (count - 1) * (_sq(micro).mean(axis=1) - _sq(step)), 1e-6)
    sq_norm = np.maximum(_sq(step) - variance / count, 0.0)
    smoothing = max(1 - count / 1000, 0.0)
    return _ratio(gradients.shape[2] * _moving(variance, smoothing), _moving(sq_norm, smoothing))


def gns_pytorch(gradients: Floats) -> float:
    """Per-sample gradients of a quarter of the batch at one instant; a negative ratio counts as zero; ratios are averaged.

    Source: gns-pytorch 0.1.5, compute_gns (its subsample of parameters is left out; it averages ratios over ranks, here over steps).
    """
    batch = gradients.reshape(len(gradients), -1, gradients.shape[-1])
    some = batch[:, : max(2, batch.shape[1] // 4)]
    count, small, large = some.shape[1], _sq(some).mean(axis=1), _sq(some.mean(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (small - large) / (1 - 1 / count) / ((count * large - small) / (count - 1))
    return float(np.where(ratios > 0, ratios, 0.0).mean())


def gpt_neox(gradients: Floats) -> float:
    """One step's gradient against the mean over ten steps, once in ten steps; moving averages with 0.99.

    Source: EleutherAI/gpt-neox, megatron/gradient_noise_scale (its bias correction counts steps, not updates, and cancels in the ratio).
    """
    _, step = _means(gradients)
    together, batch = 10, gradients.shape[1] * gradients.shape[2]
    groups = step[: len(step) // together * together].reshape(-1, together, step.shape[-1])
    small, large = _sq(groups[:, -1]), _sq(groups.mean(axis=1))
    noise = (small - large) / (1 / batch - 1 / (together * batch))
    signal = (together * large - small) / (together - 1)
    return _ratio(_moving(noise, 0.99), _moving(signal, 0.99))


def k_diffusion(gradients: Floats) -> float:
    """Unbiased sums of each step; moving averages with 0.9998 that start at zero, clamped at 1e-8.

    Source: crowsonkb/k-diffusion, k_diffusion/gns.py.
    """
    micro, step = _means(gradients)
    count, size = gradients.shape[1:3]
    small, large = _sq(micro).mean(axis=1), _sq(step)
    signal = (count * large - small) / (count - 1)
    noise = (small - large) / (1 / size - 1 / (count * size))
    started = 1 - 0.9998 ** len(signal)
    return max(started * _moving(noise, 0.9998), 1e-8) / max(started * _moving(signal, 0.9998), 1e-8)


RECIPES = {"fairscale": fairscale, "gns-pytorch": gns_pytorch, "gpt-neox": gpt_neox, "k-diffusion": k_diffusion}


def _means(gradients: Floats) -> tuple[Floats, Floats]:
    micro = gradients.mean(axis=2)
    return micro, micro.mean(axis=1)


def _sq(vectors: Floats) -> Floats:
    return np.asarray((vectors**2).sum(axis=-1))


def _moving(values: Floats, keep: float) -> float:
    """Exponential moving average with its start corrected for."""
    weights = keep ** np.arange(len(values))[::-1]
    return float(weights @ values / weights.sum())


def _ratio(noise: float, signal: float) -> float:
    return noise / signal if signal else float("inf")
