"""Handwritten digits of 8 x 8 pixels, from inside scikit-learn: the smallest CNN worth asking about.

Run: rightbatch find examples/digits.py:workload
     rightbatch find examples/digits.py:workload -- --width 64
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rightbatch as rb


class Net(nn.Module):
    """Two convolutions and one linear layer, without BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 2 * 2, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def split_digits() -> tuple[TensorDataset, TensorDataset]:
    """Shuffle the 1,797 digits once, with a fixed seed; 1,437 are for training and 360 for validation."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16  # pixels count from 0 to 16
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, valid = order[:1437], order[1437:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[valid], labels[valid])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose highest score is that of the right class."""
    return (scores.argmax(dim=1) == labels).float().mean().item()


def workload(width: int = 32) -> rb.Workload:
    """A small CNN on handwritten digits."""
    train, valid = split_digits()
    return rb.Workload(
        model=lambda: Net(width),
        train=train,
        valid=valid,
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lr_batch_size=128,  # the batch size for which lr=0.1 was chosen
        metric=accuracy,
    )
