"""Every example's workload through the whole of ``find``, as a user runs it, on data made here."""

import gzip
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FILES = {"run.json", "workload.json", "memory.json", "step_time.json", "loader.json", "gradient_noise.json", "findings.json", "report.html"}


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.tobytes(), compresslevel=1)


def fashion_mnist_data(folder: Path) -> Path:
    if FASHION_MNIST.is_dir():
        return FASHION_MNIST
    rng = np.random.default_rng(0)
    for part, size in (("train", 200), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(rng.integers(0, 10, size, dtype=np.uint8)))
    return folder


def cifar10_data(folder: Path) -> Path:
    image_module = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in (("train", 200), ("test", 20)):
        files = []
        for _ in range(size):
            stream = io.BytesIO()
            image_module.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "jpeg")
            files.append(stream.getvalue())
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = rng.integers(0, 10, size)
    np.savez(folder / "cifar10.npz", **arrays)
    return folder / "cifar10.npz"


def arguments(name: str, folder: Path) -> tuple[str, ...]:
    if name == "fashion_mnist":
        return ("--", "--width", "4", "--data", str(fashion_mnist_data(folder)))
    if name == "cifar10":
        return ("--", "--width", "4", "--data", str(cifar10_data(folder)))
    return ("--", "--width", "8")


def test_every_example_is_here() -> None:
    with_workload = {file.stem for file in EXAMPLES.glob("*.py") if "def workload(" in file.read_text()}

    assert with_workload == {"digits", "fashion_mnist", "cifar10", "text"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10", "text"])
def test_example_is_answered(name: str, tmp_path: Path) -> None:
    if name == "digits" and importlib.util.find_spec("sklearn") is None:
        pytest.skip("the digits come with scikit-learn")
    data = tmp_path / "data"
    data.mkdir()
    options = ("--budget", "4s", "--max-batch", "128", "--out", "run")
    command = [sys.executable, "-m", "rightbatch", "find", f"{EXAMPLES / name}.py:workload", *options, *arguments(name, data)]

    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert ended.returncode in {0, 5}, ended.stderr
    assert "Traceback" not in ended.stderr
    assert {file.name for file in (tmp_path / "run").iterdir()} - {".lock"} == FILES
    findings = json.loads((tmp_path / "run" / "findings.json").read_text())
    plan = findings["recommendation"]["plan"]
    assert ended.stdout.startswith(f"batch {plan['global_batch_size']}")
    assert findings["noise_scale"]["n"] > 0
    assert findings["memory"]["ceiling"] is not None
    assert findings["workload"]["name"] == "Net"
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"batch {plan['global_batch_size']}" in page
