"""What a trial of a sweep costs beside its training: the driver, the journal, the process, loading the workload.

Run: python benchmarks/sweep_overhead.py [--trials 200] [--jobs 2] [--workload FILE.py:FUNCTION] [--json]

First so many trials that train nothing, driven as a sweep drives them; then trials of a workload that take one step and evaluate once, in
turns with trials that do nothing, to tell the two apart. Exit code 1: a goal does not hold.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from goals import Goal, exit_code, goal, print_goals
from planted_sweeps import SIZES, TARGET, settings_of
from rightbatch import __version__
from rightbatch.records.sweep import TrialSpec
from rightbatch.sweeps.design import expected_trials
from rightbatch.sweeps.driver import sweep
from rightbatch.sweeps.executors import open_executor
from rightbatch.sweeps.request import SweepRequest, SweepStage
from rightbatch.sweeps.tasks import TrialTask, WorkerSetting, run_trial
from rightbatch.workload.source import WorkloadSource
from sweep_noop import Nothing, work

DIGITS = f"{Path(__file__).resolve().parents[1] / 'examples' / 'digits.py'}:workload"
TRIAL_S, MOST_SHARE = 20.0, 0.05
"""A trial of so many seconds may take so large a share beside its training."""
REPEATS = 7


def seeds_for(trials: int) -> int:
    """Seeds with which a planted sweep takes so many trials or more."""
    return next(seeds for seeds in range(1, 1000) if expected_trials(settings_of(seeds=seeds)) >= trials)


def drive(trials: int, jobs: int) -> tuple[int, float, float]:
    """Run a sweep of trials that do nothing; return how many there were, the seconds, and the seconds before the first."""
    with tempfile.TemporaryDirectory() as folder:
        request = SweepRequest(target=TARGET, sizes=SIZES, seeds=seeds_for(trials), jobs=jobs, device="cpu", out=Path(folder) / "sweep")
        clock = First()
        start_s = time.perf_counter()
        found = sweep(Nothing(), request, clock, work=work(0.0))
        return len(found.trials), time.perf_counter() - clock.first_s, clock.first_s - start_s


class First:
    """Notes when the sweep began to train."""

    first_s = 0.0

    def update(self, _stage: SweepStage) -> None:
        self.first_s = self.first_s or time.perf_counter()


def one_step_s(workload: str) -> list[float]:
    """Seconds of trials that load the workload, take one step and evaluate once; the first, which teaches the template, left out."""
    source = WorkloadSource(workload)
    executor = open_executor("local", jobs=1, device="cpu")
    taken = []
    try:
        for seed in range(REPEATS + 1):
            spec = TrialSpec(global_batch_size=8, lr=1e-3, seed=seed, most_samples=8)
            task = TrialTask(setting=WorkerSetting(load=source.load, device="cpu", threads=1), spec=spec, target=TARGET)
            start_s = time.perf_counter()
            executor.submit(run_trial, task).result()
            taken.append(time.perf_counter() - start_s)
    finally:
        executor.close()
    return taken[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--workload", default=DIGITS, help="FILE.py:FUNCTION; examples/digits.py by default")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    load_before = psutil.getloadavg()[0]
    count, seconds, start_s = drive(options.trials, options.jobs)
    steps_s = one_step_s(options.workload)
    no_op_s = seconds * options.jobs / count
    whole_s = no_op_s + statistics.median(steps_s)
    most_s = TRIAL_S * MOST_SHARE
    goals: list[Goal] = [
        goal(f"a trial that trains nothing, {count} of them", round(no_op_s, 3), "s", f"<= {most_s:g}", holds=no_op_s <= most_s),
        goal(
            "beside its training, of a trial of 20 s of the workload",
            round(100 * whole_s / TRIAL_S, 2),
            "%",
            f"<= {100 * MOST_SHARE:g}",
            holds=whole_s <= most_s,
        ),
    ]
    environment = {
        "seconds_of_all": round(seconds, 2),
        "seconds_before_the_first": round(start_s, 2),
        "one_step_s": [round(value, 2) for value in steps_s],
        "jobs": options.jobs,
        "cpu_count": os.cpu_count(),
        "load_before": round(load_before, 2),
        "versions": {"rightbatch": __version__, "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
    }
    if options.json:
        print(json.dumps({"goals": goals, "environment": environment}, indent=2))
    else:
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
