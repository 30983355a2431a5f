"""The same sweep on this machine and on a cluster of two nodes that loses one of them: the same trials, each once, with the same results.

Run: python benchmarks/sweep_cluster.py [--on ray|slurm] [--workload FILE.py:FUNCTION] [--target "accuracy>=0.9"] [--noops 200] [--json]
(the processes of both nodes run on this machine; Ray: pip install 'rightbatch[ray]'; SLURM: root and Debian's slurm-wlm and munge)

The sweep is run by its command, first with --on local, then with --on ray:ADDRESS or --on slurm:PARTITION. When four of the cluster's
trials have ended and the second node works on another, that node is killed. Trials that do nothing are timed before, on both.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from goals import Goal, exit_code, goal, print_goals
from rightbatch.records.sweep import TrialResult
from rightbatch.records.sweep_folder import JOURNAL_FILE
from rightbatch.sweeps.executors import open_executor
from rightbatch.sweeps.study import SweepStudy

ENDED_BEFORE = 4
"""Trials that have ended when the node is killed."""
LEAST_TRIALS = 12
MOST_OVERHEAD_S = 1.0
_TIMES = {"training_s", "seconds_to_target"}
_POLL_S = 0.05
_LIMIT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    trials_here: int
    trials_there: int
    repeated: int
    different: int
    ended_before: int
    said: list[str]
    sweep_s: float
    noops_here_s: float
    noops_there_s: float


class Pair(Protocol):
    where: str
    variables: dict[str, str]

    def second_is_busy(self) -> bool: ...

    def lose_second(self) -> None: ...


def start_pair(kind: str) -> AbstractContextManager[Pair]:
    if kind == "ray":
        from sweep_cluster_ray import ray_pair

        return ray_pair()
    from sweep_cluster_slurm import slurm_pair

    return slurm_pair()


def start_sweep(arguments: argparse.Namespace, where: str, variables: dict[str, str], out: Path) -> "subprocess.Popen[str]":
    """Start the command of a user."""
    options = {
        "--target": arguments.target,
        "--batches": arguments.batches,
        "--seeds": str(arguments.seeds),
        "--max-samples": str(arguments.max_samples),
        "--threads": "1",
        "--device": "cpu",
        "--jobs": "2",
        "--on": where,
        "--out": str(out),
    }
    words = [word for option in options.items() for word in option]
    command = [sys.executable, "-m", "rightbatch", "sweep", arguments.workload, *words, "--json"]
    return subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(sweep: "subprocess.Popen[str]") -> str:
    """Wait for its end; return what it said on the way."""
    _, said = sweep.communicate(timeout=_LIMIT_S)
    if sweep.returncode not in {0, 5}:
        raise RuntimeError(f"the sweep ended with {sweep.returncode}: {said[-3000:]}")
    return said


def lose_a_node(pair: Pair, sweep: "subprocess.Popen[str]", journal: Path) -> int:
    """Kill the second node at the right moment; return how many trials had ended then."""
    while sweep.poll() is None:
        ended = results_in(journal)
        if ended >= ENDED_BEFORE and pair.second_is_busy():
            pair.lose_second()
            return ended
        time.sleep(_POLL_S)
    raise RuntimeError(f"the sweep ended before the node could be killed while it ran a trial: {sweep.communicate()[1][-3000:]}")


def results_of(folder: Path) -> tuple[dict[str, dict[str, object]], int]:
    """Return what each trial of a sweep came to, without its times, and how many results its journal holds beyond one a trial."""
    told = results_in(folder / JOURNAL_FILE)
    results = SweepStudy(folder).results
    return {one.spec.model_dump_json(): without_times(one) for one in results}, told - len(results)


def results_in(journal: Path) -> int:
    """Return how many results a journal holds."""
    return (
        journal.read_text().count('"user_attr": {"result"') + journal.read_text().count('"user_attr":{"result"') if journal.exists() else 0
    )


def without_times(result: TrialResult) -> dict[str, object]:
    kept = {name: value for name, value in result.model_dump(mode="json").items() if name not in _TIMES}
    kept["history"] = [(point.samples, point.value) for point in result.history]
    return kept


def do_nothing(number: int) -> int:
    return number


def time_noops(where: str, count: int) -> None:
    """Print the seconds for so many trials that do nothing, once the first one has started the processes that they share."""
    executor = open_executor(where, jobs=2 if where == "local" else None, device="cpu")
    try:
        for future in [executor.submit(do_nothing, number) for number in range(executor.slots)]:
            future.result()
        begun_s = time.perf_counter()
        numbers = Counter(future.result() for future in [executor.submit(do_nothing, number) for number in range(count)])
        seconds = time.perf_counter() - begun_s
    finally:
        executor.close()
    if numbers != Counter(range(count)):
        raise RuntimeError("a trial was lost, or came twice")
    print(json.dumps({"seconds": seconds, "slots": executor.slots}))


def noop_seconds(where: str, count: int, variables: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--time-noops", where, "--noops", str(count)]
    ended = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True, timeout=_LIMIT_S)
    return float(json.loads(ended.stdout.splitlines()[-1])["seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=("ray", "slurm"), default="ray")
    parser.add_argument("--workload", default="examples/digits.py:workload")
    parser.add_argument("--target", default="accuracy>=0.9")
    parser.add_argument("--batches", default="32,64")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--max-samples", type=int, default=20_000)
    parser.add_argument("--noops", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--time-noops", metavar="WHERE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time_noops:
        time_noops(arguments.time_noops, arguments.noops)
        return 0
    measured = measure(arguments)
    goals = goals_of(measured, arguments)
    environment = {
        "on": arguments.on,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ray" if arguments.on == "ray" else "submitit")},
    }
    if arguments.json:
        print(json.dumps({"goals": goals, "measured": asdict(measured), "environment": environment}, indent=2))
    else:
        print_goals(goals, environment)
        print(f"sweep on the cluster {measured.sweep_s:.1f} s; {arguments.noops} trials that do nothing: ", end="")
        print(f"{measured.noops_there_s:.1f} s there, {measured.noops_here_s:.1f} s here, two at once")
        print("\n".join(measured.said))
    return exit_code(goals)


def measure(arguments: argparse.Namespace) -> Measured:
    with tempfile.TemporaryDirectory(prefix="rb-") as folder, start_pair(arguments.on) as pair:
        noops_there_s = noop_seconds(pair.where, arguments.noops, pair.variables)
        noops_here_s = noop_seconds("local", arguments.noops, {})
        here, there = Path(folder, "local"), Path(folder, "cluster")
        finish(start_sweep(arguments, "local", {}, here))
        begun_s = time.perf_counter()
        sweep = start_sweep(arguments, pair.where, pair.variables, there)
        try:
            ended_before = lose_a_node(pair, sweep, there / JOURNAL_FILE)
            said = finish(sweep)
        finally:
            sweep.kill()
        sweep_s = time.perf_counter() - begun_s
        (wanted, _), (got, repeated) = results_of(here), results_of(there)
    return Measured(
        trials_here=len(wanted),
        trials_there=len(got),
        repeated=repeated,
        different=sum(got.get(spec) != wanted.get(spec) for spec in wanted.keys() | got.keys()),
        ended_before=ended_before,
        said=[line for line in said.splitlines() if "lost" in line],
        sweep_s=sweep_s,
        noops_here_s=noops_here_s,
        noops_there_s=noops_there_s,
    )


def goals_of(found: Measured, arguments: argparse.Namespace) -> list[Goal]:
    goals = [
        goal("trials completed here", found.trials_here, "trials", f">= {LEAST_TRIALS}", holds=found.trials_here >= LEAST_TRIALS),
        goal("trials completed there", found.trials_there, "trials", f">= {LEAST_TRIALS}", holds=found.trials_there >= LEAST_TRIALS),
        goal(
            "trials ended when the node was killed, while it ran another",
            found.ended_before,
            "trials",
            f">= {ENDED_BEFORE}, < all",
            holds=ENDED_BEFORE <= found.ended_before < found.trials_there,
        ),
        goal("results told more than once", found.repeated, "results", "0", holds=found.repeated == 0),
        goal("trials missing, or with another result than here", found.different, "trials", "0, bit for bit", holds=found.different == 0),
    ]
    if arguments.on == "ray":  # a job of SLURM starts its own Python and torch
        each_s = 2 * found.noops_there_s / arguments.noops
        goals.append(goal("Ray's own time a trial", round(each_s, 3), "s a slot", "<= 1 (5 % of 20 s)", holds=each_s <= MOST_OVERHEAD_S))
    return goals


if __name__ == "__main__":
    sys.exit(main())
