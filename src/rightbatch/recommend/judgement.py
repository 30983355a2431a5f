"""From everything that was measured to everything that was concluded; also what re-judges a saved run."""

import numpy as np

from rightbatch.fits.branch import fit_branches
from rightbatch.fits.branch_rate import over_rule
from rightbatch.fits.loader import fit_loader
from rightbatch.fits.lr_range import fit_lr_range, with_tested_rate
from rightbatch.fits.memory import fit_memory
from rightbatch.fits.noise_scale import fit_noise_scale
from rightbatch.fits.step_time import fit_step_time
from rightbatch.fits.tradeoff import draw_costs, fit_tradeoff
from rightbatch.recommend.decision import recommend
from rightbatch.records.environment import Environment
from rightbatch.records.measurements import Measurements
from rightbatch.records.plan import Constraints, Findings, Objective


def judge(
    measurements: Measurements,
    *,
    environment: Environment,
    objective: Objective,
    constraints: Constraints,
    reused_parts: tuple[str, ...] = (),
    measured_at: str,
    duration_s: float,
    rng_seed: int = 0,
) -> Findings:
    """Fit every part that was measured and decide.

    Args:
        measurements: Parts that were not measured are none, and so are their fits.
        environment: Where and with what it was measured.
        objective: The goal and the tolerance.
        constraints: Bounds that do not come from a measurement.
        reused_parts: Measurements taken over from an earlier run.
        measured_at: When the oldest measurement was taken: ISO 8601, UTC.
        duration_s: Seconds of measuring in this run.
        rng_seed: Seed of every draw: equal arguments give equal findings.

    Raises:
        UsageError: The goal is energy and none was measured.
    """
    workload = measurements.workload
    memory = fit_memory(measurements.memory) if measurements.memory is not None else None
    step_time = fit_step_time(measurements.step_time) if measurements.step_time is not None else None
    loader = fit_loader(measurements.loader) if measurements.loader is not None else None
    later = measurements.branches.checkpoint_norms if measurements.branches is not None else None
    noise_scale = fit_noise_scale(measurements.gradient_noise, later) if measurements.gradient_noise is not None else None
    lr_range = fit_lr_range(measurements.lr_range) if measurements.lr_range is not None else None
    with_rate = with_tested_rate(workload, lr_range)
    branches = over_rule(measurements.branches, with_rate, noise_scale) if measurements.branches is not None else None
    draws = tradeoff = None
    if step_time is not None:
        draws = draw_costs(
            step_time=step_time,
            loader=loader,
            noise_scale=noise_scale,
            memory=memory,
            workload=with_rate,
            constraints=constraints,
            rng=np.random.default_rng(rng_seed),
            branches=branches,
            swept=measurements.swept,
        )
        tradeoff = fit_tradeoff(draws, noise_scale=noise_scale, objective=objective, swept=measurements.swept)
    recommendation = recommend(
        step_time=step_time,
        loader=loader,
        noise_scale=noise_scale,
        memory=memory,
        workload=with_rate,
        objective=objective,
        constraints=constraints,
        draws=draws,
        tradeoff=tradeoff,
        branches=branches,
        swept=measurements.swept,
    )
    return Findings(
        workload=workload,
        environment=environment,
        recommendation=recommendation,
        constraints=constraints,
        memory=memory,
        step_time=step_time,
        loader=loader,
        noise_scale=noise_scale,
        tradeoff=tradeoff,
        branches=None if branches is None else fit_branches(branches, tradeoff),
        lr_range=lr_range,
        swept=measurements.swept,
        reused_parts=reused_parts,
        measured_at=measured_at,
        duration_s=duration_s,
    )
