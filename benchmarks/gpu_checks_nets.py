"""The networks that the GPU checks run, at any scale, on synthetic images or on CIFAR-10."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import rightbatch as rb

CLASSES = 10
_DISTINCT_IMAGES = 64
_CIFAR10 = Path(__file__).resolve().parents[1] / "examples" / "cifar10.py"


class Images:
    """As many images as are asked for, of which 64 differ: size and speed need no more, and no file."""

    def __init__(self, side: int, count: int = 100_000) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = list(torch.randn(_DISTINCT_IMAGES, 3, side, side, generator=generator).unbind())
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index % _DISTINCT_IMAGES], index % CLASSES


class NoisyImages:
    """Images whose class can be learnt: each is the class's own image with noise of its own, drawn from its index."""

    def __init__(self, side: int, count: int) -> None:
        self._centres = torch.randn(CLASSES, 3, side, side, generator=torch.Generator().manual_seed(1))
        self._side, self._count = side, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % CLASSES
        noise = torch.randn(3, self._side, self._side, generator=torch.Generator().manual_seed(index))
        return self._centres[label] * 0.3 + noise, label


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, stride=stride, groups=groups),
            nn.Conv2d(outputs, outputs, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.skip(x) + self.body(x))


class _Inverted(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.hidden = nn.Sequential(_conv(channels, wide, kernel=1), _conv(wide, wide, groups=wide))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, channels, 1), nn.SiLU(), nn.Conv2d(channels, wide, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return x + self.project(hidden * self.gate(hidden))


class _Dense(nn.Module):
    def __init__(self, channels: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_conv(channels + index * growth, growth) for index in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class _UNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.bottom = _conv(3, width), _conv(width, 2 * width)
        self.rise, self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2), _conv(2 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.down(x)
        risen = self.rise(self.bottom(nn.functional.max_pool2d(outer, 2)))
        return self.head(self.up(torch.cat([outer, risen], 1))).mean((2, 3))


def _vgg(width: int, side: int) -> nn.Module:
    blocks = [_conv(3, width), _conv(width, width), nn.MaxPool2d(2), _conv(width, 2 * width), nn.MaxPool2d(2)]
    hidden = 2 * width * (side // 4) ** 2
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(hidden, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, CLASSES))


def smooth_net(width: int, side: int) -> nn.Module:
    """A plain network without normalisation or dropout: its gradient is a function of the batch alone."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * (side // 4) ** 2, CLASSES))


def _residual(width: int, groups: int = 1) -> nn.Module:
    return nn.Sequential(_conv(3, width), _Residual(width, width, groups=groups), _Residual(width, 2 * width, 2, groups), _head(2 * width))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem without pooling, and four stages of two blocks (He et al. 2015, section 4.2)."""
    layers: list[nn.Module] = [_conv(3, width)]
    channels = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [_Residual(channels, outputs, 1 if stage == 0 else 2), _Residual(outputs, outputs)]
        channels = outputs
    return nn.Sequential(*layers, _head(channels))


def _momentum(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def _chain(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(*blocks)


def networks(side: int, width: int) -> dict[str, Callable[[], rb.Workload]]:
    """Return functions that make workloads, by name: convolutional networks of eleven kinds, at most one step of each."""

    def make(build: Callable[[], nn.Module], optimizer=_momentum, **options) -> Callable[[], rb.Workload]:
        return partial(_workload, build, side, optimizer, **options)

    return {
        "vgg": make(partial(_vgg, width, side)),
        "residual": make(partial(_residual, width)),
        "resnext": make(partial(_residual, width, 4), _adam),
        "wide": make(lambda: _chain(_conv(3, 2 * width), _Residual(2 * width, 2 * width), _head(2 * width))),
        "mobile": make(lambda: _chain(_conv(3, width, stride=2), _Inverted(width), _Inverted(width), _head(width)), _adam),
        "dense": make(lambda: _chain(_conv(3, width), _Dense(width, width // 2, 4), _head(3 * width))),
        "unet": make(partial(_UNet, width), _adam),
        "smooth": make(partial(smooth_net, width, side)),
        "resnet18": make(partial(resnet18, max(4, width // 2))),
        "residual, bf16": make(partial(_residual, width), precision="bf16"),
        "residual, channels last": make(partial(_residual, width), channels_last=True),
    }


def _workload(build: Callable[[], nn.Module], side: int, optimizer, **options) -> rb.Workload:
    return rb.Workload(model=build, train=Images(side), loss=nn.functional.cross_entropy, optimizer=optimizer, **options)


def learnable(side: int, width: int, count: int, **options) -> rb.Workload:
    """Return a network without normalisation on images that can be told apart."""
    return rb.Workload(
        model=partial(smooth_net, width, side),
        train=NoisyImages(side, count),
        loss=nn.functional.cross_entropy,
        optimizer=_momentum,
        **options,
    )


def cifar10_resnet18(width: int, count: int, data: str | None) -> rb.Workload:
    """Return ResNet-18 on CIFAR-10 from a file, in the forms that examples/cifar10.py reads, or on synthetic images of its shape."""
    if data is None:
        train, valid = NoisyImages(32, count), NoisyImages(32, max(64, count // 5))
    else:
        reader = _cifar10_reader()
        train, valid = reader.Cifar10(data, "train"), reader.Cifar10(data, "test")
    return rb.Workload(
        model=partial(resnet18, width),
        train=train,
        valid=valid,
        loss=nn.functional.cross_entropy,
        optimizer=_momentum,
        lr_batch_size=128,
        num_workers=2,
    )


def _cifar10_reader():
    spec = importlib.util.spec_from_file_location("cifar10", _CIFAR10)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Made:
    """A function that makes a workload, as a source for the tuner: it is called in the process that measures."""

    make: Callable[[], rb.Workload]
    name: str
    arguments: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        return f"gpu_suite:{self.name}"

    def load(self) -> rb.Workload:
        return self.make()

    def code_files(self) -> tuple[tuple[str, str], ...]:
        return ()

    def code_is_unchanged(self, files: tuple[tuple[str, str], ...]) -> bool:  # noqa: ARG002  # nothing is kept between runs
        return False
