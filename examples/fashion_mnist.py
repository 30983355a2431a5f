"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28 pixels, ten classes.

Run: rightbatch find examples/fashion_mnist.py:workload
     rightbatch find examples/fashion_mnist.py:workload -- --data FOLDER

The folder holds the four gzipped IDX files; Debian's package dataset-fashion-mnist puts them where this file looks by default.
"""

import gzip
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import rightbatch as rb


class Net(nn.Module):
    """Two convolutions and two linear layers."""

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
            nn.Linear(2 * width * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes: 0, 0, 8 (for uint8), the number of axes, each axis as a big-endian int32, the values."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"an IDX file of bytes starts with 0, 0, 8; {path} starts with {list(raw[:3])}. Download it again.")
    axes = np.frombuffer(raw, dtype=">i4", count=raw[3], offset=4)
    return torch.tensor(np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3])).reshape(axes.tolist())


class FashionMnist(Dataset[tuple[Tensor, Tensor]]):
    """Pictures with values from 0 to 1, and their class."""

    def __init__(self, folder: str, part: Literal["train", "t10k"]) -> None:
        self.images = read_idx(Path(folder) / f"{part}-images-idx3-ubyte.gz")
        self.labels = read_idx(Path(folder) / f"{part}-labels-idx1-ubyte.gz").long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].unsqueeze(0) / 255, self.labels[index]


def workload(width: int = 32, data: str = "/usr/share/datasets/fashion-mnist") -> rb.Workload:
    """A small CNN on Fashion-MNIST."""
    return rb.Workload(
        model=lambda: Net(width),
        train=FashionMnist(data, "train"),
        valid=FashionMnist(data, "t10k"),
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        lr_batch_size=128,
        metric=lambda scores, labels: (scores.argmax(dim=1) == labels).float().mean().item(),
    )
