"""What the noise monitor costs a training step, against the same loop without it; and whether two ranks agree with one.

Run: python benchmarks/monitor_overhead.py [--workloads FILE.py] [--data PATH] [--steps N] [--json]

Every public function of the file that returns a ``rightbatch.Workload`` when called without arguments is one row for each accumulation;
without a file, the CNN of examples/cifar10.py on the data named, or on random images of its shape. One thread. The variants take one step
each in turn, in a new order every time; a step's cost is its time over that of the bare loop's step beside it, and the median counts.
Measured and other steps of the duty cycle are told apart: nine parts of the latter's median and one of the former's. The bare loop runs
twice: its ratio to itself is what the machine does. Exit code 1: a goal does not hold.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import rightbatch as rb
from goals import Goal, goal
from noise_recipes import Floats
from overhead import (
    FAILURES,
    RESAMPLINGS,
    Row,
    Say,
    cifar10,
    conclude,
    first_line,
    interval_95,
    parser_of,
    ratios_in_words,
    rig_of,
    sayer,
    workloads_asked,
)
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import Trainee
from rightbatch.fits.noise_stream import fit_noise_stream
from rightbatch.records.measurements import NoiseStream

BATCH, ACCUMULATIONS, DUTY = 128, (1, 4), 10
VARIANTS = {"duty-cycled": DUTY, "every step": 1, "bare again": None}
MOST = {"duty-cycled": 1.02, "every step": 1.05}
STEPS_OF_RANKS, MICRO_OF_RANKS = 12, 16
Steps = NDArray[np.int64]
Parts = Iterator[tuple[float, list[Tensor]]]


class RandomImages:
    """Normal random images and labels, of the shape of CIFAR-10: in few steps on them a noise scale can be told."""

    def __init__(self, count: int = 2048) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 10, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class Loop:
    """One training loop, with a monitor or without."""

    def __init__(self, rig: Rig, accumulation: int, every: int | None) -> None:
        self.trainee: Trainee = rig.new_trainee(compiled=False)
        self.workload = rig.workload
        self.accumulation = accumulation
        self.monitor = None if every is None else rb.NoiseMonitor(self.trainee.model, self.trainee.optimizer, every=every)

    def parts(self, batch: list[Tensor]) -> Parts:
        """The parts of a batch with the shares their losses get, as a user of the monitor writes it."""
        if self.monitor is not None and self.accumulation == 1:
            for share, *part in self.monitor.parts(*batch):
                yield share, part
            return
        pieces = [list(piece) for piece in zip(*(tensor.chunk(self.accumulation) for tensor in batch), strict=True)]
        for part in pieces:
            with contextlib.nullcontext() if self.monitor is None else self.monitor.micro_batch(len(part[0])):
                yield 1 / len(pieces), part

    def step(self, batch: list[Tensor]) -> None:
        for share, (*inputs, target) in self.parts(batch):
            (share * self.workload.loss(self.trainee.model(*inputs), target)).backward()
        self.trainee.optimizer.step()
        self.trainee.optimizer.zero_grad()


def seconds_of(loop: Loop, batch: list[Tensor]) -> float:
    start_s = time.perf_counter()
    loop.step(batch)
    return time.perf_counter() - start_s


def measure(name: str, rig: Rig, accumulation: int, steps: int) -> Row:
    """Median ratios to the bare loop, over steps of all variants in turn."""
    batch = list(rig.typical_batch(BATCH))
    loops = {"bare": Loop(rig, accumulation, None)} | {key: Loop(rig, accumulation, every) for key, every in VARIANTS.items()}
    for loop in loops.values():
        for _ in range(DUTY):
            loop.step(batch)
    rng = np.random.default_rng(0)
    times_s: dict[str, list[float]] = {key: [] for key in loops}
    for _ in range(steps):
        for key in rng.permutation(list(loops)):
            times_s[key].append(seconds_of(loops[key], batch))
    bare = np.array(times_s["bare"])
    ratios = {key: np.array(times_s[key]) / bare for key in VARIANTS}
    everything = np.arange(steps)
    again = [np.concatenate([rng.choice(kind, len(kind)) for kind in _kinds(everything)]) for _ in range(RESAMPLINGS)]
    resampled = {key: [_cost(key, values, chosen) for chosen in again] for key, values in ratios.items()}
    return {
        "workload": name,
        "accumulation": accumulation,
        "bare_step_s": float(np.median(bare)),
        "steps": steps,
        "ratios": {key: _cost(key, values, everything) for key, values in ratios.items()},
        "intervals_95": {key: interval_95(values) for key, values in resampled.items()},
    }


def _kinds(steps: Steps) -> tuple[Steps, Steps]:
    """Steps that a duty cycle measures, and others."""
    return steps[steps % DUTY == 0], steps[steps % DUTY != 0]


def _cost(key: str, ratios: Floats, steps: Steps) -> float:
    """Median ratio over some steps; of a duty cycle, from the medians of its two kinds of steps."""
    if key != "duty-cycled":
        return float(np.median(ratios[steps]))
    measured, others = (np.median(ratios[kind]) for kind in _kinds(steps))
    return float(measured + (DUTY - 1) * others) / DUTY


def train_watched(folder: Path) -> None:
    """Train this rank's share of fixed micro-batches in float64 and write what the monitor measured."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    workload = replace(cifar10(None), train=RandomImages())
    model = workload.model().double()
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = workload.optimizer(model.parameters())
    monitor = rb.NoiseMonitor(wrapped, optimizer, every=1)
    own = range(rank, 4, ranks)
    for step in range(STEPS_OF_RANKS):
        for index in own:
            x = torch.stack([workload.train[(step * 4 + index) * MICRO_OF_RANKS + i][0] for i in range(MICRO_OF_RANKS)]).double()
            y = torch.tensor([workload.train[(step * 4 + index) * MICRO_OF_RANKS + i][1] for i in range(MICRO_OF_RANKS)])
            alone = ranks > 1 and index != own[-1]
            with wrapped.no_sync() if alone else contextlib.nullcontext(), monitor.micro_batch(len(x), weight=1 / len(own)):
                (workload.loss(wrapped(x), y) / len(own)).backward()
        optimizer.step()
        optimizer.zero_grad()
    (folder / f"{ranks}-{rank}.json").write_text(monitor.stream.model_dump_json())
    if ranks > 1:
        torch.distributed.destroy_process_group()


def ranks_against_one(folder: Path) -> dict[str, float]:
    """Largest relative difference between two gloo ranks and one process: in the noise scale, and in the sums it comes from."""
    here = [str(Path(__file__).resolve()), "--train-into", str(folder)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable, *here], [sys.executable, *launcher, *here]):
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    one, *two = (NoiseStream.model_validate_json((folder / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    sums = [np.array([[b.trace_sums, b.sq_norm_sums] for b in stream.blocks]).sum(axis=-1) for stream in (one, *two)]
    values = [fit_noise_stream(stream).value for stream in (one, *two)]
    off = max(float(np.max(np.abs(other / sums[0] - 1))) for other in sums[1:])
    return {"sums": off, "noise scale": max(abs(value / values[0] - 1) for value in values[1:])}


def goals_of(rows: list[Row], off: dict[str, float]) -> list[Goal]:
    goals: list[Goal] = []
    for row in rows:
        for key, most in MOST.items():
            value = round(row["ratios"][key], 4)
            name = f"{row['workload']}, accumulation {row['accumulation']}: {key}"
            goals.append(goal(name, value, "of the bare loop", f"<= {most}", holds=value <= most))
    worst = max(off.values())
    return [*goals, goal("two gloo ranks against one process", worst, "", "<= 1e-9", holds=worst <= 1e-9)]


def rows_of(name: str, workload: rb.Workload, steps: int, say: Say) -> list[Row]:
    """One row for each accumulation; none, and said so, for a workload whose loop cannot be written in two lines."""
    rig = rig_of(name, workload, say)
    if rig is None:
        return []
    rows = []
    for accumulation in ACCUMULATIONS:
        try:
            row = measure(name, rig, accumulation, steps)
        except FAILURES as error:
            say(f"{name}: left out, {first_line(error)}")
            continue
        rows.append(row)
        say(f"{name}, accumulation {accumulation}: {1e3 * row['bare_step_s']:.1f} ms a bare step; {ratios_in_words(row)}")
    return rows


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of each variant")
    parser.add_argument("--train-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train_into is not None:
        train_watched(options.train_into)
        return 0
    start_s, say = time.perf_counter(), sayer(as_json=options.json)
    rows = [row for name, workload in workloads_asked(options).items() for row in rows_of(name, workload, options.steps, say)]
    with tempfile.TemporaryDirectory() as folder:
        off = ranks_against_one(Path(folder))
    return conclude(goals_of(rows, off), {"rows": rows, "ranks_off": off}, start_s=start_s, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
