"""CIFAR-10 and the classic CNN: three 3 x 3 convolutions, two linear layers, inputs from -1 to 1.

Run: rightbatch find examples/cifar10.py:workload -- --data PATH
PATH: torchvision's folder `cifar-10-batches-py`, the original `cifar-10-batches-bin` or `cifar-10-binary.tar.gz`, or (needs Pillow) an .npz
with {train,test}_jpeg (joined JPEG files), {train,test}_offsets and {train,test}_labels. Without it: random images, for memory and speed.
"""

import io
import pickle
import tarfile
import warnings
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from torch import Tensor, nn, optim, tensor, utils

import rightbatch as rb


class Net(nn.Sequential):
    def __init__(self, width: int) -> None:
        blocks = [(nn.Conv2d(m, n, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for m, n in pairwise((3, width, 2 * width, 4 * width))]
        super().__init__(*chain(*blocks), nn.Flatten(), nn.Linear(64 * width, 128), nn.ReLU(), nn.Linear(128, 10))


class ArraysOnly(pickle.Unpickler):  # a pickle may run any code; a CIFAR-10 batch needs three names
    def find_class(self, module: str, name: str) -> object:
        names = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": lambda code, *_: np.dtype(code, copy=True)}
        if module.partition(".")[0] != "numpy" or name not in names:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch holds numpy arrays only; this one asks for {module}.{name}. Do not trust it.")
        return names[name]


class Cifar10(utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, data: str, part: str) -> None:
        path, names = Path(data), [f"data_batch_{i}" for i in range(1, 6)] if part == "train" else ["test_batch"]
        if data == "random":
            warnings.warn("no --data: random images. Memory and speed are CIFAR-10's; noise and learning rate mean nothing.", stacklevel=2)
            self.images = np.random.default_rng(0).integers(0, 256, (500, 3072), np.uint8)  # so few serve all: no matter which
            self.labels = np.arange(50_000 if part == "train" else 10_000) % 10
        elif path.suffix == ".npz":
            arrays = np.load(path)
            jpeg, self.labels = arrays[f"{part}_jpeg"].tobytes(), arrays[f"{part}_labels"]
            self.images = [jpeg[start:end] for start, end in pairwise(arrays[f"{part}_offsets"])]
        elif (path / names[0]).is_file():
            batches = [ArraysOnly(io.BytesIO((path / name).read_bytes()), encoding="latin1").load() for name in names]
            self.images, self.labels = (np.concatenate([batch[key] for batch in batches]) for key in ("data", "labels"))
        elif path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                self.use_records([archive.extractfile(f"cifar-10-batches-bin/{name}.bin").read() for name in names])
        elif (path / f"{names[0]}.bin").is_file():
            self.use_records([(path / f"{name}.bin").read_bytes() for name in names])
        else:
            raise FileNotFoundError(f"--data must name one of the forms of CIFAR-10 listed on top of {__file__}; got {data!r}.")

    def use_records(self, files: list[bytes]) -> None:
        records = np.frombuffer(b"".join(files), dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # a label, then red, green, blue
        self.images, self.labels = records[:, 1:], records[:, 0]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index % len(self.images)]
        if isinstance(image, bytes):
            import PIL.Image  # fmt: skip  # decoding on demand is the loader's real work

            image = np.asarray(PIL.Image.open(io.BytesIO(image)).convert("RGB")).transpose(2, 0, 1)
        return (tensor(image).reshape(3, 32, 32) / 255 - 0.5) / 0.5, int(self.labels[index])  # ToTensor, then Normalize(0.5, 0.5)


def workload(width: int = 32, data: str = "random") -> rb.Workload:
    """The classic CNN on CIFAR-10."""
    return rb.Workload(
        model=lambda: Net(width), train=Cifar10(data, "train"), valid=Cifar10(data, "test"), loss=nn.functional.cross_entropy,
        optimizer=lambda params: optim.SGD(params, lr=0.05, momentum=0.9), lr_batch_size=128, num_workers=2,
        metric=lambda scores, labels: (scores.argmax(1) == labels).float().mean().item(), name="random data" if data == "random" else None,
    )  # fmt: skip
