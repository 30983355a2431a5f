"""Trade-off: what every candidate size costs until the target, under everything that is uncertain.

Symbols: b global batch size, B_crit critical batch size, t(b) step time; T(b) = (1 + B_crit / b) t(b) and E(b) = 1 + b / B_crit.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rightbatch.errors import UsageError
from rightbatch.fits.branch_rate import log_rate_loss
from rightbatch.fits.critical_batch import curves_of, is_ruled_out
from rightbatch.fits.intervals import BoolArray, FloatArray, log_standard_error, normal_draws
from rightbatch.fits.lr_scaling import RateLimit, known_noise_scale, rate_limit
from rightbatch.fits.samples_curve import CurveDraws
from rightbatch.fits.step_time import StepTimeLaw
from rightbatch.fits.swept import is_outside, swept_curves
from rightbatch.records.estimates import (
    Estimate,
    LoaderCurve,
    MemoryCurve,
    NoiseScale,
    Status,
    StepTimeCurve,
    ThroughputPoint,
    Tradeoff,
    TradeoffPoint,
)
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import Constraints, Goal, Objective
from rightbatch.records.training import BranchMeasurements, SweepEvidence

N_DRAWS = 2048
UNREPEATED_LOG_SD = 0.05
"""Spread of a step time that was measured in one round only."""
LARGEST_SHARE_OF_DATASET = 4
"""Accumulation is not considered above a quarter of the training set: an epoch of fewer than four steps."""

Evidence = Literal["measured", "composed", "extrapolated"]


@dataclass(frozen=True)
class Candidate:
    """One way to make a global batch."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    evidence: Evidence


@dataclass(frozen=True)
class CostDraws:
    """Posterior draws of what each candidate costs: rows are draws, columns are candidates."""

    candidates: tuple[Candidate, ...]
    compute_time_s: FloatArray
    """Seconds of a step without the loader's limit."""
    loader_samples_per_s: FloatArray | None
    """Of one process, one number a draw; none when the loader was not measured."""
    curves: CurveDraws | None
    """Samples to the target; none when neither a sweep nor the noise tells them."""
    energy_per_step_j: FloatArray | None
    """One number a candidate."""
    measured_sizes: FloatArray
    """Micro-batch sizes that were timed, ascending."""
    measured_time_s: FloatArray
    """Seconds of a step at those sizes."""
    optimizer_time_s: float
    law: StepTimeLaw | None
    may_be_chosen: BoolArray
    """Whether training leaves each candidate open to be chosen."""
    world_size: int = 1

    @property
    def critical_batch_size(self) -> FloatArray | None:
        """In samples, one number a draw; none without curves."""
        return None if self.curves is None else np.asarray(np.exp(self.curves.log_critical))

    @property
    def sizes(self) -> FloatArray:
        """Global batch size of each candidate."""
        return np.array([candidate.global_batch_size for candidate in self.candidates], dtype=np.float64)

    def step_time_s(self) -> FloatArray:
        """Seconds between optimizer steps: max(compute, samples a process / loader rate)."""
        return self.limited_by_loader(self.compute_time_s, self.sizes)

    def limited_by_loader(self, compute_time_s: FloatArray, sizes: FloatArray) -> FloatArray:
        """The longer of computing and loading each of ``sizes`` samples."""
        if self.loader_samples_per_s is None:
            return compute_time_s
        return np.maximum(compute_time_s, sizes[None, :] / self.world_size / self.loader_samples_per_s[:, None])

    def steps(self, sizes: FloatArray) -> FloatArray:
        """Steps to the target over the least possible, E(b) / E_min B_crit / b; all ones without curves."""
        if self.curves is None or self.critical_batch_size is None:
            return np.ones((len(self.compute_time_s), len(sizes)))
        log_samples = self.curves.log_samples(sizes) + log_rate_loss(self.curves, sizes)
        return np.asarray(np.exp(log_samples) * self.critical_batch_size[:, None] / sizes[None, :])

    def times_critical(self, factor: float) -> "CostDraws":
        """The same draws with another critical batch size."""
        curves = self.curves
        return self if curves is None else replace(self, curves=replace(curves, log_critical=curves.log_critical + math.log(factor)))

    def time(self) -> FloatArray:
        """T(b) up to a constant."""
        return self.steps(self.sizes) * self.step_time_s()

    def samples(self) -> FloatArray:
        """E(b) up to a constant."""
        return self.steps(self.sizes) * self.sizes[None, :]

    def energy(self) -> FloatArray:
        """J(b) = S(b) times the joules of a step, up to a constant.

        Raises:
            UsageError: No energy was measured.
        """
        if self.energy_per_step_j is None:
            raise UsageError("--goal energy needs an energy meter that was read at every timed size; this run has none: use --goal time.")
        return self.steps(self.sizes) * self.energy_per_step_j[None, :]

    def objective(self, goal: Goal) -> FloatArray:
        """What the goal wants least of; for accuracy, time.

        Raises:
            UsageError: The goal is energy and none was measured.
        """
        if goal is Goal.SAMPLES:
            return self.samples()
        return self.energy() if goal is Goal.ENERGY else self.time()


def draw_costs(
    *,
    step_time: StepTimeCurve,
    loader: LoaderCurve | None,
    noise_scale: NoiseScale | None,
    memory: MemoryCurve | None,
    workload: WorkloadSummary,
    constraints: Constraints,
    rng: np.random.Generator,
    branches: BranchMeasurements | None = None,
    swept: SweepEvidence | None = None,
) -> CostDraws | None:
    """Draw what each candidate costs; none when no timed size is allowed.

    Candidates are all timed sizes that are allowed and, beyond them, 2, 4, ... accumulated micro-batches of the best throughput, where the
    loss lets a batch be split. With accumulation, t = A (t_micro - t_optimizer) + t_optimizer. Training from a checkpoint at several sizes
    weighs the draws; sizes outside those that trained there without failing may not be chosen. A sweep takes its place where there was one.
    """
    timed = [point for point in step_time.points if point.step_time_s.value is not None]
    if memory is not None and memory.ceiling is not None:
        ceiling = memory.ceiling
        timed = [point for point in timed if point.micro_batch_size <= ceiling]
    chosen = candidates(timed, workload, constraints, accumulation_ceiling=None if memory is None else memory.accumulation_ceiling)
    if not chosen:
        return None
    times_s = np.column_stack([_step_time_draws(point, rng) for point in timed])
    column = {point.micro_batch_size: i for i, point in enumerate(timed)}
    optimizer_time_s = step_time.optimizer_time_s
    compute = np.column_stack(
        [accumulated_time_s(times_s[:, column[c.micro_batch_size]], optimizer_time_s, c.accumulation_steps) for c in chosen]
    )
    energies = [timed[column[c.micro_batch_size]].energy_per_step_j for c in chosen]
    law = None
    if step_time.fixed_time_s and step_time.saturated_samples_per_s and step_time.exponent:
        law = StepTimeLaw(step_time.fixed_time_s, step_time.saturated_samples_per_s, step_time.exponent)
    return CostDraws(
        candidates=chosen,
        compute_time_s=compute,
        loader_samples_per_s=None if loader is None else _rate_draws(loader.samples_per_s, rng),
        curves=_curves(noise_scale, branches, swept, rng, rate_limit(workload, known_noise_scale(noise_scale))),
        energy_per_step_j=np.array([c.accumulation_steps * (energy or 0.0) for c, energy in zip(chosen, energies, strict=True)])
        if all(energies)
        else None,
        measured_sizes=np.array([point.micro_batch_size for point in timed], dtype=np.float64),
        measured_time_s=times_s,
        optimizer_time_s=optimizer_time_s,
        law=law,
        may_be_chosen=np.array(
            [
                not (is_outside(c.global_batch_size, swept) or (swept is None and is_ruled_out(c.global_batch_size, branches)))
                for c in chosen
            ]
        ),
        world_size=constraints.world_size,
    )


def _curves(
    noise: NoiseScale | None,
    branches: BranchMeasurements | None,
    swept: SweepEvidence | None,
    rng: np.random.Generator,
    limit: RateLimit | None,
) -> CurveDraws | None:
    """From a sweep where there was one: it trained to the target; else from branches, which saw a part of the run, and the noise."""
    if swept is not None:
        return swept_curves(swept, rng, N_DRAWS)
    return None if noise is None else curves_of(noise, branches, rng, N_DRAWS, limit=limit)


def candidates(
    timed: list[ThroughputPoint], workload: WorkloadSummary, constraints: Constraints, *, accumulation_ceiling: int | None = None
) -> tuple[Candidate, ...]:
    """Global batches worth comparing, ascending, within the dataset and ``constraints``.

    On several ranks none was timed with its communication, so all are ``extrapolated``. Gradients are held while the later micro-batches
    run, so a micro-batch above ``accumulation_ceiling`` samples fits alone but not in an accumulation.
    """
    ranks = constraints.world_size
    cap = min(workload.train_size, constraints.max_global_batch_size or workload.train_size)
    found = [
        Candidate(point.micro_batch_size * ranks, point.micro_batch_size, 1, "measured" if ranks == 1 else "extrapolated")
        for point in timed
        if point.micro_batch_size * ranks <= cap
    ]
    if not found or workload.couples_samples:
        return tuple(found)
    splits = [p for p in timed if p.micro_batch_size * ranks <= cap and p.micro_batch_size <= (accumulation_ceiling or p.micro_batch_size)]
    if not splits:
        return tuple(found)
    best = max(splits, key=lambda p: p.samples_per_s.value or 0.0).micro_batch_size
    largest_whole = max(candidate.global_batch_size for candidate in found)
    largest = min(workload.train_size // LARGEST_SHARE_OF_DATASET, cap)
    steps = 2
    while steps * best * ranks <= largest:
        if steps * best * ranks > largest_whole:
            found.append(Candidate(steps * best * ranks, best, steps, "composed" if ranks == 1 else "extrapolated"))
        steps *= 2
    return tuple(sorted(found, key=lambda candidate: candidate.global_batch_size))


def accumulated_time_s(micro_time_s: FloatArray, optimizer_time_s: float, accumulation_steps: int) -> FloatArray:
    """Seconds of a step of several micro-batches: A (t_micro - t_optimizer) + t_optimizer."""
    once_s = np.minimum(optimizer_time_s, micro_time_s)
    return np.asarray(accumulation_steps * (micro_time_s - once_s) + once_s)


def time_at(draws: CostDraws, global_batch_size: int) -> FloatArray:
    """Draws of T at a size that is no candidate, from the timed sizes and the fitted law: extrapolated.

    Between timed sizes the step time is interpolated in logarithms; below the smallest the law's ratio is used; above the largest,
    equal micro-batches are accumulated.
    """
    return np.asarray(draws.steps(np.array([global_batch_size], dtype=np.float64))[:, 0] * step_time_at(draws, global_batch_size))


def step_time_at(draws: CostDraws, global_batch_size: int) -> FloatArray:
    """Draws of the seconds between optimizer steps at a size that is no candidate: extrapolated as in ``time_at``."""
    per_rank = global_batch_size / draws.world_size
    steps = math.ceil(per_rank / draws.measured_sizes[-1])
    compute = accumulated_time_s(_interpolated_time_s(draws, per_rank / steps), draws.optimizer_time_s, steps)
    return draws.limited_by_loader(compute[:, None], np.array([global_batch_size], dtype=np.float64))[:, 0]


def relative_to_best(costs: FloatArray) -> FloatArray:
    """Each draw's costs over the cost of that draw's best candidate."""
    return np.asarray(costs / costs.min(axis=1, keepdims=True))


def summarise(values: FloatArray) -> Estimate:
    """Mean and 90 % interval of draws; never an interval that leaves the mean out."""
    low, high = np.percentile(values, [5, 95])
    mean = float(values.mean())
    return Estimate(value=mean, low=min(float(low), mean), high=max(float(high), mean), n=len(values))


def fit_tradeoff(
    draws: CostDraws | None, *, noise_scale: NoiseScale | None, objective: Objective, swept: SweepEvidence | None = None
) -> Tradeoff:
    """Predicted cost of every candidate size relative to the best, draw by draw, and its expected regret.

    Args:
        draws: What each candidate costs; none when no timed size is allowed.
        noise_scale: What the draws rest on without a sweep; none when the noise was not measured.
        objective: The goal whose regret is wanted.
        swept: The sweep that the draws rest on instead; none where there was none.

    Returns:
        ``INDETERMINATE`` without a sweep and a usable noise scale: the points then carry step times only.

    Raises:
        UsageError: The goal is energy and none was measured.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.11; docs/theory/tradeoff.md.
    """
    unknown = Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE)
    if draws is None:
        return Tradeoff(status=Status.INDETERMINATE, critical_batch_size=unknown, points=(), remarks=("No timed size is allowed.",))
    if draws.curves is None or draws.critical_batch_size is None:
        draws.objective(objective.goal)
        points = tuple(_point(draws, i, unknown, unknown, None, None) for i in range(len(draws.candidates)))
        remark = "Without a noise scale nothing is known about how many samples each size needs."
        return Tradeoff(status=Status.INDETERMINATE, critical_batch_size=unknown, points=points, remarks=(remark,))
    regret = (relative_to_best(draws.objective(objective.goal)) - 1).mean(axis=0)
    time = relative_to_best(draws.time())
    samples = np.exp(draws.curves.log_samples(draws.sizes))
    energy = relative_to_best(draws.energy()) if draws.energy_per_step_j is not None else None
    points = tuple(
        _point(
            draws, i, summarise(time[:, i]), summarise(samples[:, i]), None if energy is None else summarise(energy[:, i]), float(regret[i])
        )
        for i in range(len(draws.candidates))
    )
    critical = _critical(draws.critical_batch_size, noise_scale, swept)
    return Tradeoff(status=critical.status, critical_batch_size=critical, points=points)


def _critical(draws: FloatArray, noise: NoiseScale | None, swept: SweepEvidence | None) -> Estimate:
    """A sweep bounds it on both sides; the noise does where its own interval is bounded."""
    low, median, high = (float(value) for value in np.percentile(draws, [5, 50, 95]))
    if swept is not None or noise is None:
        return Estimate(value=median, low=low, high=high, n=0 if swept is None else len(swept.probes))
    return Estimate(value=median, low=low, high=high if noise.status is Status.OK else None, n=noise.n, status=noise.status)


def _point(
    draws: CostDraws, i: int, relative_time: Estimate, relative_samples: Estimate, relative_energy: Estimate | None, regret: float | None
) -> TradeoffPoint:
    candidate = draws.candidates[i]
    step_s = float(np.median(draws.step_time_s()[:, i]))
    compute_s = float(np.median(draws.compute_time_s[:, i]))
    return TradeoffPoint(
        global_batch_size=candidate.global_batch_size,
        micro_batch_size=candidate.micro_batch_size,
        accumulation_steps=candidate.accumulation_steps,
        evidence=candidate.evidence,
        step_time_s=step_s,
        samples_per_s=candidate.global_batch_size / step_s,
        loader_bound=step_s > 1.02 * compute_s,
        relative_time=relative_time,
        relative_samples=relative_samples,
        relative_energy=relative_energy,
        regret=regret,
    )


def _step_time_draws(point: ThroughputPoint, rng: np.random.Generator) -> FloatArray:
    median_s = point.step_time_s.value or 0.0
    log_sd = log_standard_error(point.step_time_s) if point.step_time_s.low is not None else UNREPEATED_LOG_SD
    return np.asarray(median_s * np.exp(log_sd * normal_draws(rng, N_DRAWS)))


def _rate_draws(samples_per_s: Estimate, rng: np.random.Generator) -> FloatArray | None:
    if not samples_per_s.value:
        return None
    return np.asarray(samples_per_s.value * np.exp(log_standard_error(samples_per_s) * normal_draws(rng, N_DRAWS)))


def _interpolated_time_s(draws: CostDraws, micro_batch_size: float) -> FloatArray:
    sizes, times_s = draws.measured_sizes, draws.measured_time_s
    if micro_batch_size <= sizes[0]:
        if draws.law is None:
            return np.asarray(times_s[:, 0])
        at, anchor = draws.law.step_time_s(np.array([micro_batch_size, sizes[0]]))
        return np.asarray(times_s[:, 0] * at / anchor)
    upper = int(np.searchsorted(sizes, micro_batch_size))
    share = math.log(micro_batch_size / sizes[upper - 1]) / math.log(sizes[upper] / sizes[upper - 1])
    return np.asarray(np.exp((1 - share) * np.log(times_s[:, upper - 1]) + share * np.log(times_s[:, upper])))
