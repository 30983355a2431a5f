"""Small networks of many kinds on synthetic data: what the memory benchmark and the tests of traces run on.

Every public function without arguments returns a ``rightbatch.Workload``.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import rightbatch as rb

CLASSES = 10
SIDE = 16
WORDS = 64
LENGTH = 24

ACCUMULATION_STEPS = {"accumulate4": 4}
"""Micro-batches a step of the workloads that accumulate; the others take one."""


def _images(channels: int = 3, count: int = 64) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(channels, SIDE, SIDE, generator=generator), index % CLASSES) for index in range(count)]


def _texts(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(WORDS, (count, LENGTH + 1), generator=generator)
    return [(text[:-1].clone(), text[1:].clone()) for text in texts]


def _momentum(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _conv_bn(inputs: int, outputs: int, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def _plain_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, CLASSES),
    )  # fmt: skip


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv_bn(inputs, outputs, stride=stride), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.skip = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.body(x))


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.SiLU(), nn.Conv2d(4, wide, 1), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.depthwise(self.expand(x))
        return x + self.project(hidden * self.squeeze(hidden))


class _DenseBlock(nn.Module):
    def __init__(self, channels: int, growth: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels + index * growth), nn.ReLU(), nn.Conv2d(channels + index * growth, growth, 3, padding=1, bias=False)
            )
            for index in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer_down, self.inner_down, self.bottom = _conv_bn(3, 8), _conv_bn(8, 16), _conv_bn(16, 32)
        self.inner_rise, self.outer_rise = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.inner_up, self.outer_up = _conv_bn(32, 16), _conv_bn(24, 8)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.outer_down(x)
        inner = self.inner_down(F.max_pool2d(outer, 2))
        bottom = self.bottom(F.max_pool2d(inner, 2))
        inner = self.inner_up(torch.cat([inner, self.inner_rise(bottom)], 1))
        return self.head(self.outer_up(torch.cat([outer, self.outer_rise(inner)], 1)))


class _ViT(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.places
        return self.head(self.encoder(tokens)[:, 0])


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.rnn = kind(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, WORDS)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(text))[0]).transpose(1, 2)


class _Tied(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.mix = nn.Conv1d(width, width, 3)
        self.decode = nn.Linear(width, WORDS, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, text: Tensor) -> Tensor:
        hidden = F.pad(self.embed(text).transpose(1, 2), (2, 0))
        return self.decode(F.gelu(self.mix(hidden)).transpose(1, 2)).transpose(1, 2)


class _TwoModes(nn.Module):
    """An image and a vector of measurements, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(_conv_bn(3, 8, stride=2), nn.Flatten())
        self.vector = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh())
        self.head = nn.Linear(8 * SIDE * SIDE // 4 + 16, CLASSES)

    def forward(self, named: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat([self.image(named["image"]), self.vector(named["vector"])], 1))


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(_conv_bn(3, 8, stride=2), _conv_bn(8, 16, stride=2), nn.Flatten(), nn.Linear(256, 16))
        self.head = nn.Linear(16, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.encoder(left) - self.encoder(right)).abs()).squeeze(1)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=1)


class _Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 16)
        self.blocks = nn.ModuleList(_Block(16, 16) for _ in range(3))
        self.head = _head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class _Attention(nn.Module):
    """Attention written out, with a causal mask, as many tutorials have it."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(WORDS, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, WORDS)
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).triu(1).bool())

    def forward(self, text: Tensor) -> Tensor:
        parts = self.qkv(self.embed(text)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (parts[0] @ parts[1].transpose(-1, -2)).masked_fill(self.mask, float("-inf")).softmax(-1)
        return self.out((scores @ parts[2]).transpose(1, 2).flatten(2)).transpose(1, 2)


class _Autoencoder(nn.Module):
    """A variational autoencoder: draws random numbers, and returns what its loss needs."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 64), nn.ELU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.ELU(), nn.Linear(64, 3 * SIDE * SIDE), nn.Sigmoid())

    def losses(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encode(x).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        rebuilt = F.mse_loss(self.decode(drawn), x.flatten(1), reduction="none").sum(1)
        return rebuilt - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)


def plain() -> rb.Workload:
    return rb.Workload(model=_plain_network, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def batch_norm() -> rb.Workload:
    def build() -> nn.Module:
        return nn.Sequential(_conv_bn(3, 8), _conv_bn(8, 16, stride=2), _conv_bn(16, 16), _head(16))

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=torch.optim.Adam)


def residual() -> rb.Workload:
    def build() -> nn.Module:
        return nn.Sequential(_conv_bn(3, 8), _Block(8, 8), _Block(8, 16, 2), _Block(16, 32, 2), _head(32))

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def depthwise() -> rb.Workload:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), _InvertedResidual(8), _InvertedResidual(8), _head(8))

    return rb.Workload(model=build, train=_images(), loss=nn.CrossEntropyLoss(label_smoothing=0.1), optimizer=_momentum)


def dense() -> rb.Workload:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), _DenseBlock(8, 4, 3), nn.AvgPool2d(2), _DenseBlock(20, 4, 3), _head(32))

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def unet() -> rb.Workload:
    train = [(image, torch.full((SIDE, SIDE), label)) for image, label in _images()]
    return rb.Workload(model=_UNet, train=train, loss=F.cross_entropy, optimizer=_adamw)


def vit() -> rb.Workload:
    return rb.Workload(model=_ViT, train=_images(), loss=F.cross_entropy, optimizer=_adamw)


def lstm() -> rb.Workload:
    return rb.Workload(model=lambda: _Recurrent(nn.LSTM), train=_texts(), loss=F.cross_entropy, optimizer=_adamw)


def gru() -> rb.Workload:
    return rb.Workload(model=lambda: _Recurrent(nn.GRU), train=_texts(), loss=F.cross_entropy, optimizer=_momentum, clip_norm=1.0)


def tied() -> rb.Workload:
    return rb.Workload(model=_Tied, train=_texts(), loss=F.cross_entropy, optimizer=_adamw)


def attention() -> rb.Workload:
    return rb.Workload(model=_Attention, train=_texts(), loss=F.cross_entropy)


def dict_input() -> rb.Workload:
    train = [{"image": image, "vector": torch.full((12,), float(label)), "label": label} for image, label in _images()]

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch), batch["label"], reduction="none")

    return rb.Workload(model=_TwoModes, train=train, step=step, optimizer=_momentum)


def siamese() -> rb.Workload:
    images = [image for image, _ in _images()]
    train = [(image, images[-index], torch.tensor(float(index % 2))) for index, image in enumerate(images)]
    return rb.Workload(model=_Pair, train=train, loss=F.binary_cross_entropy_with_logits, optimizer=_momentum)


def contrastive() -> rb.Workload:
    def step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        images = batch[0]
        similarity = model(images) @ model(images.flip(3)).T / 0.1
        return F.cross_entropy(similarity, torch.arange(len(images), device=images.device)), len(images)

    return rb.Workload(model=_Encoder, train=_images(), step=step, optimizer=_momentum, couples_samples=True)


def checkpointed() -> rb.Workload:
    return rb.Workload(model=_Recomputing, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def autocast() -> rb.Workload:
    def build() -> nn.Module:
        return nn.Sequential(
            _conv_bn(3, 8), _Block(8, 8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 32), nn.GELU(), nn.Linear(32, CLASSES)
        )

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=_adamw, precision="bf16")


def half_precision() -> rb.Workload:
    return rb.Workload(model=_plain_network, train=_images(), loss=F.cross_entropy, optimizer=_momentum, precision="fp16", clip_norm=1.0)


def double_precision() -> rb.Workload:
    return rb.Workload(model=_plain_network, train=_images(), loss=F.cross_entropy, optimizer=torch.optim.Adagrad, precision="fp64")


def channels_last() -> rb.Workload:
    def build() -> nn.Module:
        return nn.Sequential(_conv_bn(3, 8), _Block(8, 16, 2), _head(16))

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=torch.optim.RMSprop, channels_last=True)


def accumulate4() -> rb.Workload:
    def build() -> nn.Module:
        return nn.Sequential(_conv_bn(3, 8), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, CLASSES))

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def clip_and_average() -> rb.Workload:
    def average(model: nn.Module) -> nn.Module:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)

    def build() -> nn.Module:
        return nn.Sequential(_conv_bn(3, 8), nn.Flatten(), nn.Linear(8 * SIDE * SIDE, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=_adamw, clip_norm=0.5, average=average)


def frozen_backbone() -> rb.Workload:
    def build() -> nn.Module:
        backbone = nn.Sequential(_conv_bn(3, 16), _Block(16, 16)).requires_grad_(requires_grad=False)
        return nn.Sequential(backbone, _head(16))

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def variational() -> rb.Workload:
    def step(model: _Autoencoder, batch: list[Tensor]) -> Tensor:
        return model.losses(batch[0])

    return rb.Workload(model=_Autoencoder, train=_images(), step=step, optimizer=_adamw)


def summed_loss() -> rb.Workload:
    return rb.Workload(model=_plain_network, train=_images(), loss=nn.CrossEntropyLoss(reduction="sum"), optimizer=_momentum)
