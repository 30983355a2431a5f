"""Check a choice by training: samples to a target accuracy at each timed size, times the seconds that the run measured a sample.

Run: python benchmarks/choice_check.py --data PATH_OF_CIFAR10 [--run findings.json] [--sizes 16 32 64 128] [--seeds 2] [--json]

Trains examples/cifar10.py (width 32) with its own optimizer, the learning rate coupled to each size by the run's own critical batch size.
Samples do not depend on how busy the machine is; seconds are the run's interleaved step times, so only ratios are printed.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from rightbatch.fits.lr_scaling import couple_lr, known_noise_scale
from rightbatch.records.plan import Findings

ROOT = Path(__file__).parents[1]
EVERY = 6250
MOST_SAMPLES = 200_000
VALIDATION = 3000


def cifar10(data: str) -> tuple[object, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    spec = importlib.util.spec_from_file_location("cifar10_example", ROOT / "examples" / "cifar10.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    train, test = example.Cifar10(data, "train"), example.Cifar10(data, "test")
    images = torch.stack([train[i][0] for i in range(len(train))])
    held_out = torch.stack([test[i][0] for i in range(VALIDATION)])
    return example, images, torch.tensor(train.labels).long(), held_out, torch.tensor(test.labels[:VALIDATION]).long()


def samples_to_target(data: tuple, size: int, lr: float, target: float, seed: int) -> int | None:
    example, images, labels, held_out, held_out_labels = data
    torch.manual_seed(seed)
    net = example.Net(32)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    order, at, seen, due = torch.randperm(len(images)), 0, 0, EVERY
    while seen < MOST_SAMPLES:
        if at + size > len(images):
            order, at = torch.randperm(len(images)), 0
        rows = order[at : at + size]
        optimizer.zero_grad()
        cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
        at, seen = at + size, seen + size
        if seen >= due:
            due += EVERY
            with torch.no_grad():
                if (net(held_out).argmax(1) == held_out_labels).float().mean().item() >= target:
                    return seen
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", type=Path, default=ROOT / "tests" / "recorded" / "2026-11-23_cpu_cifar10" / "findings.json")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.62)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    findings = Findings.model_validate_json(arguments.run.read_text())
    points = {point.global_batch_size: point for point in findings.tradeoff.points}
    data = cifar10(arguments.data)
    rows = []
    for size in arguments.sizes:
        coupling = couple_lr(findings.workload, known_noise_scale(findings.noise_scale), size)
        lr = coupling.base_lr * coupling.factor
        reached = [samples_to_target(data, size, lr, arguments.target, seed) for seed in range(arguments.seeds)]
        known = [samples for samples in reached if samples is not None]
        mean = statistics.mean(known) if len(known) == len(reached) else None
        rows.append({"batch": size, "lr": lr, "samples": reached, "time": None if mean is None else mean / points[size].samples_per_s})
    best = min(row["time"] for row in rows if row["time"])
    predicted_best = min(points[size].relative_time.value for size in arguments.sizes)
    for row in rows:
        time = row.pop("time")
        row["trained"] = None if time is None else time / best
        row["predicted"] = points[row["batch"]].relative_time.value / predicted_best
    chosen = findings.recommendation.plan.global_batch_size
    regret = next((row["trained"] for row in rows if row["batch"] == chosen), None)
    versions = dict(findings.environment.versions)
    goal = {"name": "time of the choice over the best", "value": regret, "unit": "ratio", "goal": "<= 1.10"}
    goal["holds"] = regret is not None and regret <= 1.10
    if arguments.json:
        print(
            json.dumps({"goals": [goal], "rows": rows, "environment": {"device": findings.environment.device_name, "versions": versions}})
        )
        return 0 if goal["holds"] else 1
    print(f"batch      lr  samples to {arguments.target:.0%}, by seed   time over the best: trained  predicted")
    for row in rows:
        samples = " ".join("never" if value is None else str(value) for value in row["samples"])
        trained = "never" if row["trained"] is None else f"{row['trained']:.2f}"
        mark = "*" if row["batch"] == chosen else " "
        print(f"{row['batch']:5d}{mark} {row['lr']:.4f}  {samples:28s} {trained:>20s} {row['predicted']:10.2f}")
    print(f"* the choice; {findings.environment.device_name}, {versions}, n = {arguments.seeds} seeds; run of {findings.measured_at}")
    return 0 if goal["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
