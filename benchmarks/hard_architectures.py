"""Workloads whose memory is hard to predict: kernels that change with the size, pages, pairs and triples of samples, sparse gradients.

Every public function without arguments returns a ``rightbatch.Workload``; the last few have no law at all, because their shapes depend on
the samples or on random numbers.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import rightbatch as rb

CLASSES = 10
SIDE = 16
WORDS = 64
STEPS = 16
FEATURES = 8
SYMBOLS = 12


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _images(count: int = 64) -> list[tuple[Tensor, int]]:
    generator = _generator()
    return [(torch.randn(3, SIDE, SIDE, generator=generator), index % CLASSES) for index in range(count)]


def _sequences(count: int = 64, steps: int = STEPS) -> list[tuple[Tensor, int]]:
    generator = _generator()
    return [(torch.randn(steps, FEATURES, generator=generator), index % CLASSES) for index in range(count)]


def _texts(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    texts = torch.randint(WORDS, (count, STEPS + 1), generator=_generator())
    return [(text[:-1].clone(), text[-1].clone()) for text in texts]


def _momentum(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16))


def _on_images(step) -> rb.Workload:
    return rb.Workload(model=_encoder, train=_images(), step=step, optimizer=_momentum, couples_samples=True)


class _Last(nn.Module):
    """A recurrent network that classifies by its last step."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.rnn = kind(FEATURES, 20, **options)
        self.head = nn.LazyLinear(CLASSES)
        with torch.no_grad():
            self(torch.zeros(2, STEPS, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def _recurrent(kind: type[nn.RNNBase], precision: str = "fp32", **options: object) -> rb.Workload:
    def build() -> nn.Module:
        return _Last(kind, **options)

    return rb.Workload(model=build, train=_sequences(), loss=F.cross_entropy, optimizer=_momentum, precision=precision)


def bidirectional_lstm() -> rb.Workload:
    return _recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)


def lstm_over_the_batch() -> rb.Workload:
    """A common slip: without ``batch_first`` the layer runs over the samples, one after another."""
    return _recurrent(nn.LSTM)


def lstm_in_bf16() -> rb.Workload:
    return _recurrent(nn.LSTM, precision="bf16", batch_first=True)


def projected_lstm() -> rb.Workload:
    return _recurrent(nn.LSTM, batch_first=True, proj_size=6)


def bidirectional_gru() -> rb.Workload:
    return _recurrent(nn.GRU, bidirectional=True, batch_first=True)


class _Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 16))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.encoder(x), self.prototypes)


def prototypes() -> rb.Workload:
    """``cdist`` takes another kernel above 25 rows."""
    return rb.Workload(model=_Prototypes, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def pairwise_distances() -> rb.Workload:
    def step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        codes, same = model(batch[0]), batch[1][:, None] == batch[1]
        distances = torch.cdist(codes, codes)
        return torch.where(same, distances, F.relu(1 - distances)).mean(), len(codes)

    return _on_images(step)


def all_triplets() -> rb.Workload:
    """Cubic: every anchor with every positive and every negative."""

    def step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        codes = model(batch[0])
        distances = (codes[:, None] - codes).square().sum(-1)
        return F.relu(distances[:, :, None] - distances[:, None] + 0.2).mean(), len(codes)

    return _on_images(step)


def pairs_above_the_diagonal() -> rb.Workload:
    def step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        codes = model(batch[0])
        left, right = torch.triu_indices(len(codes), len(codes), 1)
        return (codes[left] * codes[right]).sum() / len(codes) + F.pdist(codes).sum(), len(codes)

    return _on_images(step)


def hardest_half() -> rb.Workload:
    def step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses.topk(max(1, len(losses) // 2)).values.mean(), len(losses)

    return _on_images(step)


def singular_values() -> rb.Workload:
    """The shapes of a decomposition change where the batch outgrows the code."""

    def step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        codes = model(batch[0])
        gram = codes @ codes.T + torch.eye(len(codes))
        return torch.linalg.svdvals(codes).sum() + torch.logdet(gram) / len(codes), len(codes)

    return _on_images(step)


def attention_over_the_batch() -> rb.Workload:
    """A common slip: without ``batch_first`` every sample attends to the others."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen, self.head = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.widen(x)).mean(1))

    return rb.Workload(model=Encoder, train=_sequences(), loss=F.cross_entropy, optimizer=_momentum, couples_samples=True)


def padded_transformer() -> rb.Workload:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widen, self.head = nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.widen(x), src_key_padding_mask=x[:, :, 0] > 1.5).mean(1))

    return rb.Workload(model=Encoder, train=_sequences(), loss=F.cross_entropy, optimizer=torch.optim.AdamW)


class _Transcriber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(FEATURES, SYMBOLS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).permute(2, 0, 1).log_softmax(-1)


def ctc() -> rb.Workload:
    train = [(x, torch.randint(1, SYMBOLS, (5,))) for x, _ in _sequences()]

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        count = scores.shape[1]
        return F.ctc_loss(scores, target, torch.full((count,), STEPS), torch.full((count,), 5))

    return rb.Workload(model=_Transcriber, train=train, loss=loss, optimizer=_momentum)


class _Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 16, sparse=sparse)

    def forward(self, text: Tensor) -> Tensor:
        return self.embed(text).mean(1)


def sparse_gradients() -> rb.Workload:
    train = [(text, target % 16) for text, target in _texts()]

    def optimizer(parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    return rb.Workload(model=lambda: _Words(sparse=True), train=train, loss=F.cross_entropy, optimizer=optimizer)


def bag_of_words() -> rb.Workload:
    def build() -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(WORDS, 16, mode="max"), nn.Linear(16, WORDS))

    return rb.Workload(model=build, train=_texts(), loss=F.cross_entropy, optimizer=_momentum)


def parametrized() -> rb.Workload:
    def build() -> nn.Module:
        first = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        second = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, stride=3))
        return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), parametrizations.orthogonal(nn.Linear(128, CLASSES)))

    return rb.Workload(model=build, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def volumes() -> rb.Workload:
    train = [(image.view(3, 4, 8, 8), label) for image, label in _images()]

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv3d(3, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.PReLU(), nn.Conv3d(8, 8, 3, groups=2), nn.GroupNorm(2, 8),
            nn.ConvTranspose3d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(2304, CLASSES),
        )  # fmt: skip

    return rb.Workload(model=build, train=train, loss=F.cross_entropy, optimizer=_momentum)


def resampled() -> rb.Workload:
    class Resampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            wide = F.interpolate(F.interpolate(self.mix(x), scale_factor=1.5, mode="bicubic"), size=(9, 9), mode="area")
            return self.head(F.grid_sample(wide, torch.rand(len(x), 5, 5, 2), align_corners=False).mean((2, 3)))

    return rb.Workload(model=Resampling, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def spectral() -> rb.Workload:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = (
                nn.Parameter(torch.randn(3, SIDE, SIDE // 2 + 1, dtype=torch.cfloat)),
                nn.Linear(3 * SIDE * SIDE, CLASSES),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.fft.irfft2(torch.fft.rfft2(x) * self.weight).flatten(1))

    return rb.Workload(model=Spectral, train=_images(), loss=F.cross_entropy, optimizer=_momentum)


def gradient_penalty() -> rb.Workload:
    def step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        images = batch[0].clone().requires_grad_()
        scores = model(images)
        (slope,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        return F.cross_entropy(scores, batch[1]) + (slope.flatten(1).norm(dim=1) - 1).square().mean(), len(images)

    return _on_images(step)


def recomputed_in_bf16() -> rb.Workload:
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, CLASSES)
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(8, 8, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, self.stem(x), use_reentrant=True).mean((2, 3)))

    return rb.Workload(model=Recomputing, train=_images(), loss=F.cross_entropy, optimizer=_momentum, precision="bf16", channels_last=True)


def reads_its_loss() -> rb.Workload:
    def step(model: nn.Module, batch: list[Tensor]) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses if losses.mean().item() < 1e9 else losses / 2

    return _on_images(step)


def sparse_adam() -> rb.Workload:
    """No law: as many rows as there are different words."""
    train = [(text, target % 16) for text, target in _texts()]

    def optimizer(parameters) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(list(parameters))

    return rb.Workload(model=lambda: _Words(sparse=True), train=train, loss=F.cross_entropy, optimizer=optimizer)


def packed_texts() -> rb.Workload:
    """No law: as many rows as the texts are long."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(WORDS, 8), nn.LSTM(8, WORDS, batch_first=True)

        def forward(self, text: Tensor) -> Tensor:
            lengths = 1 + text[:, 0] % STEPS
            packed = nn.utils.rnn.pack_padded_sequence(self.embed(text), lengths.cpu(), batch_first=True, enforce_sorted=False)
            return self.rnn(packed)[1][0][-1]

    return rb.Workload(model=Packed, train=_texts(), loss=F.cross_entropy, optimizer=_momentum)


def chosen_samples() -> rb.Workload:
    """No law: only some classes count."""

    def step(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, int]:
        counted = batch[1] > 2
        return F.cross_entropy(model(batch[0])[counted], batch[1][counted], reduction="sum") / len(counted), len(counted)

    return _on_images(step)


def stochastic_depth() -> rb.Workload:
    """No law: layers are left out at random."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(768, 64)), nn.Linear(64, CLASSES)
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = x + F.relu(layer(x)) if torch.rand(()) < 0.7 else x
            return self.head(x)

    return rb.Workload(model=Deep, train=_images(), loss=F.cross_entropy, optimizer=_momentum)
