"""Two ranks see what one process sees that accumulates the same micro-batches, or that halves the same batch."""

import json

import pytest

from launch import forked

PROGRAM = '''
"""Trains on this rank's part of fixed micro-batches, once for each way, and writes what the monitor measured."""
import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import rightbatch as rb
from rightbatch.errors import UsageError

rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    torch.distributed.init_process_group("gloo")


def train(sizes, way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if ranks > 1:
        try:
            rb.NoiseMonitor(model, optimizer)
            sys.exit("a model that is not wrapped must be refused")
        except UsageError as error:
            assert "under 2 ranks the monitor needs the model wrapped" in str(error), error
    monitor = rb.NoiseMonitor(wrapped, optimizer, every=2, dataset_size=500)
    generator = torch.Generator().manual_seed(1)
    for step in range(24):
        images = [torch.randn(size, 1, 6, 6, generator=generator).double() for size in sizes]
        pieces = [(x, torch.randint(0, 2, (len(x),), generator=generator)) for x in images]
        own = pieces[rank * len(pieces) // ranks : (rank + 1) * len(pieces) // ranks]
        if way == "parts":
            for share, x, y in monitor.parts(*(torch.cat(column) for column in zip(*own))):
                (share * cross_entropy(wrapped(x), y)).backward()
        else:
            for index, (x, y) in enumerate(own):
                is_reduced = ranks == 1 or (index == len(own) - 1 and way != "unreduced")
                with contextlib.nullcontext() if is_reduced else wrapped.no_sync(), monitor.micro_batch(len(x), weight=1 / len(own)):
                    (cross_entropy(wrapped(x), y) / len(own)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return monitor


for way, sizes in json.loads(sys.argv[1]).items():
    monitor = train(sizes, way)
    if way != "unreduced" or rank == 1:  # a rank may read alone
        read = {"stream": json.loads(monitor.stream.model_dump_json()), "value": monitor.noise_scale.value}
        Path(f"{way}-{ranks}-{rank}.json").write_text(json.dumps(read))
if ranks > 1:
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a process that ends them as its peer does: everything is written by now
'''
WAYS = {"accumulated": [6, 6, 6, 6], "parts": [6, 6], "unreduced": [6, 6, 6, 6]}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What was written by (way, number of ranks, rank), joined by dashes."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(PROGRAM)
    for ranks in (1, 2):
        ended = forked(folder, "program.py", json.dumps(WAYS), count=ranks)
        assert ended.code == 0, ended.err
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.mark.parametrize("way", ["accumulated", "parts"])
def test_two_ranks_agree_with_one_process(measured: dict[str, dict], way: str) -> None:
    alone, first, second = (measured[f"{way}-{where}"] for where in ("1-0", "2-0", "2-1"))

    assert first == second
    assert first["value"] == pytest.approx(alone["value"], rel=1e-9)
    assert len(first["stream"]["blocks"]) == len(alone["stream"]["blocks"]) == 12
    for mine, expected in zip(first["stream"]["blocks"], alone["stream"]["blocks"], strict=True):
        assert mine == {key: pytest.approx(value, rel=1e-8) for key, value in expected.items()}


def test_a_rank_may_read_alone_and_steps_that_were_not_reduced_are_left_out(measured: dict[str, dict]) -> None:
    alone = measured["unreduced-2-1"]

    assert "unreduced-2-0" not in measured
    assert alone["stream"]["inconsistent_steps"] == 12
    assert alone["value"] is None
