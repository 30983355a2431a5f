"""Two networks trained with Adam, which nothing in `find` was set on; run: python benchmarks/live_regret.py --workloads THIS_FILE."""

import sys
from pathlib import Path

import torch
from torch import nn

import rightbatch as rb

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from digits import accuracy
from fashion_mnist import FashionMnist
from held_samples import FASHION_MNIST, held

TARGETS = {"adam_mlp": "accuracy>=0.84", "adamw_cnn": "accuracy>=0.80"}
SIZES = dict.fromkeys(TARGETS, (16, 32, 64, 128, 256, 512, 1024))


def adam_mlp() -> rb.Workload:
    """Three linear layers on the first 20,000 pictures of Fashion-MNIST; 2,000 of its test set validate."""

    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    return _workload("adam_mlp", net, lambda params: torch.optim.Adam(params, lr=4e-3), tuned_at=64)


def adamw_cnn() -> rb.Workload:
    """Two convolutions and a linear layer on the same pictures."""

    def net() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(24 * 49, 10)),
        )

    return _workload("adamw_cnn", net, lambda params: torch.optim.AdamW(params, lr=1.6e-2, weight_decay=0.01), tuned_at=128)


def _workload(name: str, net: object, optimizer: object, *, tuned_at: int) -> rb.Workload:
    return rb.Workload(
        name=name,
        model=net,
        train=held(FashionMnist(FASHION_MNIST, "train"), 20_000),
        valid=held(FashionMnist(FASHION_MNIST, "t10k"), 2_000),
        loss=nn.functional.cross_entropy,
        optimizer=optimizer,
        lr_batch_size=tuned_at,
        metric=accuracy,
        num_workers=0,
    )
