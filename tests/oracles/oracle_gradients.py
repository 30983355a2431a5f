"""Slow obvious twins of the gradient sums: every gradient is kept, and every number is summed anew from all of them."""

from itertools import pairwise

import torch


def block_edges(count, most_blocks):
    """Where blocks of consecutive micro-batches begin and end: the shortest power of two at which they fit."""
    length = 1
    while -(-count // length) > most_blocks:
        length *= 2
    return [min(start, count) for start in range(0, count + length, length)][: -(-count // length) + 1]


def counts(gradients, most_blocks):
    return tuple(stop - start for start, stop in pairwise(block_edges(len(gradients), most_blocks)))


def sq_norm_sums(gradients, most_blocks):
    edges = pairwise(block_edges(len(gradients), most_blocks))
    return tuple(sum(float((g.double() ** 2).sum()) for g in gradients[start:stop]) for start, stop in edges)


def gram(gradients, most_blocks):
    """The dot product of two blocks' sums is the sum of the dot products of their members."""
    edges = list(pairwise(block_edges(len(gradients), most_blocks)))
    return tuple(
        tuple(sum(float(g.double() @ h.double()) for g in gradients[a:b] for h in gradients[c:d]) for c, d in edges) for a, b in edges
    )


def per_sample_gradients(model, loss, samples):
    """One backward pass a sample: shape (samples, parameters)."""
    rows = []
    for inputs, target in samples:
        model.zero_grad(set_to_none=True)
        loss(model(inputs.unsqueeze(0)), torch.tensor([target])).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)
