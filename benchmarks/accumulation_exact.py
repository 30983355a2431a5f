"""How far accumulated gradients are from the full batch's: ours, the usual loop, Lightning, accelerate and transformers, in float64.

Run: python benchmarks/accumulation_exact.py [--peers-venv DIR] [--json]

Each tool trains the same small tagger for one epoch in the order of the data, three micro-batches of four samples a step, on cases
that differ in how many samples, tokens or class weights the micro-batches hold. The oracle takes each window as one batch, with torch's
own mean loss. ``gradient``: largest relative distance over the steps, with weights held still; ``weights``: relative distance of the
weights after the epoch with momentum; ``steps``: optimizer steps taken, where they differ from the oracle's. Below 1e-10 is rounding.
Peers run in DIR only, with their defaults; without it they are left out. Transformers runs twice: with a model that returns a mean
loss, and with one that divides by what Trainer counts in a window, as its own models do. Exit code 1: ours is not exact.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rightbatch as rb
from accumulation_loops import CASES, PEERS, TOOLS, run
from goals import Goal, exit_code, goal, print_goals

MOST = 1e-10
INSTALL = (
    "python -m venv DIR && DIR/bin/pip install torch==2.13.0 && DIR/bin/pip install -c constraints.txt lightning accelerate transformers"
)
LOOPS = Path(__file__).with_name("accumulation_loops.py")
Results = dict[str, dict[str, Any]]


def run_peer(python: Path, tool: str) -> Results:
    """Run one tool in the peers' environment."""
    done = subprocess.run(
        [str(python), str(LOOPS), tool], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        sys.exit(f"{tool} must run in {python.parents[1]}; it ended with: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}")
    results: Results = json.loads(done.stdout.splitlines()[-1])
    return results


def row(tool: str, case: str, results: dict[str, Any], oracle: dict[str, Any]) -> dict[str, object]:
    """Distances of one tool in one case."""
    steps, expected = np.array(results["gradients"]), np.array(oracle["gradients"])
    common = min(len(steps), len(expected))
    offs = [_distance(steps[index], expected[index]) for index in range(common)]
    return {
        "tool": tool,
        "case": case,
        "gradient": max(offs),
        "weights": _distance(np.array(results["weights"]), np.array(oracle["weights"])),
        "steps": len(steps),
        "oracle_steps": len(expected),
    }


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def goals_of(rows: list[dict[str, Any]]) -> list[Goal]:
    return [
        goal(f"ours, {r['case']}: {what}", r[what], "relative", f"<= {MOST}", holds=r[what] <= MOST and r["steps"] == r["oracle_steps"])
        for r in rows
        if r["tool"] == "ours"
        for what in ("gradient", "weights")
    ]


def table_line(case: str, rows: list[dict[str, Any]]) -> str:
    """One case: gradient / weights by tool."""
    cells = []
    for one in rows:
        steps = "" if one["steps"] == one["oracle_steps"] else f" {one['steps']} steps"
        cells.append(f"{one['gradient']:.0e} / {one['weights']:.0e}{steps}")
    return f"{case:22}" + "".join(f"{cell:>24}" for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-venv", type=Path, metavar="DIR", help=f"environment of the peers, made by: {INSTALL}")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    tools = [name for name in TOOLS if name != "whole" and (options.peers_venv is not None or name not in PEERS)]
    python = None if options.peers_venv is None else options.peers_venv.absolute() / "bin" / "python"
    oracle = run("whole")
    results = {tool: run_peer(python, tool) if python is not None and tool in PEERS else run(tool) for tool in tools}
    rows = [row(tool, case, results[tool][case], oracle[case]) for case in CASES for tool in tools]
    goals = goals_of(rows)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "rightbatch": rb.__version__}
    if python is not None:
        versions |= _peer_versions(python)
    environment = {
        "device": platform.processor() or platform.machine(),
        "threads": 1,
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    if options.json:
        print(json.dumps({"goals": goals, "rows": rows, "environment": environment}, indent=2))
        return exit_code(goals)
    if python is None:
        print(f"left out: {', '.join(PEERS)}; give --peers-venv DIR, made by\n  {INSTALL}")
    print(f"{'gradient / weights':22}" + "".join(f"{tool:>24}" for tool in tools))
    for case in CASES:
        print(table_line(case, [one for one in rows if one["case"] == case]))
    print_goals(goals, environment)
    return exit_code(goals)


def _peer_versions(python: Path) -> dict[str, str]:
    code = "import json, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in ('lightning', 'accelerate', 'transformers')}))"
    versions: dict[str, str] = json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)
    return versions


if __name__ == "__main__":
    sys.exit(main())
