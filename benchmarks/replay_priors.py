"""Priors chosen by regime on recorded trainings, each scored on networks that had no part in the choice.

For every regime (how the learning rate goes with the size) each setting of its knobs is scored once on all workloads of that regime, our
own and public ones. A workload is then scored under the setting that is best on the workloads of all other networks; and, more strictly,
under the one that is best on our own workloads of other networks, with no public trace seen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from replay_policies import Policy
from replay_scores import Score, score
from replay_traces import Cell
from rightbatch.fits.samples_curve import PRIORS, CurvePrior, LrRegime
from rightbatch.recommend.probing import LARGEST_COST

Knobs = Mapping[str, tuple[float, ...]]
Values = tuple[float, ...]
Make = Callable[[Mapping[LrRegime, CurvePrior]], Policy]
"""The policy that is to be scored, with these priors."""

KNOBS: dict[LrRegime, Knobs] = {
    "tuned": {"critical_over_middle": (3.0, 10.0), "discrepancy_sd": (0.08, 0.15)},
    "coupled": {"critical_over_middle": (3.0, 10.0), "low_over_middle": (0.01, 0.03, 0.1)},
    "fixed": {"critical_over_middle": (1.0, 5.0, 10.0), "low_over_middle": (0.3, 1.0)},
}
"""What is chosen from; what is the same in all was argued, or made no difference (theory page)."""


@dataclass(frozen=True)
class LeftOut:
    """A workload under the prior that other networks chose."""

    workload: str
    regime: LrRegime
    regret: float
    cost: float
    failing: float
    prior: str
    """The values of its knobs, in words."""


def score_settings(cells: Sequence[Cell], regime: LrRegime, make: Make, *, resamples: int) -> dict[Values, Score]:
    """Score every setting of the regime's knobs, from the cells of that regime."""
    knobs = KNOBS[regime]
    table = {}
    for values in product(*knobs.values()):
        prior = replace(PRIORS[regime], **dict(zip(knobs, values, strict=True)))
        table[values] = score(cells, make({**PRIORS, regime: prior}), resamples=resamples)
    return table


def loss(scored: Score, workloads: Sequence[str]) -> float:
    """Mean regret over some workloads, where a run that never arrives counts as the largest cost there is."""
    return float(np.mean([scored.by_workload[name] + scored.failing_by_workload[name] * (LARGEST_COST - 1) for name in workloads]))


def best_setting(table: Mapping[Values, Score], workloads: Sequence[str]) -> Values:
    """The setting of least loss on some workloads."""
    return min(table, key=lambda values: loss(table[values], workloads))


def leave_out(table: Mapping[Values, Score], regime: LrRegime, scored: Sequence[Cell], basis: Sequence[Cell]) -> list[LeftOut]:
    """Score each workload under the setting that is best on the basis without the workload's own network.

    Args:
        table: Scores of every setting, on the scored and the basis alike.
        regime: Of all these cells.
        scored: Cells to score.
        basis: Cells to choose by.
    """
    found = []
    for workload, network in {cell.workload: cell.network for cell in scored}.items():
        others = sorted({cell.workload for cell in basis if cell.network != network})
        if not others:
            continue
        values = best_setting(table, others)
        words = ", ".join(f"{name} {value:g}" for name, value in zip(KNOBS[regime], values, strict=True))
        under = table[values]
        figures = (under.by_workload[workload], under.cost_by_workload[workload], under.failing_by_workload[workload])
        found.append(LeftOut(workload, regime, *figures, words))
    return found
