"""What Stepper costs a training step against a careful hand-written loop, and BatchLoader against DataLoader.

Run: python benchmarks/step_overhead.py [--workloads FILE.py] [--data PATH] [--steps N] [--loader-rounds N] [--json]

Every public function of the file that returns a ``rightbatch.Workload`` when called without arguments is measured; without a file, the CNN
of examples/cifar10.py on the data named, or on random images. One thread. The hand-written loop does what Stepper does where nothing goes
wrong: it moves the micro-batches to the device, weights their losses by their samples, adds up the mean loss, and steps. The loops take one
step each in turn, in a new order every time, all on the same batches; a step's cost is its time over that of the hand-written step beside
it, and the median counts. The hand-written loop runs twice: its ratio to itself is what the machine does. The loaders are compared by
loader_overhead.py, which runs alone too. Exit code 1: a goal does not hold.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import loader_overhead
import rightbatch as rb
from goals import Goal, exit_code, goal, print_goals
from monitor_overhead import cifar10
from rightbatch.engine.meters import meters_for
from rightbatch.engine.rig import Rig
from rightbatch.errors import RightbatchError
from rightbatch.workload.ingredients import Batch
from workload_files import workloads_of

CASES = ((32, 1), (32, 4), (256, 1), (256, 4))
"""Batch size in samples, and micro-batches it is taken in."""
MOST = 1.02
WARM_UP_STEPS, SECONDS_OF_CASE = 5, 40.0
CPU = torch.device("cpu")
Step = Callable[[Batch], object]


def by_hand(rig: Rig, size: int, accumulation: int) -> Step:
    """The loop as a careful user writes it."""
    trainee, loss_of = rig.new_trainee(compiled=False), rig.workload.loss
    model, optimizer, micro = trainee.model, trainee.optimizer, size // accumulation

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for start in range(0, size, micro):
            *inputs, target = (tensor[start : start + micro].to(CPU, non_blocking=True) for tensor in batch)
            loss = loss_of(model(*inputs), target) * (len(target) / size)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    return step


def by_stepper(rig: Rig, size: int, accumulation: int) -> Step:
    """The same with a stepper."""
    trainee = rig.new_trainee(compiled=False)
    plan = rb.BatchPlan(global_batch_size=size, micro_batch_size=size // accumulation, accumulation_steps=accumulation)
    return rb.Stepper(trainee.model, trainee.optimizer, rig.workload.loss, plan)


LOOPS = {"by hand": by_hand, "Stepper": by_stepper, "by hand again": by_hand}


def seconds_of(step: Step, batch: Batch) -> float:
    start_s = time.perf_counter()
    step(batch)
    return time.perf_counter() - start_s


def measure(rig: Rig, size: int, accumulation: int, steps: int) -> dict[str, object]:
    """Median ratios to the hand-written loop, over steps of all loops in turn, for at most 40 s.

    Args:
        rig: The workload.
        size: Batch size, in samples.
        accumulation: Micro-batches of a step.
        steps: Steps of each loop, at most.
    """
    batch = rig.typical_batch(size)
    loops = {name: make(rig, size, accumulation) for name, make in LOOPS.items()}
    for step in loops.values():
        for _ in range(WARM_UP_STEPS):
            step(batch)
    rng = np.random.default_rng(0)
    times_s: dict[str, list[float]] = {name: [] for name in loops}
    end_s = time.perf_counter() + SECONDS_OF_CASE
    while len(times_s["by hand"]) < steps and (time.perf_counter() < end_s or len(times_s["by hand"]) < WARM_UP_STEPS):
        for name in rng.permutation(list(loops)):
            times_s[name].append(seconds_of(loops[name], batch))
    base = np.array(times_s["by hand"])
    ratios = {name: np.array(times) / base for name, times in times_s.items() if name != "by hand"}
    again = rng.integers(0, len(base), (1000, len(base)))
    return {
        "batch_size": size,
        "accumulation": accumulation,
        "steps": len(base),
        "step_s": float(np.median(base)),
        "added_s": float(np.median(np.array(times_s["Stepper"]) - base)),
        "ratios": {name: float(np.median(values)) for name, values in ratios.items()},
        "intervals_95": {name: np.percentile(np.median(values[again], axis=1), [2.5, 97.5]).tolist() for name, values in ratios.items()},
    }


def rows_of(name: str, workload: rb.Workload, steps: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """One row for each case; none, and said so, for a workload whose loop cannot be written so."""
    if workload.step is not None or workload.loss is None:
        say(f"{name}: left out, it has a step of its own")
        return []
    rig = Rig(workload=workload, device=CPU, meters=meters_for(CPU))
    rows = []
    for size, accumulation in CASES:
        try:
            row = measure(rig, size, accumulation, steps)
        except (RightbatchError, TypeError, ValueError, RuntimeError) as error:
            say(f"{name}, batch {size}: left out, {str(error).splitlines()[0]}")
            continue
        rows.append({"workload": name, **row})
        ratios = ", ".join(
            f"{key} {value:.4f} [{row['intervals_95'][key][0]:.3f}, {row['intervals_95'][key][1]:.3f}]"
            for key, value in row["ratios"].items()
        )
        say(
            f"{name}, batch {size} in {accumulation}: {1e3 * row['step_s']:.1f} ms by hand, {row['steps']} steps; {ratios}; "
            f"{1e6 * row['added_s']:.0f} us a step"
        )
    return rows


def goals_of(rows: list[dict[str, object]]) -> list[Goal]:
    goals = []
    for row in rows:
        name = f"{row['workload']}, batch {row['batch_size']} in {row['accumulation']}: Stepper"
        value = round(row["ratios"]["Stepper"], 4)
        goals.append(goal(name, value, "of the hand-written loop", f"<= {MOST}", holds=value <= MOST))
    return goals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=Path, help="file of functions that return a Workload")
    parser.add_argument("--data", help="CIFAR-10, in one of the forms that examples/cifar10.py reads")
    parser.add_argument("--steps", type=int, default=400, help="most steps of each loop")
    parser.add_argument("--loader-rounds", type=int, default=60, help="blocks of each loader; 0 leaves the loaders out")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_s = time.perf_counter()

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the example says that random images mean nothing but for time
        own = {"cifar10 CNN": cifar10(options.data or "random")} if options.workloads is None else workloads_of(options.workloads)[0]
    rows = [row for name, workload in own.items() for row in rows_of(name, workload, options.steps, say)]
    loader_rows = []
    if options.loader_rounds:
        loader_rows = [row for name, workload in own.items() for row in loader_overhead.rows_of(name, workload, options.loader_rounds, say)]
    goals = goals_of(rows) + loader_overhead.goals_of(loader_rows)
    environment = {
        "device": platform.processor() or platform.machine(),
        "threads": 1,
        "cpu_count": os.cpu_count(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "rightbatch": rb.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    if options.json:
        print(json.dumps({"goals": goals, "rows": rows, "loader_rows": loader_rows, "environment": environment}, indent=2))
    else:
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
