"""What a schedule costs, by numerical integration and by a step-by-step run; and findings with a planted course of noise."""

import math

import numpy as np
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from oracles.oracle_curves import ENVIRONMENT, law_s, timed, workload
from rightbatch.fits.step_time import fit_step_time
from rightbatch.records.estimates import Estimate, NoiseScale, NoiseSnapshot, Status
from rightbatch.records.plan import BatchPlan, Findings, LrCoupling, Objective, Recommendation

SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)


def best_ratio_by_quadrature(critical_at, reference_size, total_samples, fixed_s, rate):
    """T_dyn / T_fix of the affine law t = t0 + b / tau: integrals over samples x of a run at one size, with dp = dx / (b0 + C)."""

    def over_run(function):
        value, _ = quad(lambda x: function(critical_at(x)) / (reference_size + critical_at(x)), 0, total_samples, limit=500)
        return value

    def fixed(log_size):
        size = math.exp(log_size)
        return over_run(lambda critical: (1 + critical / size) * (fixed_s + size / rate))

    best = minimize_scalar(fixed, bounds=(0, 20), method="bounded", options={"xatol": 1e-6}).fun
    return over_run(lambda critical: (math.sqrt(fixed_s) + math.sqrt(critical / rate)) ** 2) / best


def costs_by_steps(size_at, critical_at, reference_size, total_samples, step_time_s):
    """Seconds and samples of a run to the progress that ``total_samples`` at the reference size make, one optimizer step at a time.

    ``critical_at`` is a function of the samples that the run at the reference size has seen where the progress is the same.
    """
    x = seen = seconds = 0.0
    while x < total_samples:
        size, critical = size_at(seen, x), critical_at(x)
        made = (reference_size + critical) / (1 + critical / size)
        share = min(1.0, (total_samples - x) / made)
        x, seen, seconds = x + share * made, seen + share * size, seconds + share * step_time_s(size)
    return seconds, seen


def snapshot(samples_seen, value, factor=1.05, status=Status.OK):
    known = status is Status.OK
    scale = Estimate(
        value=value if known else None,
        low=None if status is Status.INDETERMINATE else value / factor,
        high=value * factor if known else None,
        n=4096,
        status=status,
    )
    some = Estimate(value=1.0, low=0.9, high=1.1, n=4096)
    return NoiseSnapshot(
        samples_seen=samples_seen, noise_scale=scale, grad_sq_norm=some, grad_noise_trace=some, micro_batch_size=8, micro_batch_count=512
    )


def noise_along(course, positions, *, status=Status.OK):
    """A noise scale with a snapshot at each position, from a planted course."""
    snapshots = tuple(snapshot(position, course(position), status=status) for position in positions)
    value = float(np.mean([course(position) for position in positions]))
    return NoiseScale(
        value=value, low=value / 1.05, high=value * 1.05, n=4096, status=Status.OK, snapshots=snapshots, pilot_samples=positions[-1]
    )


def findings(noise_scale, *, fixed_s=0.02, rate=8000.0, sizes=SIZES, plan_size=64, **changes):
    """Findings of a device with a planted affine law, and a plan."""
    plan = BatchPlan(global_batch_size=plan_size, micro_batch_size=plan_size, lr=0.1)
    recommendation = Recommendation(
        status="ok",
        plan=plan,
        objective=Objective(),
        binding_constraint=None,
        evidence_level=1,
        expected_regret=0.0,
        equivalent_batch_sizes=(plan_size,),
        lr=LrCoupling(rule="saturating linear", factor=1.0, base_lr=0.1, base_batch_size=plan_size, validity=""),
        comparisons=(),
        sensitivities=(),
        advice=(),
    )
    base = {
        "workload": workload(),
        "environment": ENVIRONMENT,
        "recommendation": recommendation,
        "memory": None,
        "step_time": fit_step_time(timed({size: law_s(size, fixed_s, rate) for size in sizes})),
        "loader": None,
        "noise_scale": noise_scale,
        "tradeoff": None,
        "measured_at": "2026-11-25T00:00:00+00:00",
        "duration_s": 1.0,
    }
    return Findings(**{**base, **changes})
