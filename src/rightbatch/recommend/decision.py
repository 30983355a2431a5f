"""One recommendation from all estimates."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rightbatch.fits.branch_rate import best_rate
from rightbatch.fits.devices import fit_devices
from rightbatch.fits.lr_scaling import couple_lr, known_noise_scale
from rightbatch.fits.swept import with_swept_rate
from rightbatch.fits.tradeoff import CostDraws, relative_to_best, summarise
from rightbatch.recommend.advice import Context, advise
from rightbatch.recommend.choice import binding_constraint, choose, equivalents, relative_time
from rightbatch.records.estimates import LoaderCurve, MemoryCurve, NoiseScale, Status, StepTimeCurve, Tradeoff
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import BatchPlan, Comparison, Constraints, LrCoupling, Objective, Recommendation, Sensitivity
from rightbatch.records.training import BranchMeasurements, SweepEvidence

WIDEST_FACTOR = 10.0
"""No point is called an answer when the 90 % interval of the critical batch size spans more than this factor on a side."""
COMMON_SIZES = (32, 64, 128, 256)
_NOISE_FACTOR = 4.0

Verdict = Literal["ok", "inconclusive", "nothing_fits", "unstable"]


@dataclass(frozen=True)
class _Request:
    """What the decision rests on."""

    step_time: StepTimeCurve | None
    loader: LoaderCurve | None
    noise_scale: NoiseScale | None
    memory: MemoryCurve | None
    workload: WorkloadSummary
    objective: Objective
    constraints: Constraints
    tradeoff: Tradeoff | None
    branches: BranchMeasurements | None
    swept: SweepEvidence | None


def recommend(
    *,
    step_time: StepTimeCurve | None,
    loader: LoaderCurve | None,
    noise_scale: NoiseScale | None,
    memory: MemoryCurve | None,
    workload: WorkloadSummary,
    objective: Objective,
    constraints: Constraints,
    draws: CostDraws | None,
    tradeoff: Tradeoff | None,
    branches: BranchMeasurements | None = None,
    swept: SweepEvidence | None = None,
) -> Recommendation:
    """The batch size to use, how sure it is, and why.

    Args:
        step_time: None when no speed was measured: there is no plan then.
        loader: None when the loader was not measured.
        noise_scale: None when the noise was not measured: without a sweep the plan is the knee then.
        memory: None when memory was not measured.
        workload: What is trained.
        objective: The goal and the tolerance.
        constraints: Bounds that do not come from a measurement.
        draws: What each candidate costs, drawn from the same estimates; none when no timed size is allowed.
        tradeoff: The trade-off fitted to the draws.
        branches: Training from a checkpoint at several sizes; none when that was not asked for.
        swept: A sweep of the same workload; none where there was none.

    Returns:
        A recommendation; ``plan`` is none when nothing fits, nothing was timed, or training left none of the timed sizes open.

    Raises:
        UsageError: The goal is energy and none was measured.
    """
    request = _Request(step_time, loader, noise_scale, memory, workload, objective, constraints, tradeoff, branches, swept)
    if memory is not None and memory.status is Status.NOTHING_FITS:
        return _without_plan(request, "nothing_fits")
    if step_time is None or draws is None or not draws.may_be_chosen.any():
        return _without_plan(request, "inconclusive")
    if draws.curves is None:
        draws.objective(objective.goal)
        return _at_knee(request, draws, step_time)
    return _at_optimum(request, draws, step_time)


def _without_plan(request: _Request, status: Verdict) -> Recommendation:
    lr = couple_lr(request.workload, None, request.workload.lr_batch_size or 1)
    return Recommendation(
        status=status,
        plan=None,
        objective=request.objective,
        binding_constraint=None,
        evidence_level=0,
        expected_regret=None,
        equivalent_batch_sizes=(),
        lr=lr,
        comparisons=(),
        sensitivities=(),
        advice=advise(_context(request, status, None)),
    )


def _at_knee(request: _Request, draws: CostDraws, step_time: StepTimeCurve) -> Recommendation:
    """Without a sweep and a noise scale: the smallest timed size within 3 % of the best throughput."""
    timed = [i for i, candidate in enumerate(draws.candidates) if candidate.accumulation_steps == 1]
    at_most_knee = [i for i in timed if draws.candidates[i].micro_batch_size <= (step_time.knee or 0)]
    chosen = max(at_most_knee, default=timed[0])
    status: Verdict = "unstable" if step_time.status is Status.UNSTABLE else "inconclusive"
    plan, lr = _plan(request, draws, chosen)
    return Recommendation(
        status=status,
        plan=plan,
        objective=request.objective,
        binding_constraint=None,
        evidence_level=0,
        expected_regret=None,
        equivalent_batch_sizes=(plan.global_batch_size,),
        lr=lr,
        comparisons=(),
        sensitivities=(),
        advice=advise(_context(request, status, plan)),
    )


def _at_optimum(request: _Request, draws: CostDraws, step_time: StepTimeCurve) -> Recommendation:
    objective = request.objective
    chosen = choose(draws, objective)
    status: Verdict = "ok" if _is_narrow(request.tradeoff) else "inconclusive"
    if step_time.status is Status.UNSTABLE:
        status = "unstable"
    plan, lr = _plan(request, draws, chosen)
    regret = relative_to_best(draws.objective(objective.goal))[:, chosen].mean() - 1
    return Recommendation(
        status=status,
        plan=plan,
        objective=objective,
        binding_constraint=binding_constraint(
            draws,
            chosen,
            step_time=step_time,
            memory=request.memory,
            workload=request.workload,
            objective=objective,
            constraints=request.constraints,
        ),
        evidence_level=3 if request.swept is not None or trained_sizes(request.branches) > 1 else 1,
        expected_regret=max(float(regret), 0.0),
        equivalent_batch_sizes=equivalents(draws, objective, chosen),
        lr=lr,
        comparisons=_comparisons(request, draws, chosen),
        sensitivities=_sensitivities(request, draws),
        advice=advise(_context(request, status, plan)),
        devices=fit_devices(draws, workload=request.workload, constraints=request.constraints),
    )


def trained_sizes(branches: BranchMeasurements | None) -> int:
    """How many sizes were trained from the checkpoint."""
    return 0 if branches is None else len({probe.result.global_batch_size for probe in branches.probes})


def _is_narrow(tradeoff: Tradeoff | None) -> bool:
    if tradeoff is None:
        return False
    critical = tradeoff.critical_batch_size
    if critical.value is None or critical.low is None or critical.high is None:
        return False
    return critical.high <= WIDEST_FACTOR * critical.value and critical.value <= WIDEST_FACTOR * critical.low


def _plan(request: _Request, draws: CostDraws, chosen: int) -> tuple[BatchPlan, LrCoupling]:
    candidate = draws.candidates[chosen]
    workload = with_swept_rate(request.workload, request.swept, candidate.global_batch_size)
    snapshots = () if request.noise_scale is None else request.noise_scale.snapshots
    lr = couple_lr(
        workload,
        known_noise_scale(request.noise_scale),
        candidate.global_batch_size,
        micro_batch_size=candidate.micro_batch_size,
        snapshot=snapshots[-1] if snapshots else None,
    )
    over_rule = best_rate(draws.curves, candidate.global_batch_size) if request.swept is None else None
    lr = lr.model_copy(update={"over_rule": over_rule})
    coupled = lr.base_lr * lr.factor if lr.base_lr is not None and lr.base_batch_size is not None else None
    if coupled is not None and over_rule is not None and over_rule.value is not None:
        coupled *= over_rule.value
    plan = BatchPlan(
        global_batch_size=candidate.global_batch_size,
        micro_batch_size=candidate.micro_batch_size,
        accumulation_steps=candidate.accumulation_steps,
        world_size=request.constraints.world_size,
        lr=coupled,
        num_workers=request.loader.num_workers if request.loader is not None and request.loader.points else workload.num_workers,
        precision=workload.precision,
    )
    return plan, lr


def _comparisons(request: _Request, draws: CostDraws, chosen: int) -> tuple[Comparison, ...]:
    """What common practice would cost: fixed sizes, the largest that was timed, the best throughput."""
    ranks = request.constraints.world_size
    timed = [candidate for candidate in draws.candidates if candidate.accumulation_steps == 1]
    largest = timed[-1]
    fits = request.memory is not None and request.memory.ceiling_is_limit and request.memory.ceiling == largest.micro_batch_size
    named = [(str(size), size) for size in COMMON_SIZES if size % ranks == 0 and size <= request.workload.train_size]
    beside = _powers_beside(draws.candidates[chosen].global_batch_size)
    cap = min(request.workload.train_size, request.constraints.max_global_batch_size or request.workload.train_size)
    named += [(f"power of two {side}", size) for side, size in beside if size % ranks == 0 and size <= cap and size not in COMMON_SIZES]
    named.append(("largest that fits" if fits else "largest timed", largest.global_batch_size))
    if request.step_time is not None and request.step_time.best in {candidate.micro_batch_size for candidate in timed}:
        named.append(("best throughput", request.step_time.best * ranks))
    evidence = {candidate.global_batch_size: candidate.evidence for candidate in draws.candidates}
    samples = draws.samples()[:, chosen]
    return tuple(
        Comparison(
            label=label,
            global_batch_size=size,
            relative_time=summarise(relative_time(draws, size, chosen)),
            relative_samples=summarise(draws.steps(np.array([size], dtype=np.float64))[:, 0] * size / samples),
            evidence=evidence.get(size, "extrapolated"),
        )
        for label, size in named
        if not (request.workload.couples_samples and size > largest.global_batch_size)
    )


def _powers_beside(size: int) -> tuple[tuple[str, int], ...]:
    """The next power of two below a size and the next above it."""
    below = 1 << (max(size - 1, 1).bit_length() - 1)
    above = 1 << size.bit_length()
    return (("below", below), ("above", above)) if size > 1 else (("above", above),)


def _sensitivities(request: _Request, draws: CostDraws) -> tuple[Sensitivity, ...]:
    """What the choice would be if one thing were different: the same draws, judged again."""
    if draws.curves is None:
        return ()
    what = "noise scale" if request.swept is None else "critical batch size"
    variants = [
        (f"{what} 4x smaller", draws.times_critical(1 / _NOISE_FACTOR)),
        (f"{what} 4x larger", draws.times_critical(_NOISE_FACTOR)),
    ]
    if np.any(np.median(draws.step_time_s(), axis=0) > 1.02 * np.median(draws.compute_time_s, axis=0)):
        variants.append(("no loader limit", replace(draws, loader_samples_per_s=None)))
    halved = _half_the_memory(request.memory, draws)
    if halved is not None:
        variants.append(("half the memory", halved))
    return tuple(
        Sensitivity(change=change, global_batch_size=variant.candidates[choose(variant, request.objective)].global_batch_size)
        for change, variant in variants
    )


def _half_the_memory(memory: MemoryCurve | None, draws: CostDraws) -> CostDraws | None:
    """The candidates whose micro-batch is predicted to fit in half the limit; none when that changes nothing or leaves nothing."""
    if memory is None or not memory.curve:
        return None
    sizes, used_bytes = zip(*memory.curve, strict=True)
    needed_bytes = np.interp([candidate.micro_batch_size for candidate in draws.candidates], sizes, used_bytes)
    kept = np.flatnonzero(needed_bytes <= memory.limit.limit_bytes // 2).tolist()
    if len(kept) == len(draws.candidates) or not draws.may_be_chosen[kept].any():
        return None
    energy = draws.energy_per_step_j
    return replace(
        draws,
        candidates=tuple(draws.candidates[i] for i in kept),
        compute_time_s=draws.compute_time_s[:, kept],
        may_be_chosen=draws.may_be_chosen[kept],
        energy_per_step_j=None if energy is None else energy[kept],
    )


def _context(request: _Request, status: Verdict, plan: BatchPlan | None) -> Context:
    return Context(
        status=status,
        plan=plan,
        workload=request.workload,
        step_time=request.step_time,
        loader=request.loader,
        noise_scale=request.noise_scale,
        memory=request.memory,
        tradeoff=request.tradeoff,
        is_swept=request.swept is not None,
    )
