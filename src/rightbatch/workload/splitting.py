"""Micro-batches of a collated batch, whatever it is nested in."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from rightbatch.errors import WorkloadError
from rightbatch.workload.ingredients import Batch, sample_count


def split_batch(batch: Batch, most: int) -> list[Batch]:
    """Split a batch along its samples into as few parts as may be, whose sizes differ by one at most.

    Tensors are cut along their first dimension, as views, and so are lists of as many entries as there are samples, such as strings.
    Everything of another length, scalars among it, belongs to the whole batch and is in every part.

    Args:
        batch: As its collate function made it.
        most: Samples that a part holds at most.

    Raises:
        WorkloadError: The batch holds no samples.
    """
    count = sample_count(batch)
    if count < 1:
        raise WorkloadError("a batch must hold at least one sample; got none; leave out empty batches, on all ranks alike.")
    if count <= most:
        return [batch]
    parts = -(-count // most)
    edges = [count * index // parts for index in range(parts + 1)]
    return [_cut(batch, start, stop, count) for start, stop in pairwise(edges)]


def _cut(batch: Batch, start: int, stop: int, count: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim > 0 and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return _rebuilt(batch, {key: _cut(value, start, stop, count) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(value, start, stop, count) for value in batch))
    if isinstance(batch, (list, tuple)):
        if len(batch) == count and not any(isinstance(value, (Tensor, Mapping, list, tuple)) for value in batch):
            return batch[start:stop]
        return type(batch)(_cut(value, start, stop, count) for value in batch)
    return batch


def _rebuilt(batch: Mapping[Any, Any], cut: dict[Any, Any]) -> Mapping[Any, Any]:
    try:
        return type(batch)(cut)  # type: ignore[call-arg]  # a mapping class such as BatchEncoding takes a dict
    except TypeError:
        return cut
