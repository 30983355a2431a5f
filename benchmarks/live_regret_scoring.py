"""From trainings and seconds a sample to regrets, the sweep's cost, and the critical batch size of a sweep: arithmetic only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

import numpy as np

from goals import Goal
from live_regret_truth import Training, Tuned
from rightbatch.records.estimates import Estimate
from rightbatch.records.measurements import GradientNoiseMeasurements
from rightbatch.records.plan import Findings

BOOTSTRAPS = 500
MOST_MEAN_REGRET, MOST_WORST_REGRET, MOST_COST, MOST_VERIFIED_REGRET = 0.10, 0.25, 0.10, 0.05
FIND, VERIFY = "find", "find --verify"
_GRID = 800


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A size and a rate that somebody would train with, and what it cost to know them."""

    name: str
    size: int
    lr: float
    timed_size: int
    """Size whose seconds a sample count: the micro-batch where gradients are accumulated."""
    cost_s: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The time to the target of a policy over that of the sweep's best."""

    policy: Policy
    seconds: float | None
    """Mean over the seeds; none when one of them did not reach the target."""
    relative: float
    """A lower bound where the target was not reached."""
    standard_error: float | None
    cost_share: float
    """Cost of the policy over the sweep's."""

    @property
    def reached(self) -> bool:
        """Whether every seed reached the target."""
        return self.seconds is not None

    @property
    def regret(self) -> float:
        """Excess over the sweep's best; a lower bound where the target was not reached."""
        return self.relative - 1


@dataclass(frozen=True, kw_only=True)
class Hyperbola:
    """E(b) = E_min (1 + b / B_crit) through a tuned sweep."""

    critical_batch_size: float
    low: float
    high: float
    """95 % interval, seeds resampled within each size; an end at the edge of what was searched means that end is open."""
    fewest_samples: float
    error: float
    """Root mean square of the residuals of log E."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """All of one workload."""

    name: str
    target: str
    tuned: tuple[Tuned, ...]
    sample_s: Mapping[int, float]
    sweep_s: float
    budget_s: float
    """Of `find`."""
    scores: tuple[Score, ...]
    """The sweep's best first."""
    missing: tuple[str, ...]
    """Policies that could not be scored, and why."""
    hyperbola: Hyperbola
    findings: Findings | None
    slowdown: float
    """Wall clock over processor time while the sizes were timed."""
    disturbances: tuple[str, ...]
    noise: tuple[GradientNoiseMeasurements, ...]
    """Along whole runs, one a seed; empty when it was not asked for."""

    @property
    def found_critical(self) -> Estimate | None:
        """The critical batch size that `find` gives."""
        return self.findings.tradeoff.critical_batch_size if self.findings is not None and self.findings.tradeoff is not None else None


def best_of(tuned: Sequence[Tuned], sample_s: Mapping[int, float]) -> Tuned:
    """The size that reaches the target soonest, in mean seconds over its seeds."""
    return min(tuned, key=lambda entry: mean(entry.samples) * sample_s[entry.size])


def cost_s(trainings: Sequence[Training], sample_s: Mapping[int, float]) -> float:
    """Seconds of all these trainings, evaluations left out."""
    return sum(training.samples_seen * sample_s[training.size] for training in trainings)


def score(policy: Policy, trainings: Sequence[Training], best: Tuned, sample_s: Mapping[int, float], sweep_s: float) -> Score:
    """Compare a policy's trainings with the best of the sweep.

    The standard error is that of a ratio of independent means; it is 0 for the best itself.

    Args:
        policy: What is scored.
        trainings: One a seed, up to the first that failed.
        best: The sweep's best.
        sample_s: Seconds a sample by size.
        sweep_s: Seconds of the sweep.
    """
    rate = sample_s[policy.timed_size]
    best_s = mean(best.samples) * sample_s[best.size]
    share = policy.cost_s / sweep_s
    reached = [training.samples_to_target for training in trainings if training.samples_to_target is not None]
    if len(reached) < len(trainings):
        failed = next(training for training in trainings if training.samples_to_target is None)
        policy = replace(policy, note="; ".join(filter(None, (policy.note, f"not with seed {failed.seed}"))))
        most = failed.samples_seen
        return Score(policy=policy, seconds=None, relative=most * rate / best_s, standard_error=None, cost_share=share)
    seconds = mean(reached) * rate
    is_best = policy.size == best.size and tuple(reached) == best.samples
    error = 0.0 if is_best else math.hypot(_relative_error(reached), _relative_error(best.samples)) * seconds / best_s
    return Score(policy=policy, seconds=seconds, relative=seconds / best_s, standard_error=error, cost_share=share)


def _relative_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) / mean(values) if len(values) > 1 else 0.0


def fit_hyperbola(tuned: Sequence[Tuned], rng: np.random.Generator) -> Hyperbola:
    """Fit (S / S_min - 1)(E / E_min - 1) = 1 to samples by size: least squares of log E over a grid of B_crit.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.11.
    """
    sizes = np.array([entry.size for entry in tuned], dtype=np.float64)
    grid = np.geomspace(sizes.min() / 100, sizes.max() * 100, _GRID)
    shape = np.log1p(sizes[None, :] / grid[:, None])

    def fit(samples: Sequence[float]) -> tuple[float, float, float]:
        levels = np.log(np.asarray(samples))[None, :] - shape
        errors = levels.std(axis=1)
        at = int(errors.argmin())
        return float(grid[at]), float(np.exp(levels[at].mean())), float(errors[at])

    critical, fewest, error = fit([mean(entry.samples) for entry in tuned])
    resampled = [fit([float(rng.choice(entry.samples, len(entry.samples)).mean()) for entry in tuned])[0] for _ in range(BOOTSTRAPS)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Hyperbola(
        critical_batch_size=critical, low=min(float(low), critical), high=max(float(high), critical), fewest_samples=fewest, error=error
    )


def rate_saturation(tuned: Sequence[Tuned]) -> float:
    """B of the rule rate = most / (1 + B / b) through the tuned rates: where the best rate stops growing with the size, in samples.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.6.
    """
    sizes = np.array([entry.size for entry in tuned], dtype=np.float64)
    grid = np.geomspace(sizes.min() / 100, sizes.max() * 100, _GRID)
    levels = np.log([entry.lr for entry in tuned])[None, :] + np.log1p(grid[:, None] / sizes[None, :])
    return float(grid[levels.std(axis=1).argmin()])


def goals(scores: Mapping[str, Sequence[Score]]) -> list[Goal]:
    """What must hold over all workloads: means over each workload's answers first; the worst is that of any single answer."""
    found = _of(scores, FIND)
    verified = _of(scores, VERIFY)
    costs = [entry.cost_share for entry in found]
    return [
        _goal("mean regret of find", _mean_regret(scores, FIND), MOST_MEAN_REGRET, complete=_complete(found)),
        _goal("worst regret of find", max((entry.regret for entry in found), default=None), MOST_WORST_REGRET, complete=_complete(found)),
        _goal("largest cost of find over the sweep's", max(costs, default=None), MOST_COST, complete=bool(costs)),
        _goal("mean regret of find --verify", _mean_regret(scores, VERIFY), MOST_VERIFIED_REGRET, complete=_complete(verified)),
    ]


def critical_goals(rows: Sequence[Row]) -> list[Goal]:
    """Whether the interval that `find` gives holds the critical batch size of the sweep."""
    found: list[Goal] = []
    for row in rows:
        given, truth = row.found_critical, row.hyperbola.critical_batch_size
        low, high = (None, None) if given is None else (given.low, given.high)
        holds = low is not None and low <= truth and (high is None or truth <= high)
        shown = "nothing" if low is None else f"[{low:.0f}, {'inf' if high is None else f'{high:.0f}'}]"
        name = f"critical batch size of the sweep inside the interval of find, {row.name}"
        found.append({"name": name, "value": round(truth, 1), "unit": "samples", "goal": f"inside {shown}", "holds": holds})
    return found


def _of(scores: Mapping[str, Sequence[Score]], name: str) -> list[Score]:
    return [entry for entries in scores.values() for entry in entries if entry.policy.name == name]


def _complete(scores: Sequence[Score]) -> bool:
    return bool(scores) and all(entry.reached for entry in scores)


def _mean_regret(scores: Mapping[str, Sequence[Score]], name: str) -> float | None:
    regrets = [[entry.regret for entry in entries if entry.policy.name == name] for entries in scores.values()]
    return mean(map(mean, regrets)) if regrets and all(regrets) else None


def _goal(name: str, value: float | None, most: float, *, complete: bool) -> Goal:
    shown = "not available" if value is None else round(value, 4)
    return {
        "name": name,
        "value": shown,
        "unit": "ratio",
        "goal": f"<= {most:g}",
        "holds": complete and value is not None and value <= most,
    }
