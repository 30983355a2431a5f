"""Slow obvious twins of the noise estimators: per-sample gradients in float64, one formula a line."""

import math
from itertools import pairwise

import numpy as np

from rightbatch.records.gradient_norms import GradientNorms


def norms_of(gradients, *, micro_batch_size, block_counts, dataset_size=10**12, samples_seen=0):
    """Group per-sample gradients (samples, parameters) into the record that the probe writes."""
    count = sum(block_counts)
    micro = gradients[: count * micro_batch_size].reshape(count, micro_batch_size, -1).mean(axis=1)
    edges = np.cumsum((0, *block_counts))
    blocks = [micro[start:stop] for start, stop in pairwise(edges)]
    sums = np.array([block.sum(axis=0) for block in blocks])
    return GradientNorms(
        samples_seen=samples_seen,
        micro_batch_size=micro_batch_size,
        dataset_size=dataset_size,
        block_counts=block_counts,
        block_sq_norm_sums=tuple(float((block**2).sum()) for block in blocks),
        block_gram=tuple(tuple(float(v) for v in row) for row in sums @ sums.T),
    )


def trace_and_sq_norm(micro, micro_batch_size, dataset_size):
    """S and G from micro-batch gradients (micro, parameters), by sample covariance and off-diagonal products."""
    count = len(micro)
    trace = micro_batch_size * micro.var(axis=0, ddof=1).sum()
    products = [micro[i] @ micro[j] for i in range(count) for j in range(count) if i != j]
    return trace, np.mean(products) + trace / dataset_size


def ragged_norms_of(gradients, *, sizes, micro_batch_size, block_counts, dataset_size=10**12):
    """The record of micro-batches of ``sizes`` samples each, cut from per-sample gradients."""
    micro, edges = ragged_means(gradients, sizes), np.cumsum((0, *block_counts))
    weights = np.array(sizes) / micro_batch_size
    sums = np.array([(weights[a:b, None] * micro[a:b]).sum(axis=0) for a, b in pairwise(edges)])
    return GradientNorms(
        samples_seen=0,
        micro_batch_size=micro_batch_size,
        dataset_size=dataset_size,
        block_counts=block_counts,
        block_sample_counts=tuple(sum(sizes[a:b]) for a, b in pairwise(edges)),
        block_sq_norm_sums=tuple(float((weights[a:b, None] * micro[a:b] ** 2).sum()) for a, b in pairwise(edges)),
        block_gram=tuple(tuple(float(v) for v in row) for row in sums @ sums.T),
    )


def ragged_means(gradients, sizes):
    """Mean gradient of each micro-batch of ``sizes`` samples."""
    return np.array([gradients[a:b].mean(axis=0) for a, b in pairwise(np.cumsum((0, *sizes)))])


def ragged_trace_and_sq_norm(micro, sizes, dataset_size):
    """S and G from micro-batches of unequal sizes, by squared deviations from the mean of all samples."""
    samples = sum(sizes)
    centre = sum(size * gradient for size, gradient in zip(sizes, micro, strict=True)) / samples
    trace = sum(size * ((gradient - centre) ** 2).sum() for size, gradient in zip(sizes, micro, strict=True)) / (len(sizes) - 1)
    return trace, (centre**2).sum() - trace / samples + trace / dataset_size


def step_trace_and_sq_norm(micro, sizes, weights, dataset_size=math.inf):
    """S and G of one step whose micro-batch gradients entered with weights, pair by pair of micro-batches."""
    pairs = [(i, j) for i in range(len(micro)) for j in range(len(micro)) if i != j]
    product = sum(weights[i] * weights[j] * (micro[i] @ micro[j]) for i, j in pairs) / sum(weights[i] * weights[j] for i, j in pairs)
    excess = sum(w**2 * (g @ g - product) for w, g in zip(weights, micro, strict=True))
    trace = excess / sum(w**2 / size for w, size in zip(weights, sizes, strict=True))
    return trace, product + trace / dataset_size


def jackknife_covariance(micro, micro_batch_size, dataset_size, block_counts):
    """Delete-a-group jackknife covariance of (S, G), recomputing each from the micro-batches that are left.

    Multiplied with the share of the population that was not drawn, and for S of its contrasts.
    """
    count, groups = len(micro), len(block_counts)
    edges = np.cumsum((0, *block_counts))
    whole = np.array(trace_and_sq_norm(micro, micro_batch_size, dataset_size))
    pseudo, ratios = [], []
    for start, stop in pairwise(edges):
        ratio = count / (stop - start)
        left = np.delete(micro, np.s_[start:stop], axis=0)
        pseudo.append(ratio * whole - (ratio - 1) * np.array(trace_and_sq_norm(left, micro_batch_size, dataset_size)))
        ratios.append(ratio)
    centre = sum(value / ratio for value, ratio in zip(pseudo, ratios, strict=True))
    not_drawn, not_contrasted = 1 - count * micro_batch_size / dataset_size, 1 - (count - 1) / (dataset_size - 1)
    covariance = sum(np.outer(v - centre, v - centre) / (r - 1) for v, r in zip(pseudo, ratios, strict=True)) / groups
    return covariance * np.array([[not_contrasted, not_drawn], [not_drawn, not_drawn]])


def fieller_set(moments, quantile, grid):
    """Ratios of a grid that a t-test of S - r G = 0 does not reject."""
    difference = moments.trace - grid * moments.sq_norm
    variance = moments.var_trace - 2 * grid * moments.cov + grid**2 * moments.var_sq_norm
    return grid[difference**2 <= quantile**2 * variance]


def gaussian_gradients(rng, *, samples, noise_scale, dimension):
    """Per-sample gradients with |G|**2 = 1 and tr Sigma = noise_scale, isotropic."""
    mean = np.full(dimension, dimension**-0.5)
    return mean + rng.standard_normal((samples, dimension)) * np.sqrt(noise_scale / dimension)
