"""What Stepper costs a training step against a careful hand-written loop, and BatchLoader against DataLoader.

Run: python benchmarks/step_overhead.py [--workloads FILE.py] [--data PATH] [--steps N] [--loader-rounds N] [--json]

Every public function of the file that returns a ``rightbatch.Workload`` when called without arguments is measured; without a file, the CNN
of examples/cifar10.py on the data named, or on random images. One thread. The hand-written loop does what Stepper does where nothing goes
wrong: it moves the micro-batches to the device, weights their losses by their samples, adds up the mean loss, and steps. The loops take one
step each in turn, in a new order every time, all on the same batches; a step's cost is its time over that of the hand-written step beside
it, and the median counts. The hand-written loop runs twice: its ratio to itself is what the machine does. The loaders are compared by
loader_overhead.py, which runs alone too. Exit code 1: a goal does not hold.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import loader_overhead
import rightbatch as rb
from goals import Goal, goal
from overhead import CPU, FAILURES, Row, Say, conclude, first_line, parser_of, ratios_in_words, ratios_to, rig_of, sayer, workloads_asked
from rightbatch.engine.rig import Rig
from rightbatch.workload.ingredients import Batch

CASES = ((32, 1), (32, 4), (256, 1), (256, 4))
"""Batch size in samples, and micro-batches it is taken in."""
MOST = 1.02
WARM_UP_STEPS, SECONDS_OF_CASE = 5, 40.0
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


def measure(rig: Rig, size: int, accumulation: int, steps: int) -> Row:
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
    return {
        "batch_size": size,
        "accumulation": accumulation,
        "steps": len(base),
        "step_s": float(np.median(base)),
        "added_s": float(np.median(np.array(times_s["Stepper"]) - base)),
        **ratios_to("by hand", times_s, rng),
    }


def rows_of(name: str, workload: rb.Workload, steps: int, say: Say) -> list[Row]:
    """One row for each case; none, and said so, for a workload whose loop cannot be written so."""
    rig = rig_of(name, workload, say)
    if rig is None:
        return []
    rows = []
    for size, accumulation in CASES:
        try:
            row = measure(rig, size, accumulation, steps)
        except FAILURES as error:
            say(f"{name}, batch {size}: left out, {first_line(error)}")
            continue
        rows.append({"workload": name, **row})
        say(
            f"{name}, batch {size} in {accumulation}: {1e3 * row['step_s']:.1f} ms by hand, {row['steps']} steps; {ratios_in_words(row)}; "
            f"{1e6 * row['added_s']:.0f} us a step"
        )
    return rows


def goals_of(rows: list[Row]) -> list[Goal]:
    goals = []
    for row in rows:
        name = f"{row['workload']}, batch {row['batch_size']} in {row['accumulation']}: Stepper"
        value = round(row["ratios"]["Stepper"], 4)
        goals.append(goal(name, value, "of the hand-written loop", f"<= {MOST}", holds=value <= MOST))
    return goals


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=400, help="most steps of each loop")
    parser.add_argument("--loader-rounds", type=int, default=60, help="blocks of each loader; 0 leaves the loaders out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_s, say = time.perf_counter(), sayer(as_json=options.json)
    own = workloads_asked(options)
    rows = [row for name, workload in own.items() for row in rows_of(name, workload, options.steps, say)]
    loader_rows = []
    if options.loader_rounds:
        loader_rows = [row for name, workload in own.items() for row in loader_overhead.rows_of(name, workload, options.loader_rounds, say)]
    goals = goals_of(rows) + loader_overhead.goals_of(loader_rows)
    return conclude(goals, {"rows": rows, "loader_rows": loader_rows}, start_s=start_s, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
