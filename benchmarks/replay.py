"""Score ways to choose a batch size on recorded trainings: what each choice costs in time to the target, and what finding it costs.

Run: python benchmarks/replay.py --data FOLDER [--leave-one-out] [--resamples 200] [--json]

The folder holds ``zeus.csv``, ``rcp.csv``, ``pollux_progress.csv``, or some of them, or the ``tidy.csv`` of `rightbatch sweep`; any other
traces in these formats do as well. One seed
is drawn for every size and every resample; all policies see the same draws. Regret is time at the chosen size over time at the best, both
means over seeds, minus one; it is averaged over the cells of a workload first, then over workloads. Cost is training time in runs of the
best size. Exit code 1: a goal does not hold.
"""

import argparse
import json
import math
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

import replay_policies as policies
from goals import Goal, exit_code, print_goals
from replay_policies import Pick, Policy, Sequential
from replay_traces import Cell, NoiseTrace, read_pollux, read_rcp, read_zeus
from rightbatch import __version__
from rightbatch.fits.samples_curve import PRIORS, CurvePrior, LrRegime

MOST_RUNS = 2.5
PATIENT = 4.0
"""Where probes are counted and not their time, one is stopped only at so many times the best."""


@dataclass(frozen=True)
class Score:
    """What a policy does on some cells: figures of the macro mean but where it says otherwise."""

    regret: float
    median: float
    """Over cells and resamples, all alike."""
    p90: float
    failing: float
    """Share of runs at the chosen size that never reach the target."""
    cost: float
    probes: float
    by_workload: dict[str, float]
    cost_by_workload: dict[str, float]


def score(cells: Sequence[Cell], policy: Policy, *, resamples: int, seed: int = 0) -> Score:
    """Apply a policy to every cell, with one seed of every size drawn ``resamples`` times."""
    rng = np.random.default_rng(seed)
    groups: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    everything: list[float] = []
    for cell in cells:
        time_s, failing = cell.time_s, cell.failing_share
        best = float(time_s.min())
        picks = [policy(cell, np.array([rng.choice(runs) for runs in cell.work])) for _ in range(resamples)]
        regrets = [float(time_s[pick.index]) / best - 1 for pick in picks]
        everything += regrets
        finite = [regret for regret in regrets if math.isfinite(regret)]
        groups[cell.workload].append(
            (
                float(np.mean(finite)) if finite else math.inf,
                float(np.mean([failing[pick.index] for pick in picks])),
                float(np.mean([pick.seconds for pick in picks])) / best,
                float(np.mean([pick.probes for pick in picks])),
            )
        )
    means = {name: np.mean(rows, axis=0) for name, rows in groups.items()}
    regret, failing_share, cost, probes = np.mean(list(means.values()), axis=0)
    return Score(
        regret=float(regret),
        median=float(np.median(everything)),
        p90=float(np.quantile(everything, 0.9, method="higher")),
        failing=float(failing_share),
        cost=float(cost),
        probes=float(probes),
        by_workload={name: float(row[0]) for name, row in means.items()},
        cost_by_workload={name: float(row[2]) for name, row in means.items()},
    )


TRAINING = {"two end probes, hyperbola": policies.hyperbola, "full one-seed sweep": policies.sweep}
STATIC = {
    "largest": policies.largest,
    "smallest": policies.smallest,
    "best throughput": policies.best_throughput,
    "knee": policies.knee,
    "128": policies.always_128,
}


def score_zeus(cells: Sequence[Cell], resamples: int) -> dict[str, Score]:
    """Our design stops by itself, within the goal for its cost; it is told whether the rate was the same at all sizes."""
    named: dict[str, Policy] = {**STATIC, **TRAINING, "rightbatch": Sequential(most_runs=MOST_RUNS)}
    return {name: score(cells, policy, resamples=resamples) for name, policy in named.items()}


def score_rcp(cells: Sequence[Cell], resamples: int) -> dict[str, Score]:
    """Our design trains so many sizes, whatever they cost."""
    named: dict[str, Policy] = {**STATIC, **TRAINING}
    named |= {f"rightbatch, {count} probes": counted(count) for count in (2, 4)}
    return {name: score(cells, policy, resamples=resamples) for name, policy in named.items()}


def counted(probes: int, **options: object) -> Sequential:
    return Sequential(most_probes=probes, least_gain=-math.inf, abort=PATIENT, **options)  # type: ignore[arg-type]


def score_pollux(pairs: Sequence[tuple[Cell, NoiseTrace]]) -> dict[str, Score]:
    """One run a size, so nothing is resampled."""
    noise = {cell.label: trace for cell, trace in pairs}
    named: dict[str, Policy] = dict(STATIC)
    seen: dict[str, Callable[[Cell, NoiseTrace], Pick]] = {
        "noise scale at the start": policies.noise_at_start,
        "noise scale, plain mean": policies.noise_plain_mean,
        "rightbatch, one run": policies.noise_of_run,
    }
    for name, choose in seen.items():
        named[name] = partial(_with_noise, choose, noise)
    return {name: score([cell for cell, _ in pairs], policy, resamples=1) for name, policy in named.items()}


def _with_noise(choose: Callable[[Cell, NoiseTrace], Pick], noise: dict[str, NoiseTrace], cell: Cell, _work: np.ndarray) -> Pick:
    return choose(cell, noise[cell.label])


GRID = {
    "heat": (0.0, 0.3, 0.6),
    "critical_over_middle": (3.0, 10.0, 30.0),
    "discrepancy_sd": (0.08, 0.15),
}
"""What leaving workloads out chooses the priors from; where the curve bends at small sizes is argued, not chosen (theory page)."""


def leave_one_out(cells: Sequence[Cell], resamples: int, make: Callable[..., Sequential]) -> dict[str, tuple[float, float, str]]:
    """Regret and cost of each workload under the settings of ``GRID`` that are best on all the others, whatever their regime."""
    workloads = sorted({cell.workload for cell in cells})
    table: dict[tuple[float, ...], Score] = {}
    for values in product(*GRID.values()):
        changed: dict[LrRegime, CurvePrior] = {
            regime: replace(prior, **dict(zip(GRID, values, strict=True))) for regime, prior in PRIORS.items()
        }
        table[values] = score(cells, make(priors=changed), resamples=resamples)
    found = {}
    for left_out in workloads:
        others = [name for name in workloads if name != left_out]
        best = min(table, key=lambda values: float(np.mean([table[values].by_workload[name] for name in others])))
        chosen = ", ".join(f"{name} {value:g}" for name, value in zip(GRID, best, strict=True))
        found[left_out] = (table[best].by_workload[left_out], table[best].cost_by_workload[left_out], chosen)
    return found


def goals_of(found: dict[str, dict[str, Score]]) -> list[Goal]:
    goals: list[Goal] = []

    def add(name: str, value: float, unit: str, most: float) -> None:
        goals.append({"name": name, "value": round(value, 4), "unit": unit, "goal": f"<= {most:.3g}", "holds": bool(value <= most)})

    if "zeus" in found:
        ours = found["zeus"]["rightbatch"]
        add("Zeus: regret", 100 * ours.regret, "%", max(1.5, 60 * found["zeus"]["full one-seed sweep"].regret))
        add("Zeus: cost", ours.cost, "runs of the best size", MOST_RUNS)
        add("Zeus: chosen runs that never reach the target", 100 * ours.failing, "%", 0)
    if "rcp" in found:
        peer = 100 * found["rcp"]["two end probes, hyperbola"].regret
        add("MLPerf, 2 probes: regret", 100 * found["rcp"]["rightbatch, 2 probes"].regret, "%", peer)
        add("MLPerf, 4 probes: regret", 100 * found["rcp"]["rightbatch, 4 probes"].regret, "%", 0.8 * peer)
    if "pollux" in found:
        add("Pollux, one run: regret", 100 * found["pollux"]["rightbatch, one run"].regret, "%", 6)
    return goals


def score_all(
    zeus: Sequence[Cell], rcp: Sequence[Cell], pollux: Sequence[tuple[Cell, NoiseTrace]], resamples: int
) -> dict[str, dict[str, Score]]:
    found = {}
    if zeus:
        found["zeus"] = score_zeus(zeus, resamples)
    if rcp:
        found["rcp"] = score_rcp(rcp, resamples)
    if pollux:
        found["pollux"] = score_pollux(pollux)
    return found


def leave_each_out(zeus: Sequence[Cell], rcp: Sequence[Cell], resamples: int) -> dict[str, dict[str, tuple[float, float, str]]]:
    named = {"zeus": (zeus, partial(Sequential, most_runs=MOST_RUNS)), "rcp, 2 probes": (rcp, partial(counted, 2))}
    enough = {name: pair for name, pair in named.items() if len({cell.workload for cell in pair[0]}) > 1}
    return {name: leave_one_out(cells, resamples, make) for name, (cells, make) in enough.items()}


def print_scores(name: str, scores: dict[str, Score]) -> None:
    workloads = next(iter(scores.values())).by_workload
    print(f"\n{name}: {len(workloads)} workloads\n{'policy':30}{'regret':>9}{'median':>9}{'p90':>9}{'never':>8}{'cost':>7}{'probes':>8}")
    for policy, result in scores.items():
        figures = (result.regret, result.median, result.p90)
        percents = "".join(f"{100 * value:8.1f}%" if math.isfinite(value) else f"{'never':>9}" for value in figures)
        print(f"{policy:30}{percents}{100 * result.failing:7.1f}%{result.cost:7.2f}{result.probes:8.2f}")
    ours = [(policy, result) for policy, result in scores.items() if policy.startswith("rightbatch")]
    for policy, result in ours:
        print(f"  {policy}: " + ", ".join(f"{workload} {100 * value:.1f} %" for workload, value in result.by_workload.items()))


def print_left_out(name: str, found: dict[str, tuple[float, float, str]]) -> None:
    print(f"\n{name}, each workload left out of what its prior is chosen on:")
    for workload, (regret, cost, prior) in found.items():
        print(f"  {workload:30}{100 * regret:7.1f} %, cost {cost:.2f}; {prior}")
    print(f"  {'macro mean':30}{100 * float(np.mean([row[0] for row in found.values()])):7.1f} %")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with zeus.csv, rcp.csv, pollux_progress.csv, or some of them")
    parser.add_argument("--resamples", type=int, default=200, help="draws of one seed a size, for each cell")
    parser.add_argument("--leave-one-out", action="store_true", help="also choose the priors on all other workloads, for each workload")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    zeus, rcp, pollux = read_zeus(options.data), read_rcp(options.data), read_pollux(options.data)
    if not (zeus or rcp or pollux):
        parser.error(f"--data must name a folder with zeus.csv, rcp.csv or pollux_progress.csv; {options.data} has none of them.")
    found = score_all(zeus, rcp, pollux, options.resamples)
    left_out = leave_each_out(zeus, rcp, max(1, options.resamples // 8)) if options.leave_one_out else {}
    goals = goals_of(found)
    environment = {
        "versions": {"rightbatch": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "resamples": options.resamples,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if options.json:
        scores = {name: {policy: vars(result) for policy, result in by_policy.items()} for name, by_policy in found.items()}
        print(json.dumps({"goals": goals, "scores": scores, "left_out": left_out, "environment": environment}, indent=2))
    else:
        for name, by_policy in found.items():
            print_scores(name, by_policy)
        for name, rows in left_out.items():
            print_left_out(name, rows)
        print()
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
