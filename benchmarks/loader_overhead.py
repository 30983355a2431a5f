"""What BatchLoader costs against torch's DataLoader with the same workers: under training steps, and with nothing done to the batches.

Run: python benchmarks/loader_overhead.py [--workloads FILE.py] [--data PATH] [--rounds N] [--json]

Every public function of the file that returns a ``rightbatch.Workload`` when called without arguments is measured; without a file, the CNN
and the dataset of examples/cifar10.py, on the data named or on random images. One thread. The loaders take blocks of batches in turn, in a
new order every round; a block's cost is its time over that of the DataLoader's block beside it, and the median counts. A second DataLoader
runs along: its ratio to the first is what the machine does. Where torchdata is installed its StatefulDataLoader runs too, with the same
sampler and fetch. Goals are for training steps. Exit code 1: a goal does not hold.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

import rightbatch as rb
from goals import Goal, goal
from overhead import FAILURES, Row, Say, conclude, first_line, parser_of, ratios_in_words, ratios_to, rig_of, sayer, workloads_asked
from rightbatch.engine.rig import Rig
from rightbatch.training.batch_sampler import ScheduledSampler
from rightbatch.training.seeded_fetch import SeededFetch
from rightbatch.workload.ingredients import Batch

SIZES, WORKERS, MOST = (32, 256), (0, 2), 1.02
SAMPLES_OF_BLOCK = {"training steps": 256, "bare": 4096}
Use = Callable[[Batch], object]


def batch_loader(workload: rb.Workload, size: int, workers: int) -> rb.BatchLoader:
    plan = rb.BatchPlan(global_batch_size=size, micro_batch_size=size)
    return rb.BatchLoader(workload.train, plan, num_workers=workers, collate_fn=workload.collate_fn)


def data_loader(workload: rb.Workload, size: int, workers: int) -> "DataLoader[Batch]":
    return DataLoader(
        workload.train,
        batch_size=size,
        shuffle=True,
        num_workers=workers,
        collate_fn=workload.collate_fn,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def stateful_loader(workload: rb.Workload, size: int, workers: int) -> "DataLoader[Batch]":
    """Torchdata's loader on BatchLoader's sampler and fetch, its own snapshots at every batch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    sampler = ScheduledSampler(
        len(workload.train), size, schedule=None, shuffle=True, seed=0, rank=0, world_size=1, drop_last=False
    )  # fmt: skip
    fetch = SeededFetch(workload.train, workload.collate_fn or default_collate, seed=0, rank=0)
    return StatefulDataLoader(
        fetch, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=_as_it_is, persistent_workers=workers > 0
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


LOADERS: dict[str, Callable[[rb.Workload, int, int], Any]] = {
    "DataLoader": data_loader,
    "BatchLoader": batch_loader,
    "DataLoader again": data_loader,
} | ({"StatefulDataLoader": stateful_loader} if find_spec("torchdata") else {})


def endless(loader: "rb.BatchLoader | DataLoader[Batch]") -> Iterator[Batch]:
    while True:
        yield from loader


def training_step(rig: Rig) -> Use:
    """A careful step of the workload: forward, backward, optimizer."""
    trainee, loss = rig.new_trainee(compiled=False), rig.workload.loss

    def step(batch: Batch) -> None:
        *inputs, target = rig.place(batch)
        loss(trainee.model(*inputs), target).backward()
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()

    return step


def nothing(batch: Batch) -> None:  # noqa: ARG001
    return None


def seconds_of_block(stream: Iterator[Batch], count: int, use: Use) -> float:
    start_s = time.perf_counter()
    for batch in itertools.islice(stream, count):
        use(batch)
    return time.perf_counter() - start_s


def measure(workload: rb.Workload, size: int, workers: int, *, use: Use, samples_of_block: int, rounds: int) -> Row:
    """Compare the loaders over interleaved blocks of batches.

    Args:
        workload: Whose training set is loaded.
        size: Batch size, in samples.
        workers: Workers of each loader.
        use: What is done with a batch.
        samples_of_block: Samples that a loader gives at a time.
        rounds: Blocks of each loader.

    Returns:
        ``ratios`` to the DataLoader by name of loader, their ``intervals_95`` by bootstrap, and ``batch_s`` of the DataLoader.
    """
    streams = {name: endless(make(workload, size, workers)) for name, make in LOADERS.items()}
    count = max(1, samples_of_block // size)
    for stream in streams.values():
        seconds_of_block(stream, count, use)
    rng = np.random.default_rng(0)
    times_s: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(rounds):
        for name in rng.permutation(list(streams)):
            times_s[name].append(seconds_of_block(streams[name], count, use))
    return {
        "batch_size": size,
        "num_workers": workers,
        "rounds": rounds,
        "batch_s": float(np.median(times_s["DataLoader"])) / count,
        **ratios_to("DataLoader", times_s, rng),
    }


def rows_of(name: str, workload: rb.Workload, rounds: int, say: Say) -> list[Row]:
    """One row for each batch size, number of workers and use; none, and said so, for a workload with a step of its own."""
    rig = rig_of(name, workload, say)
    if rig is None:
        return []
    rows = []
    for what, size, workers in itertools.product(SAMPLES_OF_BLOCK, SIZES, WORKERS):
        use = training_step(rig) if what == "training steps" else nothing
        try:
            row = measure(workload, size, workers, use=use, samples_of_block=SAMPLES_OF_BLOCK[what], rounds=rounds)
        except FAILURES as error:
            say(f"{name}, {what}: left out, {first_line(error)}")
            continue
        rows.append({"workload": name, "use": what, **row})
        say(f"{name}, {what}, batch {size}, {workers} workers: {1e3 * row['batch_s']:.2f} ms a batch; {ratios_in_words(row)}")
    return rows


def goals_of(rows: list[Row]) -> list[Goal]:
    goals = []
    for row in rows:
        if row["use"] == "training steps":
            name = f"{row['workload']}, batch {row['batch_size']}, {row['num_workers']} workers: training steps fed by BatchLoader"
            value = round(row["ratios"]["BatchLoader"], 4)
            goals.append(goal(name, value, "of those fed by DataLoader", f"<= {MOST}", holds=value <= MOST))
    return goals


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="blocks of each loader")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_s, say = time.perf_counter(), sayer(as_json=options.json)
    rows = [row for name, workload in workloads_asked(options).items() for row in rows_of(name, workload, options.rounds, say)]
    return conclude(goals_of(rows), {"rows": rows}, start_s=start_s, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
