"""The classic example to a stated accuracy, four ways: 128, find's plan, accumulation 4 x 128 = 512, and a batch that follows the noise.

Run: python benchmarks/classic_example.py --data DIR [--target 0.55] [--train 20000] [--valid 2000] [--width 16] [--seeds 3]
     [--epochs 12] [--budget 60s] [--threads N] [--json]

DIR holds CIFAR-10 in one of the forms that examples/cifar10.py reads, or `cifar10_jpeg.npz`, in which images are JPEGs of the originals.
The network, loss and optimizer are the example's; the first images are decoded once and kept in memory, so that the loader is no part of
the comparison. Everything else is ``rb.find`` once and ``rb.train`` for every way and seed, until an evaluation shows the target.

Seconds are measured in two ways: as each training took them, one after the other, which other users of the machine disturb; and as its
steps times the median of the step times at its sizes, taken in turn, which they disturb alike. Exit code 1: a goal does not hold.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import statistics
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rightbatch as rb
from goals import exit_code, goal, print_goals
from overhead import CIFAR10
from rightbatch.api import Training
from rightbatch.engine.meters import meters_for
from rightbatch.engine.rig import Rig
from rightbatch.errors import UsageError
from rightbatch.fits.batch_schedule import coupled_setting
from rightbatch.fits.lr_scaling import known_noise_scale
from rightbatch.fits.schedule_forecast import forecast_schedule
from rightbatch.fits.training_result import predicted_seconds
from rightbatch.recommend.schedule import requested_schedule
from rightbatch.records.plan import BatchPlan, Findings
from rightbatch.records.schedule import SizeCoupling
from rightbatch.records.training_log import StepLine
from rightbatch.records.training_run import PredictedStep

CPU = torch.device("cpu")
BASE, ACCUMULATED = 128, 4
MOST_SIZES = 8
NO_WORSE = 1.05


class InMemory(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The first images of a dataset, decoded once."""

    def __init__(self, dataset: torch.utils.data.Dataset[tuple[Tensor, int]], size: int) -> None:
        samples = [dataset[index] for index in range(min(size, len(dataset)))]
        self.images = torch.stack([image for image, _ in samples])
        self.labels = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def workload(data: str, width: int, train_size: int, valid_size: int) -> rb.Workload:
    """The example's workload on so many images in memory."""
    sys.path.insert(0, str(CIFAR10.parent))  # find's child process imports the example by its name
    given = importlib.import_module(CIFAR10.stem).workload(width=width, data=data)
    train, valid = InMemory(given.train, train_size), InMemory(given.valid, valid_size)
    return dataclasses.replace(
        given, train=train, valid=valid, num_workers=0, name="CIFAR-10 (JPEG)" if data.endswith(".npz") else "CIFAR-10"
    )


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train."""

    name: str
    plan: BatchPlan
    schedule: object = None


def ways_of(findings: Findings, lr: float, total_samples: int) -> list[Way]:
    """The four ways; the rate of each follows its size by the rule that find uses."""
    found = findings.recommendation.plan
    coupling = SizeCoupling(base_batch_size=BASE, optimizer="SGD", noise_scale_samples=known_noise_scale(findings.noise_scale))
    factor = coupled_setting(coupling, ACCUMULATED * BASE).lr_factor
    accumulated = BatchPlan(global_batch_size=ACCUMULATED * BASE, micro_batch_size=BASE, accumulation_steps=ACCUMULATED, lr=lr * factor)
    dynamic = requested_schedule("noise", findings, total_samples)
    return [
        Way("128, constant", BatchPlan(global_batch_size=BASE, micro_batch_size=BASE, lr=lr)),
        Way("find's plan", BatchPlan(**found.model_dump())),
        Way("4 x 128, accumulated", accumulated),
        Way("following the noise", BatchPlan(**found.model_dump()), dynamic),
    ]


def trained(given: rb.Workload, way: Way, seed: int, options: argparse.Namespace) -> Training:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rb.RightbatchWarning)  # a missed target is a row of the table
        return rb.train(
            given,
            way.plan,
            schedule=way.schedule,
            epochs=options.epochs,
            target=f"accuracy>={options.target}",
            evaluate_every=options.evaluate_every,
            noise_every=None if way.schedule is not None else 0,
            seed=seed,
            threads=options.threads,
            device="cpu",
        )


def step_times(given: rb.Workload, sizes: list[int], micro: int, rounds: int) -> dict[int, float]:
    """Median seconds of a step at each size, the sizes taken in turn."""
    rig = Rig(workload=given, device=CPU, meters=meters_for(CPU))
    steppers, batches = {}, {}
    for size in sizes:
        trainee = rig.new_trainee()
        plan = BatchPlan(global_batch_size=size, micro_batch_size=size) if size <= micro else _split(size, micro)
        steppers[size] = rb.Stepper(trainee.model, trainee.optimizer, given.loss, plan)
        batches[size] = rig.typical_batch(size)
        steppers[size](batches[size])
    times: dict[int, list[float]] = {size: [] for size in sizes}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for size in order.permutation(sizes).tolist():
            start_s = time.perf_counter()
            steppers[size](batches[size])
            times[size].append(time.perf_counter() - start_s)
    return {size: statistics.median(values) for size, values in times.items()}


def _split(size: int, micro: int) -> BatchPlan:
    steps = next(count for count in range(2, size + 1) if size % count == 0 and size // count <= micro)
    return BatchPlan(global_batch_size=size, micro_batch_size=size // steps, accumulation_steps=steps)


def sizes_of(runs: dict[str, list[Training]]) -> list[int]:
    """Sizes to time: all that were trained with, thinned to a few between the smallest and the largest."""
    trained_with = sorted({size for of_way in runs.values() for run in of_way for _, size in run.batch_sizes})
    if len(trained_with) <= MOST_SIZES:
        return trained_with
    places = np.linspace(0, len(trained_with) - 1, MOST_SIZES).round().astype(int)
    return sorted({trained_with[place] for place in places} | {runs[name][0].plan.global_batch_size for name in runs})


def row_of(runs: list[Training], seconds_by_size: dict[int, float]) -> dict[str, object]:
    """What a way's seeds came to: medians and ranges."""
    known = [PredictedStep(global_batch_size=size, step_time_s=seconds) for size, seconds in seconds_by_size.items()]
    composed = [predicted_seconds([line for line in run.log if isinstance(line, StepLine)], known) for run in runs]
    return {
        "reached": sum(run.reached is not None for run in runs),
        "seeds": len(runs),
        "batch": sorted({size for run in runs for _, size in run.batch_sizes}),
        "lr": runs[0].plan.lr,
        "samples": _spread([run.samples for run in runs]),
        "accuracy": _spread([run.evaluation.metric for run in runs if run.evaluation is not None]),
        "seconds": _spread([run.training_s for run in runs]),
        "composed_seconds": _spread([value for value in composed if value is not None]),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else {}


def _words(spread: dict[str, float], digits: int = 0) -> str:
    if not spread:
        return "unknown"
    return f"{spread['median']:.{digits}f} [{spread['low']:.{digits}f}, {spread['high']:.{digits}f}]"


def print_table(rows: dict[str, dict[str, object]], target: float) -> None:
    head = ("way", "batch", "lr", "reached", "samples", "accuracy", "seconds", "steps x step time, s")
    cells = [head]
    for name, row in rows.items():
        sizes = row["batch"]
        batch = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        rate = "own" if row["lr"] is None else f"{row['lr']:.3g}"
        numbers = (_words(row["samples"]), _words(row["accuracy"], 3), _words(row["seconds"], 1), _words(row["composed_seconds"], 1))
        cells.append((name, batch, rate, f"{row['reached']}/{row['seeds']}", *numbers))
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    print(f"\nto accuracy >= {target}; medians over seeds [lowest, highest]")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def goals_of(rows: dict[str, dict[str, object]]) -> list[dict[str, object]]:
    reached = sum(row["reached"] for row in rows.values())
    runs = sum(row["seeds"] for row in rows.values())
    medians = {name: row["composed_seconds"].get("median") for name, row in rows.items()}
    base, found = medians["128, constant"], medians["find's plan"]
    ratio = None if not base or not found else round(found / base, 3)
    name = "find's plan against 128: time to the target, steps x step time"
    return [
        goal("trainings that reached the target", reached, f"of {runs}", "all", holds=reached == runs),
        goal(name, ratio, "", f"<= {NO_WORSE}", holds=ratio is not None and ratio <= NO_WORSE),
    ]


def data_of(path: Path) -> str:
    """A folder may hold the JPEG form beside other things."""
    inside = path / "cifar10_jpeg.npz"
    return str(inside if inside.is_file() else path)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--target", type=float, default=0.55, help="accuracy on the validation images")
    parser.add_argument("--train", type=int, default=20_000, help="training images")
    parser.add_argument("--valid", type=int, default=2_000, help="validation images")
    parser.add_argument("--width", type=int, default=16, help="of the example's network")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=12, help="most epochs of a training")
    parser.add_argument("--evaluate-every", type=int, default=4_000, help="samples between evaluations")
    parser.add_argument("--budget", default="60s", help="of find")
    parser.add_argument("--rounds", type=int, default=15, help="of timing steps in turn")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    torch.set_num_threads(options.threads)
    start_s = time.perf_counter()

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    given = workload(data_of(options.data), options.width, options.train, options.valid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rb.RightbatchWarning)
        found = rb.find(given, budget=options.budget, threads=options.threads, device="cpu")
    lr = float(given.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"])
    total = round(options.epochs * len(given.train))
    try:
        ways = ways_of(found.findings, lr, total)
    except UsageError as error:
        sys.exit(f"find measured too little for a batch that follows the noise: {error} Give a larger --budget.")
    forecast = forecast_schedule(found.findings, ways[-1].schedule, total)
    say(str(found).splitlines()[0] + "\n" + "\n".join(f"forecast of following the noise: {reason}" for reason in forecast.reasons))
    runs: dict[str, list[Training]] = {way.name: [] for way in ways}
    for seed in range(options.seeds):  # the ways in turn, so that a slow hour of the machine is shared
        for way in ways:
            run = trained(given, way, seed, options)
            runs[way.name].append(run)
            say(
                f"{way.name}, seed {seed}: {run.state}, {run.samples} samples, accuracy {run.evaluation.metric:.3f}, {run.training_s:.1f} s"
            )
    seconds = step_times(given, sizes_of(runs), found.micro_batch_size, options.rounds)
    rows = {name: row_of(of_way, seconds) for name, of_way in runs.items()}
    goals = goals_of(rows)
    environment = {
        "data": f"{given.name}, {len(given.train)} + {len(given.valid)} images, width {options.width}",
        "device": platform.processor() or platform.machine(),
        "threads": options.threads,
        "load_average_1m": round(os.getloadavg()[0], 2),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "rightbatch": rb.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    if options.json:
        document = {
            "goals": goals,
            "target": options.target,
            "rows": rows,
            "step_times_s": seconds,
            "forecast": forecast.model_dump(mode="json"),
        }
        print(json.dumps(document | {"environment": environment}, indent=2))
    else:
        print_table(rows, options.target)
        print("step times: " + ", ".join(f"{size}: {1e3 * value:.1f} ms" for size, value in seconds.items()) + "\n")
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
