"""Which size to train next to learn most for the time it takes, and which size to choose after training probes."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TypeAlias

import numpy as np

from rightbatch.fits.intervals import FloatArray
from rightbatch.fits.samples_curve import CurveDraws, CurvePosterior, weigh
from rightbatch.records.training import ProbeOutcome, TrainingProbe

LARGEST_COST = 4.0
"""No size counts as more than this many times the best: whoever trains there notices."""
LEAST_GAIN = 0.03
"""A probe must remove this much expected regret for each run of the best size that it takes, or probing ends."""
_CHEAPEST = 0.05
_PARTICLES = 384
_OUTCOMES = 32
_SEED = 1


Setting: TypeAlias = tuple[int, float]
"""A global batch size, and its learning rate over the rule's."""


@dataclass(frozen=True)
class Candidates:
    """The sizes that can be trained, and what is believed of them.

    Attributes:
        sizes: Global batch sizes in samples, ascending, shape (sizes,).
        log_time: Log seconds a sample, shape (draws, sizes) or (1, sizes).
        curves: Draws of the samples to the target of a probe.
        run: The same draws for the run that the choice is for, where that is another than the probes'; none: it is theirs.
    """

    sizes: FloatArray
    log_time: FloatArray
    curves: CurveDraws
    run: CurveDraws | None = None
    lr_over_rule: FloatArray | None = None
    """Learning rate of each candidate over the rule's for its size, shape (sizes,); none: 1."""
    log_error: float = 0.0
    """Standard error of the log samples that a probe comes to, beside the scatter between seeds."""

    @cached_property
    def settings(self) -> tuple["Setting", ...]:
        """Size and rate of each candidate."""
        return tuple(zip(self.sizes.astype(int).tolist(), self._rates.tolist(), strict=True))

    @property
    def _rates(self) -> FloatArray:
        return np.ones(len(self.sizes)) if self.lr_over_rule is None else self.lr_over_rule

    @cached_property
    def log_samples(self) -> FloatArray:
        """Log E / E_min of each draw at each candidate."""
        return self._log_samples(self.curves)

    @cached_property
    def costs(self) -> FloatArray:
        """Mean time to the target over that of each draw's best size, shape (draws, sizes), at most ``LARGEST_COST``."""
        curves = self.run or self.curves
        log_cost = self._log_samples(curves) + curves.log_straggling(self.sizes) + self.log_time
        log_cost = np.where(curves.fails(self.sizes), math.inf, log_cost)
        best = log_cost.min(axis=1, keepdims=True)
        relative = np.where(np.isfinite(best), log_cost - np.where(np.isfinite(best), best, 0.0), math.log(LARGEST_COST))
        return np.asarray(np.exp(np.minimum(relative, math.log(LARGEST_COST))))

    def _log_samples(self, curves: CurveDraws) -> FloatArray:
        sizes, places = np.unique(self.sizes, return_inverse=True)  # each stands there with several rates
        return curves.log_samples(sizes)[:, places] + curves.log_rate_cost(self.sizes, self._rates)


@dataclass(frozen=True)
class Proposal:
    """A size worth training next.

    Attributes:
        index: Which candidate.
        regret_removed: How much less expected regret its result should leave.
        cost: What it should take, in runs of the best size so far.
    """

    index: int
    regret_removed: float
    cost: float


@dataclass(frozen=True)
class ProbedChoice:
    """The size to take after the probes.

    Attributes:
        index: Which candidate.
        regret: Its expected excess over the best size.
    """

    index: int
    regret: float


def choose_probed(candidates: Candidates, probes: Sequence[TrainingProbe]) -> ProbedChoice:
    """Return the size of least expected cost.

    With probes that reached the target it lies between the smallest and the largest of them, and is none that did not reach it: a size
    outside might never arrive.
    """
    posterior = weigh(candidates.curves, probes)
    costs = posterior.weights @ candidates.costs
    index = min(_allowed(candidates, probes), key=lambda i: float(costs[i]))
    return ProbedChoice(index, max(float(costs[index]) - 1, 0.0))


def first_probes(candidates: Candidates, probes: Sequence[TrainingProbe] = (), *, count: int = 1) -> tuple[int, ...]:
    """Return the untried sizes the best of which is expected to cost least: what to train while nothing reached the target.

    Two of them are to be trained in turn, one as long as the other, until one arrives: that takes twice the shorter time of both, while
    nothing says when to stop a single one.

    Args:
        candidates: The sizes.
        probes: What was trained, in vain.
        count: How many sizes; fewer are returned when fewer are untried.

    Source:
        The medians of a set of points: Kariv and Hakimi, SIAM J. Appl. Math. 37, 1979.
    """
    tried = {probe.global_batch_size for probe in probes}
    weights = weigh(candidates.curves, probes).weights
    left = [i for i, size in enumerate(candidates.sizes) if int(size) not in tried]

    def cost(chosen: tuple[int, ...]) -> float:
        return float(weights @ candidates.costs[:, list(chosen)].min(axis=1))

    return min(combinations(left, min(count, len(left))), key=cost) if left else ()


def next_probe(
    candidates: Candidates,
    probes: Sequence[TrainingProbe],
    *,
    best_log_time: float,
    least_gain: float = LEAST_GAIN,
    without: Collection[Setting] = (),
) -> Proposal | None:
    """Return the probe that removes most expected regret for its time; none when no probe is worth its time.

    For every size outcomes are drawn from the posterior, and the choice after each is judged. A probe is stopped when it has taken as
    long as the best so far, so that is the most that it costs, and what a stop tells is used.

    Args:
        candidates: The sizes.
        probes: What was trained; at least one reached the target.
        best_log_time: Log seconds to the target of the best probe.
        least_gain: Least regret removed for each run of the best size.
        without: Candidates that are not to be trained.

    Source:
        Knowledge gradient with costs: Frazier, Powell and Dayanik, SIAM J. Control Optim. 47, 2008; Swersky et al. 2013.
    """
    posterior = weigh(candidates.curves, probes)
    simulation = _Simulation(candidates, posterior, probes, best_log_time)
    left_out = {*without, *(setting_of(probe) for probe in probes if probe.outcome is not ProbeOutcome.REACHED)}
    proposals = [simulation.of(i) for i, setting in enumerate(candidates.settings) if setting not in left_out]
    best = max(proposals, key=_gain, default=None)
    return best if best is not None and _gain(best) >= least_gain else None


def setting_of(probe: TrainingProbe) -> Setting:
    """The candidate that a probe trained."""
    return probe.global_batch_size, probe.lr_over_rule


def _gain(proposal: Proposal) -> float:
    return proposal.regret_removed / max(proposal.cost, _CHEAPEST)


class _Simulation:
    """Outcomes of a further probe, drawn from particles of the posterior."""

    def __init__(self, candidates: Candidates, posterior: CurvePosterior, probes: Sequence[TrainingProbe], best_log_time: float) -> None:
        rng = np.random.default_rng(_SEED)
        rows = rng.choice(len(posterior.weights), _PARTICLES, p=posterior.weights)
        curves = candidates.curves
        self._expected = posterior.log_level[rows, None] + candidates.log_samples[rows]
        self._spread = np.hypot(curves.spread(candidates.sizes)[rows], candidates.log_error)
        self._fails = curves.fails(candidates.sizes)[rows]
        self._costs = candidates.costs[rows]
        self._log_time = np.median(candidates.log_time, axis=0)
        self._best_log_time = best_log_time
        self._simulated = rng.permutation(_PARTICLES)[:_OUTCOMES]
        self._errors = rng.standard_normal(_OUTCOMES)
        self._candidates = candidates
        self._probes = probes
        self._allowed = _allowed(candidates, probes)
        self._now = float(self._costs.mean(axis=0)[self._allowed].min())

    def of(self, index: int) -> Proposal:
        limit = self._best_log_time - float(self._log_time[index])
        drawn = self._expected[self._simulated, index] + self._spread[self._simulated, index] * self._errors
        drawn = np.where(self._fails[self._simulated, index], math.inf, drawn)
        reached = drawn < limit
        after, cost = 0.0, 0.0
        stopped = self._after(self._weights_if_stopped(index, limit), index, reached=False) if not reached.all() else 0.0
        for outcome in drawn[reached]:
            after += self._after(self._weights_if_reached(index, float(outcome)), index, reached=True)
            cost += math.exp(float(outcome) - limit)
        in_vain = int((~reached).sum())
        after, cost = after + in_vain * stopped, cost + in_vain
        return Proposal(index, self._now - after / _OUTCOMES, cost / _OUTCOMES)

    def _weights_if_reached(self, index: int, log_samples: float) -> FloatArray:
        spread = self._spread[:, index]
        weight = np.exp(-0.5 * ((log_samples - self._expected[:, index]) / spread) ** 2) / spread
        return np.where(self._fails[:, index], 0.0, weight)

    def _weights_if_stopped(self, index: int, limit: float) -> FloatArray:
        from scipy.special import ndtr

        return np.where(self._fails[:, index], 1.0, ndtr((self._expected[:, index] - limit) / self._spread[:, index]))

    def _after(self, weight: FloatArray, index: int, *, reached: bool) -> float:
        """Expected cost of the choice after an outcome; never from an outcome that no particle explains."""
        total = float(weight.sum())
        if total <= 0:
            return self._now
        size, rate = self._candidates.settings[index]
        outcome = ProbeOutcome.REACHED if reached else ProbeOutcome.STOPPED
        probe = TrainingProbe(global_batch_size=size, lr_over_rule=rate, outcome=outcome, samples=1)
        allowed = _allowed(self._candidates, (*self._probes, probe))
        return float((weight @ self._costs / total)[allowed].min())


def _allowed(candidates: Candidates, probes: Sequence[TrainingProbe]) -> list[int]:
    """Sizes that may be chosen; where probes see only a part of the run, what they show of a slow size does not rule it out."""
    if candidates.run is not None:
        failed = {setting_of(probe) for probe in probes if probe.outcome is ProbeOutcome.FAILED}
        return [i for i, setting in enumerate(candidates.settings) if setting not in failed]
    reached = {probe.global_batch_size for probe in probes if probe.outcome is ProbeOutcome.REACHED}
    in_vain = {probe.global_batch_size for probe in probes} - reached
    if not reached:
        return list(range(len(candidates.sizes)))
    low, high = min(reached), max(reached)
    return [i for i, size in enumerate(candidates.sizes) if low <= size <= high and int(size) not in in_vain]
