"""A sweep whose trials train nothing: they wait, and come to what a planted law says. For the benchmarks and tests of the driver.

Run: python benchmarks/sweep_noop.py --out FOLDER [--wait 0.2] [--jobs 2] [--sizes 7] [--seeds 3]

Repeat the command to go on with a sweep that was ended. Prints one JSON document: how many trials ended, and how long each session took.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from planted_sweeps import SIZES, TARGET, Law, summary
from rightbatch.records.environment import Environment
from rightbatch.records.sweep import TrialResult
from rightbatch.sweeps.driver import Work, sweep
from rightbatch.sweeps.request import SilentSweep, SweepRequest, SweepStage
from rightbatch.sweeps.tasks import Described, DescribeTask, TrialTask

MARK = "RIGHTBATCH_NOOP_SWEEP"
"""Variable by which the processes of one such sweep can be told from all others."""


class Nothing:
    """A workload that is never loaded."""

    spec = "planted.py:law"
    arguments: tuple[str, ...] = ()
    name = "planted"

    def load(self) -> None:
        raise AssertionError("no trial of this sweep trains")

    def code_files(self) -> tuple[tuple[str, str], ...]:
        return ()

    def code_is_unchanged(self, files: tuple[tuple[str, str], ...]) -> bool:
        return not files


class Printed(SilentSweep):
    """Writes a line for every trial, so that whoever watches knows how far the sweep is."""

    def update(self, stage: SweepStage) -> None:
        if stage.news:
            print(stage.news, file=sys.stderr, flush=True)


def describe(_task: DescribeTask) -> Described:
    environment = Environment(
        device="cpu",
        device_name="planted",
        device_total_bytes=0,
        cpu_count=os.cpu_count() or 1,
        threads=1,
        operating_system="any",
        versions=(),
        precision="fp32",
        isolation="child",
        seed=0,
    )
    return Described(workload=summary(), environment=environment, code_files=())


def run_trial(task: TrialTask, *, wait_s: float) -> TrialResult:
    time.sleep(wait_s)
    return Law(noise=0.1).train(task.spec)


def work(wait_s: float) -> Work:
    return Work(describe=describe, run_trial=partial(run_trial, wait_s=wait_s))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--wait", type=float, default=0.2, help="seconds that a trial takes")
    parser.add_argument("--jobs", type=int, default=2, help="trials at once")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="batch sizes")
    parser.add_argument("--seeds", type=int, default=3, help="trainings at the best rate of each size")
    options = parser.parse_args()
    request = SweepRequest(
        target=TARGET, sizes=SIZES[: options.sizes], seeds=options.seeds, jobs=options.jobs, device="cpu", out=options.out
    )
    start_s = time.perf_counter()
    found = sweep(Nothing(), request, Printed(), command=("python", *sys.argv), work=work(options.wait))
    print(json.dumps({"trials": len(found.trials), "seconds": time.perf_counter() - start_s}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
