"""Small models as test cases: one for each way in which a training step allocates memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from rightbatch.engine.meters import meters_for
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import Trainee
from rightbatch.workload.ingredients import Batch, Workload

CPU = torch.device("cpu")
CLASSES = 3


def rig_of(workload: Workload, seed: int = 0) -> Rig:
    return Rig(workload=workload, device=CPU, meters=meters_for(CPU), seed=seed)


def trainee_of(workload: Workload, *, loss_is_sum: bool = False) -> Trainee:
    rig = rig_of(workload)
    rig._loss_is_sum = loss_is_sum
    return rig.new_trainee()


def sgd(params, lr: float = 0.1):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def adam(params):
    return torch.optim.Adam(params, lr=1e-3)


def images(count: int, *, channels: int = 2, side: int = 8, seed: int = 0) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(channels, side, side, generator=generator), index % CLASSES) for index in range(count)]


def vectors(count: int, *, dimension: int = 6, seed: int = 0) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(dimension, generator=generator), index % CLASSES) for index in range(count)]


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, CLASSES)
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.first = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1, bias=False))
        self.second = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.second(self.first(x))
        return self.head(x.mean((2, 3)))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.SiLU(), nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 3)
    )


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(2).transpose(1, 2).reshape(len(x), -1, 16))[0][:, -1])


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(128, 16, bias=False)
        self.decode = nn.Linear(128, 16, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.encode(x.flatten(1)))
        return self.head(self.decode(hidden @ self.encode.weight))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(4, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.relu(self.left(left)) * self.right(right))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, self.stem(x), use_reentrant=False)
        return self.head(hidden.mean((2, 3)))


class Contrastive(nn.Module):
    """Compares every sample with every other: its largest allocation is quadratic in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x.flatten(1))
        return torch.softmax(embedded @ embedded.T, dim=1) @ embedded


class DataDependent(nn.Module):
    """Works only on what is positive: its allocations follow the data, not the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        positive = x[x > 0]
        return self.head(x.mean((1, 2, 3)).unsqueeze(1)) + positive.square().mean()


class MoreStepsForMore(nn.Module):
    """Runs one more layer for batches above four samples: the operations differ by size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(torch.relu(x) if len(x) > 4 else x)


@dataclass(frozen=True)
class MemoryCase:
    """A workload whose peak the trace must predict to the byte."""

    name: str
    workload: Callable[[], Workload]


def _on_images(model: Callable[[], nn.Module], **ingredients: object) -> Callable[[], Workload]:
    given = {"model": partial(model), "loss": cross_entropy, "optimizer": sgd} | ingredients
    return lambda: Workload(train=images(40), **given)


def _two_inputs() -> Workload:
    generator = torch.Generator().manual_seed(0)
    samples = [(torch.randn(6, generator=generator), torch.randn(4, generator=generator), index % CLASSES) for index in range(40)]
    return Workload(model=partial(TwoInputs), train=samples, loss=cross_entropy, optimizer=sgd)


def _counted_step(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    inputs, targets = batch
    return cross_entropy(model(inputs), targets), len(inputs)


MEMORY_CASES = (
    MemoryCase("plain CNN", _on_images(plain_cnn)),
    MemoryCase("plain CNN, Adam", _on_images(plain_cnn, optimizer=adam)),
    MemoryCase("plain CNN, clipped", _on_images(plain_cnn, clip_norm=0.1)),
    MemoryCase("plain CNN, per-sample losses", _on_images(plain_cnn, loss=lambda o, t: cross_entropy(o, t, reduction="none"))),
    MemoryCase("plain CNN, own step", _on_images(plain_cnn, loss=None, step=_counted_step)),
    MemoryCase("BatchNorm residual", _on_images(Residual)),
    MemoryCase("depthwise", _on_images(depthwise)),
    MemoryCase("LSTM", _on_images(Lstm)),
    MemoryCase("tied weights", _on_images(TiedWeights)),
    MemoryCase("two inputs", _two_inputs),
    MemoryCase("activation checkpointing", _on_images(Checkpointed)),
    MemoryCase("contrastive, quadratic", _on_images(Contrastive)),
)
