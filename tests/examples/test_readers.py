"""The examples read their data formats exactly, refuse what they do not know, and stay short enough to teach."""

import gzip
import importlib.util
import io
import pickle
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cifar10() -> ModuleType:
    return load_example("cifar10")


@pytest.fixture
def fashion_mnist() -> ModuleType:
    return load_example("fashion_mnist")


@pytest.fixture
def pictures() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two pictures and labels for every file of CIFAR-10."""
    rng = np.random.default_rng(0)
    names = (*TRAIN_FILES, "test_batch")
    return {
        name: (rng.integers(0, 256, size=(2, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, size=2, dtype=np.uint8)) for name in names
    }


def binary_file(images: np.ndarray, labels: np.ndarray) -> bytes:
    return np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1).tobytes()


def python2_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Pickle as Python 2 and numpy 1 did: 8-bit strings, flags of the dtype as integers, and the old name of numpy's core."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    rows = images.reshape(len(images), -1)
    shape = b"(" + b"".join(b"J" + size.to_bytes(4, "little") for size in rows.shape) + b"t"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    array += b"(K\x01" + shape + dtype + b"I00\n" + text(rows.tobytes()) + b"tb"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu."


def normalised(image: np.ndarray) -> torch.Tensor:
    """ToTensor, then Normalize with mean and deviation 0.5, written out."""
    return torch.from_numpy((image.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5))


def assert_holds(dataset: torch.utils.data.Dataset, pictures: dict[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, ...]) -> None:
    images = np.concatenate([pictures[name][0] for name in names])
    labels = np.concatenate([pictures[name][1] for name in names])
    assert len(dataset) == len(images)
    for index in range(len(images)):
        image, label = dataset[index]
        torch.testing.assert_close(image, normalised(images[index]), rtol=0, atol=1e-6)
        assert label == labels[index]


def test_cifar10_reads_the_binary_folder(cifar10, pictures, tmp_path):
    for name, (images, labels) in pictures.items():
        (tmp_path / f"{name}.bin").write_bytes(binary_file(images, labels))

    assert_holds(cifar10.Cifar10(str(tmp_path), "train"), pictures, TRAIN_FILES)
    assert_holds(cifar10.Cifar10(str(tmp_path), "test"), pictures, ("test_batch",))


def test_cifar10_reads_the_binary_archive(cifar10, pictures, tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, (images, labels) in pictures.items():
            content = binary_file(images, labels)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    assert_holds(cifar10.Cifar10(str(path), "train"), pictures, TRAIN_FILES)
    assert_holds(cifar10.Cifar10(str(path), "test"), pictures, ("test_batch",))


def test_cifar10_reads_pickles_of_python_2(cifar10, pictures, tmp_path):
    for name, (images, labels) in pictures.items():
        (tmp_path / name).write_bytes(python2_pickle(images, labels))

    assert_holds(cifar10.Cifar10(str(tmp_path), "train"), pictures, TRAIN_FILES)
    assert_holds(cifar10.Cifar10(str(tmp_path), "test"), pictures, ("test_batch",))


def test_cifar10_reads_pickles_of_today(cifar10, pictures, tmp_path):
    for name, (images, labels) in pictures.items():
        (tmp_path / name).write_bytes(pickle.dumps({"data": images.reshape(2, -1), "labels": labels.tolist()}, protocol=4))

    assert_holds(cifar10.Cifar10(str(tmp_path), "train"), pictures, TRAIN_FILES)


def test_cifar10_refuses_a_pickle_that_calls_anything_else(cifar10, tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "test_batch").write_bytes(b"cos\nmkdir\n(V" + str(marker).encode() + b"\ntR.")

    with pytest.raises(pickle.UnpicklingError, match=r"numpy arrays only; this one asks for os\.mkdir"):
        cifar10.Cifar10(str(tmp_path), "test")

    assert not marker.exists()


def test_cifar10_without_a_file_says_that_its_images_are_random(cifar10):
    with pytest.warns(UserWarning, match="random images.* noise and learning rate mean nothing"):
        workload = cifar10.workload()

    assert workload.name == "random data"
    assert (len(workload.train), len(workload.valid)) == (50_000, 10_000)
    image, label = workload.train[49_999]
    assert image.shape == (3, 32, 32)
    assert -1 <= float(image.min()) < -0.9 < 0.9 < float(image.max()) <= 1
    assert {workload.train[index][1] for index in range(200)} == set(range(10))
    assert isinstance(label, int)


def test_cifar10_refuses_a_path_that_is_not_there(cifar10):
    with pytest.raises(FileNotFoundError, match=r"--data must name one of the forms of CIFAR-10 .*; got 'missing'"):
        cifar10.workload(data="missing")


def test_cifar10_decodes_jpegs_of_an_npz(cifar10, tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    colours = np.array([[200, 30, 60], [10, 120, 240], [90, 90, 90]], dtype=np.uint8)
    files = []
    for colour in colours:
        buffer = io.BytesIO()
        image_module.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    np.savez(
        tmp_path / "tiny.npz",
        train_jpeg=np.frombuffer(b"".join(files), dtype=np.uint8),
        train_offsets=np.cumsum([0, *map(len, files)]),
        train_labels=np.array([3, 1, 2], dtype=np.uint8),
    )

    dataset = cifar10.Cifar10(str(tmp_path / "tiny.npz"), "train")

    assert len(dataset) == 3
    for index, (colour, label) in enumerate(zip(colours, (3, 1, 2), strict=True)):
        image, read_label = dataset[index]
        assert read_label == label
        assert image.shape == (3, 32, 32)
        expected = normalised(np.broadcast_to(colour[:, None, None], (3, 32, 32)))
        torch.testing.assert_close(image, expected, rtol=0, atol=2 * 3 / 255)  # JPEG moves a flat colour by at most 3 of 255 here


@pytest.mark.parametrize("name", ["absent", "empty", "notes.txt"])
def test_cifar10_says_what_it_can_read(cifar10, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a data set")

    with pytest.raises(FileNotFoundError, match=f"--data must name one of the forms of CIFAR-10.*got '.*{name}'"):
        cifar10.Cifar10(str(tmp_path / name), "train")


def test_cifar10_workload_is_the_classic_baseline(cifar10, pictures, tmp_path):
    for name, (images, labels) in pictures.items():
        (tmp_path / f"{name}.bin").write_bytes(binary_file(images, labels))

    workload = cifar10.workload(data=str(tmp_path), width=4)

    assert workload.lr_batch_size == 128
    assert workload.num_workers == 2
    weights = [parameter.shape[0] for parameter in workload.model().parameters() if parameter.ndim > 1]
    assert weights == [4, 8, 16, 128, 10]


def write_fashion_mnist(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for part in ("train", "t10k"):
        image_header = b"\x00\x00\x08\x03" + b"".join(size.to_bytes(4, "big") for size in images.shape)
        label_header = b"\x00\x00\x08\x01" + len(labels).to_bytes(4, "big")
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(image_header + images.tobytes()))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(label_header + labels.tobytes()))


def test_fashion_mnist_reads_gzipped_idx_files(fashion_mnist, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(3, 28, 28), dtype=np.uint8)
    write_fashion_mnist(tmp_path, images, np.array([9, 0, 4], dtype=np.uint8))

    workload = fashion_mnist.workload(data=str(tmp_path))

    assert len(workload.train) == len(workload.valid) == 3
    for index, label in enumerate((9, 0, 4)):
        image, read_label = workload.train[index]
        torch.testing.assert_close(image, torch.tensor(images[index], dtype=torch.float32)[None] / 255)
        assert read_label == label


def test_fashion_mnist_refuses_a_file_that_is_not_idx(fashion_mnist, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"<html>not found</html>"))

    with pytest.raises(ValueError, match=r"starts with 0, 0, 8; .* starts with \[60, 104, 116\]"):
        fashion_mnist.read_idx(path)


def test_text_pads_lines_to_the_longest_of_the_batch():
    text = load_example("text")

    lines, labels = text.pad([(torch.tensor([65, 66, 67]), 2), (torch.tensor([68]), 5)])

    assert lines.tolist() == [[65, 66, 67], [68, 0, 0]]
    assert labels.tolist() == [2, 5]


def test_text_model_ignores_padding():
    torch.manual_seed(0)
    net = load_example("text").Net(width=8)
    line = torch.tensor([[65, 66, 67]])

    padded = torch.nn.functional.pad(line, (0, 4))

    torch.testing.assert_close(net(padded), net(line))


def test_text_has_the_same_lines_every_time():
    text = load_example("text")

    first, second = text.labelled_lines(), text.labelled_lines()

    assert len(first) == len(second)
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, second, strict=True))
    assert {label for _, label in first} == set(range(len(text.MODULES)))
    assert len({len(line) for line, _ in first}) > 10  # the lengths really vary


def test_digits_are_split_without_loss():
    workload = load_example("digits").workload()

    assert (len(workload.train), len(workload.valid)) == (1437, 360)
    images = workload.train.tensors[0]
    assert images.shape[1:] == (1, 8, 8)
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "text"])
def test_a_training_step_of_the_example_lowers_its_loss(name, pictures, tmp_path):
    for file, (images, labels) in pictures.items():
        (tmp_path / f"{file}.bin").write_bytes(binary_file(images, labels))
    write_fashion_mnist(
        tmp_path, np.random.default_rng(0).integers(0, 256, size=(3, 28, 28), dtype=np.uint8), np.array([9, 0, 4], dtype=np.uint8)
    )
    module = load_example(name)
    torch.manual_seed(0)

    workload = module.workload() if name in {"digits", "text"} else module.workload(data=str(tmp_path))
    collate = workload.collate_fn or torch.utils.data.default_collate
    inputs, targets = collate([workload.train[index] for index in range(3)])
    model = workload.model()
    optimizer = workload.optimizer(model.parameters())
    losses = []
    for _ in range(5):
        loss = workload.loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert 0.0 <= workload.metric(model(inputs), targets) <= 1.0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_enough_to_teach(path):
    lines = path.read_text(encoding="utf-8").splitlines()

    assert len(lines) < 80
    assert f"rightbatch find examples/{path.name}:workload" in "\n".join(lines[:5])
