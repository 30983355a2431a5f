"""Score ways to choose a batch size on recorded trainings: what each choice costs in time to the target, and what finding it costs.

Run: python benchmarks/replay.py --data FOLDER [--own FOLDER] [--leave-one-out] [--resamples 200] [--json]

The folder holds ``zeus.csv``, ``rcp.csv``, ``pollux_progress.csv``, or some of them, or the ``tidy.csv`` of `rightbatch sweep`; any other
traces in these formats do as well. Our own trainings (prior_traces.py) are scored too, and with --leave-one-out every workload is scored
under priors that other networks chose. One seed is drawn for every size and every resample; all policies see the same draws. Regret is
time at the chosen size over time at the best, both means over seeds, minus one; it is averaged over the cells of a workload first, then
over workloads. Cost is training time in runs of the best size. Exit code 1: a goal does not hold.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

import replay_policies as policies
from goals import Goal, exit_code, print_goals
from replay_policies import Pick, Policy, Sequential
from replay_priors import LeftOut, leave_out, score_settings
from replay_scores import Score, score
from replay_traces import Cell, NoiseTrace, read_own, read_pollux, read_rcp, read_zeus
from rightbatch import __version__
from rightbatch.fits.samples_curve import HYPERBOLA, CurvePrior, LrRegime

OWN = Path(__file__).parent / "records" / "2026-11-25_cpu_prior-traces"
MOST_RUNS = 2.5
PATIENT = 4.0
"""Where probes are counted and not their time, one is stopped only at so many times the best."""


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
    return Sequential(most_probes=probes, least_gain=-math.inf, abort=PATIENT, together=1, **options)  # type: ignore[arg-type]


def score_pollux(pairs: Sequence[tuple[Cell, NoiseTrace]]) -> dict[str, Score]:
    """One run a size, so nothing is resampled; after ours, what its answer hangs on."""
    noise = {cell.label: trace for cell, trace in pairs}
    named: dict[str, Policy] = dict(STATIC)
    seen: dict[str, Callable[[Cell, NoiseTrace], Pick]] = {
        "noise scale at the start": policies.noise_at_start,
        "noise scale, plain mean": policies.noise_plain_mean,
        "rightbatch, one run": policies.noise_of_run,
        "one run, hyperbola": partial(policies.noise_of_run, prior=HYPERBOLA),
        "one run, tuned at smallest": lambda cell, trace: policies.noise_of_run(cell, trace, tuned_at=float(cell.sizes[0])),
        "one run, c = 2": partial(policies.noise_of_run, calibration_median=2.0),
        "one run, failing counted": partial(policies.noise_of_run, counts_failing=True),
    }
    for name, choose in seen.items():
        named[name] = partial(_with_noise, choose, noise)
    return {name: score([cell for cell, _ in pairs], policy, resamples=1) for name, policy in named.items()}


def _with_noise(choose: Callable[[Cell, NoiseTrace], Pick], noise: dict[str, NoiseTrace], cell: Cell, _work: np.ndarray) -> Pick:
    return choose(cell, noise[cell.label])


@dataclass(frozen=True)
class Traces:
    """What there is to score on: public traces by their form, and our own."""

    zeus: Sequence[Cell]
    rcp: Sequence[Cell]
    pollux: Sequence[tuple[Cell, NoiseTrace]]
    own: Sequence[Cell]


def score_all(traces: Traces, resamples: int) -> dict[str, dict[str, Score]]:
    """Score all policies on every kind of traces that there is."""
    found = {}
    if traces.zeus:
        found["zeus"] = score_zeus(traces.zeus, resamples)
    if traces.rcp:
        found["rcp"] = score_rcp(traces.rcp, resamples)
    if traces.pollux:
        found["pollux"] = score_pollux(traces.pollux)
    for regime in get_args(LrRegime):
        cells = [cell for cell in traces.own if cell.regime == regime]
        if cells:
            found[f"own, {regime}"] = score_rcp(cells, resamples) if regime == "tuned" else score_zeus(cells, resamples)
    return found


def leave_each_out(traces: Traces, resamples: int) -> dict[str, list[LeftOut]]:
    """Score every workload under priors that others chose: ``left out`` by all other networks, ``own alone`` by our own of them."""
    found: dict[str, list[LeftOut]] = {"left out": [], "own alone": []}
    for regime in get_args(LrRegime):
        public = [cell for cell in (*traces.zeus, *traces.rcp) if cell.regime == regime]
        own = [cell for cell in traces.own if cell.regime == regime]
        cells = [*public, *own]
        if not cells:
            continue
        table = score_settings(cells, regime, partial(_with_priors, regime), resamples=resamples)
        found["left out"] += leave_out(table, regime, cells, cells)
        found["own alone"] += leave_out(table, regime, public, own)
    return found


def _with_priors(regime: LrRegime, priors: Mapping[LrRegime, CurvePrior]) -> Sequential:
    return counted(2, priors=priors) if regime == "tuned" else Sequential(most_runs=MOST_RUNS, priors=priors)


def goals_of(found: Mapping[str, Mapping[str, Score]], left_out: Mapping[str, Sequence[LeftOut]]) -> list[Goal]:
    """Say what was to be shown, and whether it was."""
    goals: list[Goal] = []

    def add(name: str, value: float, unit: str, most: float) -> None:
        goals.append({"name": name, "value": round(value, 4), "unit": unit, "goal": f"<= {most:.3g}", "holds": bool(value <= most)})

    def add_zeus(name: str, regret: float, cost: float, failing: float) -> None:
        add(f"{name}: regret", 100 * regret, "%", max(1.5, 60 * found["zeus"]["full one-seed sweep"].regret))
        add(f"{name}: cost", cost, "runs of the best size", MOST_RUNS)
        add(f"{name}: chosen runs that never reach the target", 100 * failing, "%", 0)

    if "zeus" in found:
        ours = found["zeus"]["rightbatch"]
        add_zeus("Zeus", ours.regret, ours.cost, ours.failing)
        for how, rows in left_out.items():
            if regrets := _of(rows, ours.by_workload):
                add_zeus(f"Zeus, {how}", *np.mean(regrets, axis=0))
    if "rcp" in found:
        peer = 100 * found["rcp"]["two end probes, hyperbola"].regret
        ours = found["rcp"]["rightbatch, 2 probes"]
        add("MLPerf, 2 probes: regret", 100 * ours.regret, "%", peer)
        add("MLPerf, 4 probes: regret", 100 * found["rcp"]["rightbatch, 4 probes"].regret, "%", 0.8 * peer)
        for how, rows in left_out.items():
            if regrets := _of(rows, ours.by_workload):
                add(f"MLPerf, 2 probes, {how}: regret", 100 * float(np.mean(regrets, axis=0)[0]), "%", peer)
    if "pollux" in found:
        add("Pollux, one run: regret", 100 * found["pollux"]["rightbatch, one run"].regret, "%", 6)
    return goals


def _of(rows: Sequence[LeftOut], workloads: Mapping[str, float]) -> list[tuple[float, float, float]]:
    """Regret, cost and failing share of some workloads; none unless all of them were left out."""
    found = [(row.regret, row.cost, row.failing) for row in rows if row.workload in workloads]
    return found if len(found) == len(workloads) else []


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


LEFT_OUT_WORDS = {
    "left out": "Each workload under the prior that all other networks chose",
    "own alone": "Public workloads under the prior that our own trainings chose, without any public trace",
}


def print_left_out(how: str, rows: Sequence[LeftOut]) -> None:
    print(f"\n{LEFT_OUT_WORDS[how]}:")
    for row in rows:
        print(
            f"  {row.workload:40}{row.regime:9}{100 * row.regret:7.1f} %, cost {row.cost:.2f}, never {100 * row.failing:.1f} %; {row.prior}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with zeus.csv, rcp.csv, pollux_progress.csv, or some of them")
    parser.add_argument("--own", type=Path, default=OWN, help="folder with the traces.csv of prior_traces.py")
    parser.add_argument("--resamples", type=int, default=200, help="draws of one seed a size, for each cell")
    parser.add_argument("--leave-one-out", action="store_true", help="also choose the priors on all other workloads, for each workload")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    data = options.data
    traces = Traces(read_zeus(data), read_rcp(data), read_pollux(data), read_own(options.own))
    if not (traces.zeus or traces.rcp or traces.pollux):
        parser.error(f"--data must name a folder with zeus.csv, rcp.csv or pollux_progress.csv; {data} has none of them.")
    found = score_all(traces, options.resamples)
    left_out = leave_each_out(traces, max(1, options.resamples // 25)) if options.leave_one_out else {}
    goals = goals_of(found, left_out)
    environment = {
        "versions": {"rightbatch": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "resamples": options.resamples,
        "date": datetime.now(UTC).date().isoformat(),
    }
    if options.json:
        scores = {name: {policy: vars(result) for policy, result in by_policy.items()} for name, by_policy in found.items()}
        rows = {how: [asdict(row) for row in of] for how, of in left_out.items()}
        print(json.dumps({"goals": goals, "scores": scores, "left_out": rows, "environment": environment}, indent=2))
    else:
        for name, by_policy in found.items():
            print_scores(name, by_policy)
        for how, of in left_out.items():
            print_left_out(how, of)
        print()
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
