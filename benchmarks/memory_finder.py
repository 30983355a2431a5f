"""Memory finders side by side, within the same limits: probes, samples, out-of-memory errors, and what was found of the true ceiling.

Run: python benchmarks/memory_finder.py [--workloads FILE.py] [--peers-venv DIR] [--json]

Ours, without and with proof, against Lightning's batch size scaler (power and binsearch), accelerate's find_executable_batch_size,
batch-finder, and plain doubling and bisection, each with its defaults. On a simulated device that is out of memory above K samples; within
a budget of resident memory (``tight`` malloc, which makes it repeatable); and within RLIMIT_AS (malloc as it is). Every search runs in a
process of its own, one after the other. The true ceiling of a real limit is the largest size that ran in each of --repeats fresh processes.

A probe is an attempt at one size: two steps of ours, as many as the peer takes of theirs. Our few tiny recordings before are none, but
their samples count. ``oom``: errors of running out of memory; ``over``: sizes of ours that ran and were measured to need more than the
budget, where peers get an error. Peers are imported in DIR only; without it they are left out. Exit code 1: a goal does not hold.
"""

import argparse
import gc
import hashlib
import json
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

import rightbatch as rb
from finder_tools import OURS, PEERS, Task, searched, simulated
from goals import Goal, exit_code, goal, print_goals
from rightbatch.engine.isolation import InProcessHost
from rightbatch.tuner.measuring import MALLOC_SETTINGS
from rightbatch.units import MIB
from workload_files import workloads_of

FOLDER = Path(__file__).resolve().parent
ARCHITECTURES, DEFAULT_NAME = FOLDER / "architectures.py", "batch_norm"
CEILINGS = (7, 37, 200, 1000, 3000, 10_000)
BUDGETS_MIB = {"resident": (50, 100, 200), "address space": (150, 300, 600)}
LEAST_SHARE = {"resident": 0.97, "address space": 0.8}
"""Of the true ceiling. Where the kernel refuses, malloc's own use varies by a third between processes, and no refusal goes before size."""
MODES = {"device": "default", "resident": "tight", "address space": "default"}
"""Of malloc, by limit."""
WITHOUT_INSTALLING = ("bisection",)
INSTALL = (
    "python -m venv DIR && DIR/bin/pip install torch==2.13.0 && DIR/bin/pip install -c constraints.txt . lightning accelerate batch-finder"
)
PEER_PACKAGES = ("lightning", "accelerate", "batch-finder", "torch")
STATE_CEILING, STATE_SEARCHES = 5, 100
LIMIT_S = 1200.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload within one limit; ``value`` is a ceiling in samples or a budget in bytes."""

    workload: str
    limit: str
    value: int

    @property
    def title(self) -> str:
        what = f"{self.value} samples" if self.limit == "device" else f"{self.value // MIB} MiB"
        return f"{self.workload}, {self.limit} {what}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one tool did within one limit."""

    case: Case
    tool: str
    truth: int
    result: dict[str, object]

    @property
    def share(self) -> float:
        """Found over true ceiling."""
        return float(str(self.result["found"])) / max(self.truth, 1)

    def number(self, name: str) -> int:
        return int(str(self.result[name]))


def run_tool(cases: Sequence[Case], tool: str, workloads: Path, python: str) -> list[dict[str, object]]:
    """Run a tool on cases of one kind of limit in one child process."""
    settings = MALLOC_SETTINGS[MODES[cases[0].limit]]
    environment = {
        **os.environ,
        **settings,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(FOLDER.parent / "src"), str(FOLDER))),
    }
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            {
                "tool": tool,
                "workloads": str(workloads),
                "name": case.workload,
                "limit": case.limit,
                "value": case.value,
                "log": f"{folder}/log",
            }
            for case in cases
        ]
        command = [python, str(FOLDER / "finder_tools.py"), *map(json.dumps, tasks)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S * len(cases))
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return [{"missing": f"ended with status {ended.returncode}: {last}"} for _ in cases]
    results: list[dict[str, object]] = json.loads(ended.stdout.strip().splitlines()[-1])
    return results


def rows_of(names: Sequence[str], options: argparse.Namespace, peers_python: str | None) -> Iterator[Row]:
    """Run every tool within every limit."""
    tools = [*OURS, *(tool for tool in PEERS if tool in WITHOUT_INSTALLING or peers_python)]
    for name in names:
        devices = [Case(workload=name, limit="device", value=value) for value in options.ceilings]
        for tool in tools if "device" in options.limits else ():
            python = sys.executable if tool in OURS or tool in WITHOUT_INSTALLING else str(peers_python)
            for case, result in zip(devices, run_tool(devices, tool, options.workloads, python), strict=True):
                yield Row(case=case, tool=tool, truth=case.value, result=result)
        for limit, budgets in ((limit, budgets) for limit, budgets in BUDGETS_MIB.items() if limit in options.limits):
            for case in [Case(workload=name, limit=limit, value=budget * MIB) for budget in budgets]:
                truth = true_ceiling(case, options)
                for tool in tools:
                    python = sys.executable if tool in OURS or tool in WITHOUT_INSTALLING else str(peers_python)
                    yield Row(case=case, tool=tool, truth=truth, result=run_tool([case], tool, options.workloads, python)[0])


def true_ceiling(case: Case, options: argparse.Namespace) -> int:
    """Largest size that runs in each of several fresh processes."""
    found = [run_tool([case], "truth", options.workloads, sys.executable)[0] for _ in range(options.repeats)]
    if any("found" not in result for result in found):
        sys.exit(f"the true ceiling of {case.title} must be found; got {found}.")
    return min(int(str(result["found"])) for result in found)


def states_kept(name: str, workloads: Path) -> int:
    """Search with proof in this process, beside a model in training; return how often that was left bit for bit as it was."""
    model = nn.Linear(8, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    kept = 0
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        gc.freeze()  # every reading of memory collects, and would walk through all of torch
        for ceiling in range(STATE_CEILING, STATE_CEILING + STATE_SEARCHES):
            task = Task(
                tool="rightbatch --certify", workloads=str(workloads), name=name, limit="device", value=ceiling, log=f"{folder}/log"
            )
            device, rig = simulated(task)
            before = digest(model, optimizer)
            with device:
                found = searched(task, InProcessHost(lambda rig=rig: rig, sys.stderr.write))["found"]  # type: ignore[misc]
            kept += digest(model, optimizer) == before and found == ceiling
    return kept


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 of parameters, gradients, optimizer state and every random state."""
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes())  # noqa: NPY002
    return hashlib.sha256(pickle.dumps(([tensor.detach().numpy().tobytes() for tensor in tensors], states))).hexdigest()


def goals_of(rows: Sequence[Row], kept: int) -> list[Goal]:
    """What must hold of our rows."""
    ours = [row for row in rows if row.tool in OURS]
    proved = [row for row in ours if OURS[row.tool]]
    alone = [row for row in ours if not OURS[row.tool]]
    probes = [row.number("probes") for row in proved]
    goals: list[Goal] = [
        goal("probes with proof, median", statistics.median(probes), "", "<= 4", holds=statistics.median(probes) <= 4),
        goal("probes with proof, most", max(probes), "", "<= 6", holds=max(probes) <= 6),
    ]
    device = [row.share for row in ours if row.case.limit == "device"]
    if device:
        goals.append(goal("found of the true ceiling on the simulated device, least", min(device), "", "1", holds=min(device) == 1))
    for limit, mode in ((limit, MODES[limit]) for limit in dict.fromkeys(row.case.limit for row in rows)):
        errors = sum(row.number("out_of_memory_errors") for row in alone if row.case.limit == limit)
        goals.append(goal(f"out-of-memory errors without proof, {limit}, {mode} malloc", errors, "", "0", holds=errors == 0))
        share = statistics.median(row.share for row in ours if row.case.limit == limit)
        if limit != "device":
            least = LEAST_SHARE[limit]
            name = f"found of the true ceiling, {limit}, {mode} malloc, median"
            goals.append(goal(name, round(share, 3), "", f">= {least}", holds=share >= least))
    ran = sum(bool(row.result["ever_ran"]) for row in ours)
    goals.append(goal("ceilings that were run", ran, f"of {len(ours)}", "all", holds=ran == len(ours)))
    goals.append(goal("searches in this process that left it as it was", kept, f"of {STATE_SEARCHES}", "all", holds=kept == STATE_SEARCHES))
    return goals


def print_row(row: Row) -> None:
    if "missing" in row.result:
        print(f"{row.case.title:40}{row.tool:24}{row.result['missing']}", flush=True)
        return
    cells = "".join(f"{row.number(name):>9}" for name in ("probes", "samples", "out_of_memory_errors", "over_limit", "found"))
    ran = "yes" if row.result["ever_ran"] else "no"
    print(f"{row.case.title:40}{row.tool:24}{cells}{row.truth:>8}{row.share:>8.3f}  {ran}", flush=True)


def print_medians(rows: Sequence[Row]) -> None:
    for limit in MODES:
        print(f"medians, {limit}:")
        for tool in dict.fromkeys(row.tool for row in rows):
            of_tool = [row for row in rows if row.tool == tool and row.case.limit == limit and "missing" not in row.result]
            if of_tool:
                numbers = [statistics.median(row.number(name) for row in of_tool) for name in ("probes", "samples", "out_of_memory_errors")]
                share = statistics.median(row.share for row in of_tool)
                ran = sum(bool(row.result["ever_ran"]) for row in of_tool)
                words = "probes {:g}, samples {:g}, out of memory {:g}".format(*numbers)
                print(f"  {tool:24}{words}, found/true {share:.3f}, sizes that ran {ran} of {len(of_tool)}")


def environment_of(options: argparse.Namespace, python: str | None, rows: Sequence[Row], seconds: float) -> dict[str, object]:
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rightbatch": rb.__version__,
        "libc": platform.libc_ver()[1],
    }
    if python is not None:
        code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PEER_PACKAGES!r}}}))"
        versions |= json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {
        "device": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": 1,
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
        "n": len(rows),
        "true_ceiling_repeats": options.repeats,
        "seconds": round(seconds, 1),
    }


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=Path, help="file of functions that return a Workload; all of them are run")
    parser.add_argument("--peers-venv", type=Path, metavar="DIR", help=f"environment of the peers, made by: {INSTALL}")
    parser.add_argument("--ceilings", type=lambda text: tuple(map(int, text.split(","))), default=CEILINGS, help="of the simulated device")
    parser.add_argument("--limits", nargs="+", choices=list(MODES), default=list(MODES), help="which to run")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes in which a size must run to be below a true ceiling")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser.parse_args()


def main() -> int:
    options = options_given()
    names = [DEFAULT_NAME] if options.workloads is None else list(workloads_of(options.workloads)[0])
    options.workloads = (options.workloads or ARCHITECTURES).resolve()
    python = None if options.peers_venv is None else str(options.peers_venv.absolute() / "bin" / "python")
    start_s = time.perf_counter()
    if not options.json:
        if python is None:
            missing = ", ".join(tool for tool in PEERS if tool not in WITHOUT_INSTALLING)
            print(f"left out: {missing}; give --peers-venv DIR, made by\n  {INSTALL}")
        print(f"{'limit':40}{'finder':24}{'probes':>9}{'samples':>9}{'oom':>9}{'over':>9}{'found':>9}{'true':>8}{'share':>8}  ran")
    rows = []
    for row in rows_of(names, options, python):
        rows.append(row)
        if not options.json:
            print_row(row)
    goals = goals_of(rows, states_kept(names[0], options.workloads))
    environment = environment_of(options, python, rows, time.perf_counter() - start_s)
    if options.json:
        table = [{"limit": row.case.title, "finder": row.tool, "true": row.truth, **row.result} for row in rows]
        print(json.dumps({"goals": goals, "rows": table, "environment": environment}, indent=2))
    else:
        print_medians(rows)
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
