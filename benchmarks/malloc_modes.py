"""What the allocator of the host makes of the same training step: peak resident set over traced bytes, repeatability, and step time.

Run: python benchmarks/malloc_modes.py [--data PATH | --workloads FILE.py] [--rounds N] [--json]

Without options the classic CNN of examples/cifar10.py at width 32 on random images; with --data on CIFAR-10; with --workloads every
function of the file that returns a Workload. Each round starts one child a mode, one after the other, and each child records a trace, then
runs two steps of each size in turn: a small one, a large one, the large one again, and a smaller one after that.
Exit code 1: a goal does not hold.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

import rightbatch as rb
from goals import Goal, exit_code, print_goals
from rightbatch.engine.isolation import ChildHost, Completed
from rightbatch.engine.meters import meters_for
from rightbatch.engine.rig import Rig
from rightbatch.fits.memory import traced_peak_bytes
from rightbatch.probes import memory
from rightbatch.tuner.measuring import MALLOC_SETTINGS
from workload_files import workloads_of

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cifar10.py"
WIDTH, IMAGES = 32, 256
MODES = {**MALLOC_SETTINGS, "1 MiB": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}}
"""``1 MiB`` only fixes the size from which tensors are mapped on their own, which glibc raises by itself otherwise."""
SIZES = (512, 1000, 1000, 300)
SMALL, LARGE, AGAIN, AFTER = range(4)
MOST_APART, MOST_GROWN = 0.02, 1.05


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one child measured: for each of SIZES the peak resident set over traced bytes, and seconds of a step."""

    workload: str
    mode: str
    ratios: tuple[float, ...]
    step_times_s: tuple[float, ...]

    @property
    def apart(self) -> float:
        """How far the large size and the same again are apart, as a share."""
        return abs(self.ratios[AGAIN] / self.ratios[LARGE] - 1)


def example_module(path: Path) -> object:
    spec = importlib.util.spec_from_file_location("cifar10_example", path)
    assert spec is not None, "a path to a Python file has a spec"  # noqa: S101
    assert spec.loader is not None, "a Python file has a loader"  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def example(data: str | None) -> rb.Workload:
    """The classic CNN, on the images in ``data`` or on random ones."""
    module = example_module(EXAMPLE)
    if data is not None:
        given: rb.Workload = module.workload(WIDTH, data)  # type: ignore[attr-defined]
        return given
    generator = torch.Generator().manual_seed(0)
    images: list[tuple[Tensor, int]] = [(torch.randn(3, 32, 32, generator=generator), index % 10) for index in range(IMAGES)]
    return rb.Workload(
        model=lambda: module.Net(WIDTH),  # type: ignore[attr-defined]
        train=images,
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    )


def rig_of(load: Callable[[], rb.Workload]) -> Rig:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    return Rig(workload=load(), device=cpu, meters=meters_for(cpu))


def measured(name: str, mode: str, load: Callable[[], rb.Workload]) -> Round:
    """Run all sizes in one child whose allocator is set to a mode."""
    host = ChildHost(functools.partial(rig_of, load), print_line, environment={"OMP_NUM_THREADS": "1", **MODES[mode]})
    try:
        trace = value_of(host.call(memory.trace))
        ratios, times = [], []
        for size in SIZES:
            traced_bytes = traced_peak_bytes(trace, size)
            point = value_of(host.call(memory.attempt, size, "approach", traced_bytes=traced_bytes, limit_bytes=2**62))
            ratios.append(point.used_bytes / traced_bytes)
            times.append(point.step_time_s)
    finally:
        host.close()
    return Round(workload=name, mode=mode, ratios=tuple(ratios), step_times_s=tuple(times))


def print_line(line: str) -> None:
    print(line, file=sys.stderr)


def value_of(outcome: object) -> object:
    if not isinstance(outcome, Completed):
        sys.exit(f"this machine must have memory for {max(SIZES)} samples; got {outcome}.")
    return outcome.value


def table_of(rounds: Sequence[Round]) -> list[dict[str, object]]:
    """One line a workload and mode: medians, with the least and the most in the rounds."""
    lines = []
    for name in dict.fromkeys(one.workload for one in rounds):
        usual = [one for one in rounds if (one.workload, one.mode) == (name, "default")]
        for mode in MODES:
            own = [one for one in rounds if (one.workload, one.mode) == (name, mode)]
            slower = [slowdown(one, beside) for one, beside in zip(own, usual, strict=True)]
            large = [one.ratios[LARGE] for one in own]
            lines.append(
                {
                    "workload": name,
                    "mode": mode,
                    "n": len(own),
                    "peak_over_traced": spread([one.ratios[place] for one in own for place in (SMALL, LARGE)]),
                    "same_again_apart": spread([one.apart for one in own]),
                    "fresh_children_apart": round(max(large) / min(large) - 1, 3),
                    "smaller_after_larger": spread([one.ratios[AFTER] for one in own]),
                    "smaller_over_larger": round(max(one.ratios[AFTER] / one.ratios[LARGE] for one in own), 3),
                    "step_time_over_default": {
                        str(size): round(statistics.median(one[place] for one in slower), 2)
                        for place, size in ((SMALL, SIZES[SMALL]), (LARGE, SIZES[LARGE]), (AFTER, SIZES[AFTER]))
                    },
                }
            )
    return lines


def slowdown(one: Round, beside: Round) -> list[float]:
    return [mine / theirs for mine, theirs in zip(one.step_times_s, beside.step_times_s, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "least": round(min(values), 3), "most": round(max(values), 3)}


def goals_of(rounds: Sequence[Round]) -> list[Goal]:
    tight = [one for one in rounds if one.mode == "tight"]
    apart = max(one.apart for one in tight)
    grown = max(one.ratios[AFTER] / one.ratios[LARGE] for one in tight)
    found = (
        ("tight: the same size again, most apart", apart, MOST_APART),
        ("tight: smaller after larger over larger, most", grown, MOST_GROWN),
    )
    return [
        {"name": name, "value": round(value, 4), "unit": "", "goal": f"<= {most}", "holds": value <= most} for name, value, most in found
    ]


def print_table(lines: Sequence[dict[str, object]]) -> None:
    for line in lines:
        print(f"{line['workload']}, {line['mode']} (n = {line['n']})")
        for name in ("peak_over_traced", "same_again_apart", "fresh_children_apart", "smaller_after_larger", "step_time_over_default"):
            print(f"  {name.replace('_', ' '):24}{line[name]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10, in a form that examples/cifar10.py reads")
    parser.add_argument("--workloads", type=Path, help="file of functions that return a Workload, instead of the example")
    parser.add_argument("--rounds", type=int, default=4, help="children of each mode")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    start_s = time.perf_counter()
    loads: dict[str, Callable[[], rb.Workload]] = {"cifar10": functools.partial(example, options.data)}
    if options.workloads is not None:
        path = options.workloads.resolve()
        loads = {name: functools.partial(named_workload, path, name) for name in workloads_of(path)[0]}
    rounds = [measured(name, mode, load) for name, load in loads.items() for _ in range(options.rounds) for mode in MODES]
    lines, goals = table_of(rounds), goals_of(rounds)
    environment = {
        "device": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": 1,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "libc": platform.libc_ver()[1]},
        "date": datetime.now(UTC).date().isoformat(),
        "n": options.rounds,
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    if options.json:
        print(json.dumps({"goals": goals, "rows": lines, "environment": environment}, indent=2))
    else:
        print_table(lines)
        print_goals(goals, environment)
    return exit_code(goals)


def named_workload(path: Path, name: str) -> rb.Workload:
    return workloads_of(path)[0][name]


if __name__ == "__main__":
    sys.exit(main())
