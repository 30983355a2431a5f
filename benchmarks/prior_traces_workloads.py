"""Eight small networks on six kinds of data, with the optimizers and the rates that people reach for; see prior_traces.py.

Names are dataset/network/optimizer, as in the public traces: workloads of one network are left out together.
"""

import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import rightbatch as rb

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from cifar10 import Cifar10
from digits import Net as DigitsNet
from digits import accuracy
from fashion_mnist import FashionMnist
from held_samples import FASHION_MNIST, held

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CHARACTERS = 97
"""A printable character each, and one for all others."""
TRIGRAMS = 4096

Data = tuple[TensorDataset, TensorDataset]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """One network with one optimizer, and how it is trained at all sizes.

    Attributes:
        workload: With the customary rate and, as ``lr_batch_size``, the size at which it is customary.
        sizes: Batch sizes, ascending.
        epochs: Of every training.
        evaluations: In an epoch.
        decay: (epoch, factor): from then on the rate is so many times what it was; none keeps it.
        regimes: What is done with the rate at other sizes: nothing, or what the optimizer's family does.
    """

    workload: rb.Workload
    sizes: tuple[int, ...]
    epochs: int
    evaluations: int
    decay: tuple[float, float] | None = None
    regimes: tuple[Literal["fixed", "coupled"], ...] = ("fixed", "coupled")


def digits_cnn() -> Ladder:
    """Two convolutions on 1,200 digits; Adadelta has no rule, so its default rate stays."""
    workload = _workload("digits/tiny-cnn/adadelta", lambda: DigitsNet(8), _digits(), "Adadelta", lr=1.0, tuned_at=32)
    return Ladder(workload=workload, sizes=_doubled(4, 8), epochs=30, evaluations=1, regimes=("fixed",))


def digits_mlp() -> Ladder:
    """Two linear layers on 1,200 digits; RMSprop."""

    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    workload = _workload("digits/mlp/rmsprop", net, _digits(), "RMSprop", lr=1e-3, tuned_at=16)
    return Ladder(workload=workload, sizes=_doubled(4, 8), epochs=30, evaluations=1)


def fashion_cnn() -> Ladder:
    """Two convolutions on 8,000 pictures of clothes; SGD with momentum."""

    def net(width: int = 8) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * width * 3 * 3, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    workload = _workload("fashion-mnist/cnn/sgd", net, _fashion(), "SGD", lr=0.02, tuned_at=32, momentum=0.9)
    return Ladder(workload=workload, sizes=_doubled(16, 7), epochs=6, evaluations=4)


def fashion_mlp() -> Ladder:
    """Three linear layers on 8,000 pictures of clothes; Adam at its default rate."""

    def net(width: int = 64) -> nn.Module:
        layers = (nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        return nn.Sequential(nn.Flatten(), *layers)

    workload = _workload("fashion-mnist/deep-mlp/adam", net, _fashion(), "Adam", lr=1e-3, tuned_at=64)
    return Ladder(workload=workload, sizes=_doubled(8, 8), epochs=12, evaluations=1)


def cifar_sgd(data: str) -> Ladder:
    """Three convolutions with BatchNorm on 5,000 pictures; SGD with momentum, a tenth of the rate for the last third."""
    workload = _workload("cifar10/bn-cnn/sgd", _bn_cnn, _cifar(data), "SGD", lr=0.05, tuned_at=128, momentum=0.9)
    return Ladder(workload=workload, sizes=_doubled(16, 7), epochs=6, evaluations=2, decay=(4, 0.1))


def cifar_adadelta(data: str) -> Ladder:
    """Three convolutions with BatchNorm on 5,000 pictures; Adadelta at its default rate."""
    workload = _workload("cifar10/bn-cnn/adadelta", _bn_cnn, _cifar(data), "Adadelta", lr=1.0, tuned_at=128)
    return Ladder(workload=workload, sizes=_doubled(16, 7), epochs=10, evaluations=1, regimes=("fixed",))


def characters_gru() -> Ladder:
    """The next character of Python source, by a GRU; AdamW."""

    class Gru(nn.Module):
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.embedding, self.gru = nn.Embedding(CHARACTERS, 32), nn.GRU(32, width, batch_first=True)
            self.head = nn.Linear(width, CHARACTERS)

        def forward(self, characters: Tensor) -> Tensor:
            return self.head(self.gru(self.embedding(characters))[0]).transpose(1, 2)

    workload = _workload("python/gru/adamw", Gru, _characters(), "AdamW", lr=2e-3, tuned_at=32)
    return Ladder(workload=workload, sizes=_doubled(16, 7), epochs=5, evaluations=2)


def lines_transformer() -> Ladder:
    """Which module a line of Python source is from, by one layer of attention over its first 16 characters; Adam."""

    class Transformer(nn.Module):
        def __init__(self, width: int = 32, length: int = 16) -> None:
            super().__init__()
            self.embedding = nn.Embedding(CHARACTERS, width)
            self.position = nn.Parameter(0.02 * torch.randn(length, width))
            self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
            self.head = nn.Linear(width, MODULES)

        def forward(self, characters: Tensor) -> Tensor:
            return self.head(self.layer(self.embedding(characters[:, : len(self.position)]) + self.position).mean(dim=1))

    workload = _workload("python-lines/transformer/adam", Transformer, _lines(_codes), "Adam", lr=1e-3, tuned_at=32)
    return Ladder(workload=workload, sizes=_doubled(16, 7), epochs=6, evaluations=1)


def lines_bag() -> Ladder:
    """Which module a line of Python source is from, by the mean of the embeddings of its trigrams; Adagrad."""

    class Bag(nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.embedding = nn.Embedding(TRIGRAMS, width)
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, MODULES))

        def forward(self, trigrams: Tensor) -> Tensor:
            return self.head(self.embedding(trigrams).mean(dim=1))

    workload = _workload("python-lines/bag/adagrad", Bag, _lines(_trigrams), "Adagrad", lr=0.03, tuned_at=64)
    return Ladder(workload=workload, sizes=_doubled(8, 8), epochs=16, evaluations=1)


def ratings() -> Ladder:
    """Whether a user likes an item: the product of their embeddings, on planted tastes; Adam."""

    class Tastes(nn.Module):
        def __init__(self, width: int = 8, users: int = 400, items: int = 200) -> None:
            super().__init__()
            self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
            for table in (self.users, self.items):
                nn.init.normal_(table.weight, std=0.3)

        def forward(self, pairs: Tensor) -> Tensor:
            liking = (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(dim=1)
            return torch.stack([-liking, liking], dim=1)

    workload = _workload("planted-ratings/embeddings/adam", Tastes, _tastes(), "Adam", lr=3e-2, tuned_at=128)
    return Ladder(workload=workload, sizes=_doubled(16, 8), epochs=10, evaluations=2)


LADDERS: dict[str, Callable[..., Ladder]] = {
    function.__name__: function
    for function in (digits_cnn, digits_mlp, fashion_cnn, fashion_mlp, characters_gru, lines_transformer, lines_bag, ratings)
}
NEED_DATA: dict[str, Callable[[str], Ladder]] = {function.__name__: function for function in (cifar_sgd, cifar_adadelta)}
"""Those that take the path of CIFAR-10."""
MODULES = 16
"""The largest files of the library, whose lines are told apart."""
_LINES, _SHORTEST = 7_500, 12
_HELD_OUT = 1_500


def _workload(
    name: str, net: Callable[[], nn.Module], data: Data, optimizer: str, *, lr: float, tuned_at: int, **options: float
) -> rb.Workload:
    build = getattr(torch.optim, optimizer)
    return rb.Workload(
        name=name,
        model=net,
        train=data[0],
        valid=data[1],
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: build(params, lr=lr, **options),
        lr_batch_size=tuned_at,
        metric=accuracy,
        num_workers=0,
    )


def _doubled(smallest: int, count: int) -> tuple[int, ...]:
    return tuple(smallest * 2**power for power in range(count))


def _bn_cnn(width: int = 16) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 4 * 4, 10))


def _split(inputs: Tensor, targets: Tensor, held_out: int) -> Data:
    """Shuffle once, with a fixed seed; the last ``held_out`` samples validate."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, valid = order[:-held_out], order[-held_out:]
    return TensorDataset(inputs[train], targets[train]), TensorDataset(inputs[valid], targets[valid])


def _digits() -> Data:
    images, labels = load_digits(return_X_y=True)
    return _split(torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels), 597)


def _fashion() -> Data:
    return held(FashionMnist(FASHION_MNIST, "train"), 8_000), held(FashionMnist(FASHION_MNIST, "t10k"), 1_500)


def _cifar(data: str) -> Data:
    return held(Cifar10(data, "train"), 5_000), held(Cifar10(data, "test"), 1_000)


def _sources() -> list[str]:
    """The largest modules of the standard library, the largest first."""
    files = sorted(LIBRARY.glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))[:MODULES]
    return [path.read_text(encoding="utf-8") for path in files]


def _codes(text: str) -> list[int]:
    return [ord(one) - 31 if 31 < ord(one) < 127 else 0 for one in text]


def _characters(length: int = 33, count: int = 5_500) -> Data:
    codes = torch.tensor(_codes("".join(_sources())))
    pieces = codes[: len(codes) // length * length].reshape(-1, length)[:: max(1, len(codes) // length // count)][:count]
    return _split(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous(), _HELD_OUT)


def _lines(encode: Callable[[str], list[int]], length: int = 32) -> Data:
    """So many lines of every module, cut or filled with zeros to one length."""
    rows, labels = [], []
    for label, source in enumerate(_sources()):
        lines = [line.strip() for line in source.splitlines() if len(line.strip()) >= _SHORTEST]
        for line in lines[: _LINES // MODULES]:
            codes = encode(line)[:length]
            rows.append(codes + [0] * (length - len(codes)))
            labels.append(label)
    return _split(torch.tensor(rows), torch.tensor(labels), _HELD_OUT)


def _trigrams(line: str) -> list[int]:
    codes = _codes(line)
    return [(one * 97 * 97 + two * 97 + three) % TRIGRAMS for one, two, three in zip(codes, codes[1:], codes[2:], strict=False)]


def _tastes(users: int = 400, items: int = 200, rank: int = 3, pairs: int = 11_500) -> Data:
    """Likes drawn from a logistic model of low rank."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(users, rank, generator=generator), torch.randn(items, rank, generator=generator)
    chosen = torch.stack([torch.randint(users, (pairs,), generator=generator), torch.randint(items, (pairs,), generator=generator)], dim=1)
    logits = 2 * (left[chosen[:, 0]] * right[chosen[:, 1]]).sum(dim=1)
    likes = torch.rand(pairs, generator=generator) < torch.sigmoid(logits)
    return _split(chosen, likes.long(), _HELD_OUT)
