"""Ways to choose a batch size, each seeing no more of a recorded cell than it would have measured."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from replay_traces import Cell, NoiseTrace
from rightbatch.fits.critical_batch import CALIBRATION_LOG_SD, CALIBRATION_MEDIAN, critical_batch_over_run
from rightbatch.fits.intervals import normal_draws
from rightbatch.fits.samples_curve import PRIORS, CurvePrior, LrRegime, draw_curves
from rightbatch.fits.tradeoff import relative_to_best
from rightbatch.recommend.probing import LEAST_GAIN, Candidates, choose_probed, first_probes, next_probe
from rightbatch.records.training import ProbeOutcome, TrainingProbe

DRAWS = 2048
MOST_PROBES = 8
UNIFORM_SD = 1 / math.sqrt(12)
"""Standard deviation of what is only known to lie between two evaluations, over their distance."""


@dataclass(frozen=True)
class Pick:
    """What a policy chose, and the seconds that it trained to find out."""

    index: int
    seconds: float = 0.0
    probes: int = 0


Policy = Callable[[Cell, np.ndarray], Pick]
"""Takes a cell and the work to the target of one seed at each size."""


def largest(cell: Cell, _work: np.ndarray) -> Pick:
    return Pick(len(cell.sizes) - 1)


def smallest(_cell: Cell, _work: np.ndarray) -> Pick:
    return Pick(0)


def best_throughput(cell: Cell, _work: np.ndarray) -> Pick:
    return Pick(int(np.argmin(cell.seconds)))


def knee(cell: Cell, _work: np.ndarray) -> Pick:
    """The smallest size within 3 % of the best throughput."""
    return Pick(int(np.flatnonzero(0.97 * cell.seconds <= cell.seconds.min())[0]))


def always_128(cell: Cell, _work: np.ndarray) -> Pick:
    return Pick(nearest(cell, 128))


def sweep(cell: Cell, work: np.ndarray) -> Pick:
    """Train every size once, in full."""
    seconds = np.where(np.isfinite(work), work, cell.longest_work) * cell.seconds
    return Pick(int(np.argmin(work * cell.seconds)), float(seconds.sum()), len(work))


def hyperbola(cell: Cell, work: np.ndarray) -> Pick:
    """Train the smallest and the largest size, and draw E = E_min (1 + b / B_crit) through both."""
    ends = [0, len(cell.sizes) - 1]
    seconds = float((np.where(np.isfinite(work[ends]), work[ends], cell.longest_work) * cell.seconds[ends]).sum())
    reached = [i for i in ends if math.isfinite(work[i])]
    if len(reached) < 2:
        return Pick(reached[0] if reached else 0, seconds, 2)
    slope = max((work[ends[1]] - work[0]) / (cell.sizes[-1] - cell.sizes[0]), 0.0)
    fixed = max(work[0] - slope * cell.sizes[0], 1e-9)
    return Pick(int(np.argmin((fixed + slope * cell.sizes) * cell.seconds)), seconds, 2)


@dataclass
class Sequential:
    """Ours: the size that ``recommend.probing`` chooses after the probes that it asks for.

    Attributes:
        most_probes: Trainings at most.
        least_gain: When to stop earlier; negative: never.
        abort: A probe is stopped at so many times the best time so far.
        together: Sizes that are trained in turn, one as long as the other, until the first of them arrives; 1 where probes are counted
            and not their time.
        most_runs: No further probe is begun that is expected to bring the time spent above so many runs of the best so far.
        priors: Belief by how the rate goes with the size.
    """

    most_probes: int = MOST_PROBES
    least_gain: float = LEAST_GAIN
    abort: float = 1.0
    together: int = 2
    most_runs: float = math.inf
    priors: Mapping[LrRegime, CurvePrior] = field(default_factory=lambda: PRIORS)
    _plans: dict[tuple[object, ...], "_Plan"] = field(default_factory=dict)
    _cells: dict[str, Candidates] = field(default_factory=dict)

    def __call__(self, cell: Cell, work: np.ndarray) -> Pick:
        probes: tuple[TrainingProbe, ...] = ()
        spent = 0.0
        best = math.inf
        while (plan := self._plan(cell, probes)).indices and not spent + plan.cost * best > self.most_runs * best:
            best = min(best, *(work[i] * cell.seconds[i] for i in plan.indices))
            for i in plan.indices:
                probe, seconds = self._train(cell, i, float(work[i]), best)
                spent += seconds
                probes = (*probes, probe)
        return Pick(plan.choice, spent, len(probes))

    def _train(self, cell: Cell, index: int, work: float, best: float) -> tuple[TrainingProbe, float]:
        """What training a size shows, and the seconds that it takes; the best time is that of all probes, this one and its fellow too."""
        pace, size, limit = float(cell.seconds[index]), int(cell.sizes[index]), self.abort * best
        if math.isfinite(work) and work * pace <= limit:
            error = cell.resolution / work * UNIFORM_SD
            return TrainingProbe(global_batch_size=size, outcome=ProbeOutcome.REACHED, samples=work, log_error=error), work * pace
        if math.isfinite(limit):
            return TrainingProbe(global_batch_size=size, outcome=ProbeOutcome.STOPPED, samples=limit / pace), limit
        return TrainingProbe(global_batch_size=size, outcome=ProbeOutcome.FAILED, samples=cell.longest_work), cell.longest_work * pace

    def _plan(self, cell: Cell, probes: tuple[TrainingProbe, ...]) -> "_Plan":
        """Seeds often repeat, so what was decided once is kept."""
        key = (cell.label, *((probe.global_batch_size, probe.outcome, probe.samples) for probe in probes))
        if key not in self._plans:
            if cell.label not in self._cells:
                self._cells[cell.label] = _candidates(cell, self.priors[cell.regime])
            candidates = self._cells[cell.label]
            indices, cost = self._next(candidates, probes)
            self._plans[key] = _Plan(indices, cost, choose_probed(candidates, probes).index)
        return self._plans[key]

    def _next(self, candidates: Candidates, probes: tuple[TrainingProbe, ...]) -> tuple[tuple[int, ...], float]:
        if len(probes) >= self.most_probes:
            return (), 0.0
        log_time = dict(zip(candidates.sizes.astype(int).tolist(), candidates.log_time[0].tolist(), strict=True))
        reached = [p for p in probes if p.outcome is ProbeOutcome.REACHED]
        if not reached:
            return first_probes(candidates, probes, count=self.together), 0.0
        best = min(math.log(p.samples) + log_time[p.global_batch_size] for p in reached)
        proposal = next_probe(candidates, probes, best_log_time=best + math.log(self.abort), least_gain=self.least_gain)
        return ((), 0.0) if proposal is None else ((proposal.index,), proposal.cost * self.abort)


@dataclass(frozen=True)
class _Plan:
    """Which sizes to train next, in turn, none to stop; what that should cost in runs of the best so far; and the choice without it."""

    indices: tuple[int, ...]
    cost: float
    choice: int


def _candidates(cell: Cell, prior: CurvePrior) -> Candidates:
    curves = _curves(prior, _middle(cell))
    return Candidates(sizes=cell.sizes, log_time=np.log(cell.seconds)[None, :], curves=curves)


@functools.lru_cache(maxsize=64)
def _curves(prior: CurvePrior, middle: float):
    return draw_curves(prior, middle=middle, rng=np.random.default_rng(0), n_draws=DRAWS)


def _middle(cell: Cell) -> float:
    """Stands for the size that the rate was tuned at, which traces do not say."""
    return math.sqrt(cell.sizes[0] * cell.sizes[-1])


def nearest(cell: Cell, size: float) -> int:
    """The candidate nearest in logarithm."""
    return int(np.argmin(np.abs(np.log(cell.sizes / max(size, 1e-9)))))


def noise_at_start(cell: Cell, noise: NoiseTrace) -> Pick:
    """The size nearest to the noise scale at the first record."""
    return Pick(nearest(cell, noise.trace[0] / noise.sq_norm[0] if noise.sq_norm[0] > 0 else math.inf))


def noise_plain_mean(cell: Cell, noise: NoiseTrace) -> Pick:
    """The optimum for the mean of the noise scale over the records."""
    usable = noise.sq_norm > 0
    critical = float((noise.trace[usable] / noise.sq_norm[usable]).mean())
    return Pick(int(np.argmin((1 + cell.sizes / critical) * cell.seconds)))


def noise_of_run(
    cell: Cell,
    noise: NoiseTrace,
    *,
    prior: CurvePrior | None = None,
    tuned_at: float | None = None,
    calibration_median: float = CALIBRATION_MEDIAN,
    counts_failing: bool = False,
) -> Pick:
    """Ours from one run: its noise weighted over the run, the prior on the calibration, and what is believed of rates that went so.

    Least expected regret over draws, as `recommend` chooses. The options show what the answer hangs on.

    Args:
        cell: The sizes and their seconds.
        noise: Along one run.
        prior: Belief about the curve; none takes that of the cell's regime.
        tuned_at: Size that the rate was tuned at; none takes the geometric middle of the sizes.
        calibration_median: Of B_crit over the run's noise scale.
        counts_failing: Whether a size that a draw says never arrives costs the most that one can.
    """
    calibration = calibration_median * np.exp(CALIBRATION_LOG_SD * normal_draws(np.random.default_rng(0), DRAWS))
    critical = critical_batch_over_run(
        shares=noise.shares, sq_norm=noise.sq_norm, trace=noise.trace, batch_size=noise.batch_size, calibration=calibration
    )
    belief, middle = prior or PRIORS[cell.regime], tuned_at or _middle(cell)
    curves = draw_curves(belief, middle=middle, rng=np.random.default_rng(0), n_draws=DRAWS, critical=critical)
    if counts_failing:
        return Pick(int(np.argmin(Candidates(cell.sizes, np.log(cell.seconds)[None, :], curves).costs.mean(axis=0))))
    time = np.exp(curves.log_samples(cell.sizes)) * cell.seconds[None, :]
    return Pick(int(np.argmin(relative_to_best(time).mean(axis=0))))
