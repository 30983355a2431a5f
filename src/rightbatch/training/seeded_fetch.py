"""Fetching of whole batches, each with random numbers of its own, whichever process does it."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from rightbatch.training.batch_sampler import DrawnBatch
from rightbatch.workload.ingredients import Batch, SizedDataset


class SeededFetch(Dataset[Batch]):
    """A dataset of collated batches: fetches the samples of a batch and collates them, its generators seeded by the batch's place.

    Random transforms, in the dataset or in ``collate_fn``, so depend on the seed, the epoch, the position and the rank, and neither on
    the number of workers nor on where a training was interrupted. The generators of Python, NumPy (the global one) and torch's CPU are
    seeded; in the training process itself they are put back afterwards.

    Args:
        dataset: Gives samples by index, or several at once by ``__getitems__``.
        collate_fn: Makes a batch of a list of samples.
        seed: Seed of the random numbers.
        rank: Number of this process among those that share a global batch.
    """

    def __init__(self, dataset: SizedDataset, collate_fn: Callable[[list[Any]], Batch], *, seed: int, rank: int) -> None:
        self.dataset = dataset
        self._collate_fn = collate_fn
        self._seed, self._rank = seed, rank
        self._fetch: Callable[[list[int]], list[Any]] | None = getattr(dataset, "__getitems__", None)

    def __getitem__(self, drawn: DrawnBatch) -> Batch:
        """Return the collated batch."""
        with contextlib.nullcontext() if get_worker_info() is not None else _generators_put_back():
            _seed_generators(f"{self._seed} {drawn.epoch} {drawn.start} {self._rank}")
            if self._fetch is not None:
                return self._collate_fn(self._fetch(drawn.indices))
            return self._collate_fn([self.dataset[index] for index in drawn.indices])


def _seed_generators(place: str) -> None:
    """Seed with parts of a hash: NumPy and torch run the same algorithm, and from one seed would draw the same numbers."""
    words = hashlib.blake2b(place.encode(), digest_size=16).digest()
    random.seed(words[:8])
    np.random.seed(int.from_bytes(words[8:12], "little"))  # noqa: NPY002  # users' transforms draw from the legacy generator
    torch.default_generator.manual_seed(int.from_bytes(words[12:], "little"))  # torch.manual_seed would seed every GPU's too


@contextlib.contextmanager
def _generators_put_back() -> Iterator[None]:
    kept = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        torch.default_generator.set_state(kept[2])
