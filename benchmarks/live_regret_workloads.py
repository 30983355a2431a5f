"""Three small CNNs that train to a target in seconds on one core, with the rate tuned at the size they name; see live_regret.py."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset, random_split

import rightbatch as rb

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from sklearn.datasets import load_digits

from cifar10 import Cifar10
from digits import Net as DigitsNet
from digits import accuracy
from fashion_mnist import FashionMnist
from held_samples import FASHION_MNIST, held

TARGETS = {"digits": "accuracy>=0.97", "fashion_mnist": "accuracy>=0.82", "cifar10": "accuracy>=0.48"}
SIZES = {
    "digits": (8, 16, 32, 64, 128, 256, 512, 1024),
    "fashion_mnist": (16, 32, 64, 128, 256, 512, 1024),
    "cifar10": (16, 32, 64, 128, 256, 512, 1024),
}
"""Sizes of the sweep."""
SEEDS = {"digits": 8, "fashion_mnist": 3, "cifar10": 3}
"""Trainings of each size and rate that is compared: more where they are short, since short ones scatter more."""


def digits() -> rb.Workload:
    """Two convolutions without BatchNorm on 1,200 digits of 8 x 8 pixels; 597 more validate."""
    images, labels = load_digits(return_X_y=True)
    whole = TensorDataset(torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels))
    train, valid = random_split(whole, [1200, 597], generator=torch.Generator().manual_seed(0))
    return _workload("digits", lambda: DigitsNet(32), held(train, 1200), held(valid, 597), lr=0.1, tuned_at=64)


def fashion_mnist() -> rb.Workload:
    """Two convolutions without BatchNorm on the first 20,000 pictures of Fashion-MNIST; 2,000 of its test set validate."""

    def net(width: int = 8) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * width * 3 * 3, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    train, valid = held(FashionMnist(FASHION_MNIST, "train"), 20_000), held(FashionMnist(FASHION_MNIST, "t10k"), 2_000)
    return _workload("fashion_mnist", net, train, valid, lr=0.02, tuned_at=32)


def cifar10(data: str) -> rb.Workload:
    """Three convolutions with BatchNorm on the first 20,000 pictures of CIFAR-10; 2,000 of its test set validate."""

    def net(width: int = 16) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 4 * 4, 10))

    train, valid = held(Cifar10(data, "train"), 20_000), held(Cifar10(data, "test"), 2_000)
    return _workload("cifar10", net, train, valid, lr=0.05, tuned_at=128)


def _workload(name: str, net: object, train: Dataset, valid: Dataset, *, lr: float, tuned_at: int) -> rb.Workload:
    return rb.Workload(
        name=name,
        model=net,
        train=train,
        valid=valid,
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        lr_batch_size=tuned_at,
        metric=accuracy,
        num_workers=0,
    )
