"""Every sample once an epoch, the same samples after an interruption, sizes as the schedule says."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset

import rightbatch as rb


class Augmented(Dataset):
    """The index of each sample beside a draw of each generator."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        draws = random.randrange(10**9), np.random.randint(10**9), torch.randint(10**9, ()).item()  # noqa: NPY002, S311
        return torch.tensor([index, *draws])


def plan_of(global_batch_size, world_size=1):
    each = global_batch_size // world_size
    return rb.BatchPlan(global_batch_size=global_batch_size, micro_batch_size=each, world_size=world_size)


def indices_of(batches):
    return [int(index) for batch in batches for index in batch[:, 0]]


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own():
    loader = rb.BatchLoader(Augmented(23), plan_of(5))
    first, second = indices_of(loader), indices_of(loader)
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second != list(range(23))
    assert (loader.epoch, loader.samples_seen, loader.samples_per_epoch) == (2, 46, 23)
