"""What the benchmarks of overhead share: their workloads, ratios of interleaved times, and how they say what they found."""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import rightbatch as rb
from goals import Goal, exit_code, print_goals
from rightbatch.engine.meters import meters_for
from rightbatch.engine.rig import Rig
from rightbatch.errors import RightbatchError
from workload_files import workloads_of

CIFAR10 = Path(__file__).parents[1] / "examples/cifar10.py"
CPU = torch.device("cpu")
FAILURES = (RightbatchError, TypeError, ValueError, RuntimeError)
"""What a workload raises that cannot be trained in the way that is measured."""
RESAMPLINGS = 1000
Say = Callable[[str], None]
Row = dict[str, object]


def cifar10(data: str | None) -> rb.Workload:
    """The workload of examples/cifar10.py, without data on random images."""
    spec = spec_from_file_location("cifar10_example", CIFAR10)
    if spec is None or spec.loader is None:
        sys.exit(f"{CIFAR10} must be there; run the benchmark from a clone.")
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the example says that random images mean nothing but for time
        return example.workload(data=data or "random")


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark of overhead has.

    Args:
        description: The benchmark's docstring.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--workloads", type=Path, help="file of functions that return a Workload")
    parser.add_argument("--data", help="CIFAR-10, in one of the forms that examples/cifar10.py reads")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser


def workloads_asked(options: argparse.Namespace) -> dict[str, rb.Workload]:
    """The workloads of the file that was named; without one, the CNN of examples/cifar10.py."""
    return {"cifar10 CNN": cifar10(options.data)} if options.workloads is None else workloads_of(options.workloads)[0]


def sayer(*, as_json: bool) -> Say:
    """What says how it goes: on stdout, or beside the document that stdout is for."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def rig_of(name: str, workload: rb.Workload, say: Say) -> Rig | None:
    """The workload on the CPU; none, and said so, where its loop cannot be written by hand."""
    if workload.step is not None or workload.loss is None:
        say(f"{name}: left out, it has a step of its own")
        return None
    return Rig(workload=workload, device=CPU, meters=meters_for(CPU))


def first_line(error: Exception) -> str:
    """What an error says first."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def ratios_to(base: str, times_s: Mapping[str, Sequence[float]], rng: np.random.Generator) -> dict[str, dict[str, object]]:
    """Compare times that were taken in turn.

    Args:
        base: What the others are compared to.
        times_s: Equally many times of each.
        rng: Draws the rounds that the intervals are taken over.

    Returns:
        ``ratios``: the median of each one's time over the base's beside it; ``intervals_95``: the same by bootstrap over rounds.
    """
    rounds = len(times_s[base])
    ratios = {name: np.array(times) / np.array(times_s[base]) for name, times in times_s.items() if name != base}
    again = rng.integers(0, rounds, (RESAMPLINGS, rounds))
    return {
        "ratios": {name: float(np.median(values)) for name, values in ratios.items()},
        "intervals_95": {name: interval_95(np.median(values[again], axis=1)) for name, values in ratios.items()},
    }


def interval_95(values: NDArray[np.float64] | Sequence[float]) -> list[float]:
    """The middle 95 % of some values."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def ratios_in_words(row: Row) -> str:
    """The ratios of a row, each with its interval."""
    intervals = row["intervals_95"]
    return ", ".join(f"{key} {value:.4f} [{intervals[key][0]:.3f}, {intervals[key][1]:.3f}]" for key, value in row["ratios"].items())


def conclude(goals: Sequence[Goal], found: Mapping[str, object], *, start_s: float, as_json: bool) -> int:
    """Print the goals, or everything as one document, and return the exit code.

    Args:
        goals: What was to hold.
        found: What else the document holds.
        start_s: When it began, by ``time.perf_counter``.
        as_json: Whether to print the document.
    """
    environment = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "rightbatch": rb.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    if as_json:
        print(json.dumps({"goals": goals, **found, "environment": environment}, indent=2))
    else:
        print_goals(goals, environment)
    return exit_code(goals)
