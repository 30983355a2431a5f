"""What a way to choose a batch size costs on recorded trainings: regret, runs that never arrive, and training time."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from replay_policies import Policy
from replay_traces import Cell


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
    failing_by_workload: dict[str, float]


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
        failing_by_workload={name: float(row[1]) for name, row in means.items()},
    )
