"""Datasets of the benchmarks that lie in memory, so that reading is no part of what is compared."""

import torch
from torch.utils.data import Dataset, TensorDataset

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts it."""


def held(dataset: Dataset, count: int) -> TensorDataset:
    """Hold the first samples of a dataset of images and classes as two tensors."""
    samples = [dataset[index] for index in range(count)]
    return TensorDataset(torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples]))
