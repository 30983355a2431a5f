"""What a finished sweep of the same workload says to the answer: training probes of the whole run, at tuned rates."""

import math

import numpy as np

from rightbatch.fits.intervals import log_standard_error
from rightbatch.fits.samples_curve import PRIORS, CurveDraws, draw_curves, weigh
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.sweep import SweepResult
from rightbatch.records.training import ProbeOutcome, SweepEvidence, TrainingProbe

RATE_LOG_ERROR = 0.05
"""How far rates a factor of two apart leave a size above its own optimum, in log samples."""
_OVERSAMPLED = 8
"""Draws for each that is kept: sizes that were swept leave few of them."""


def evidence_of(result: SweepResult, folder: str) -> SweepEvidence | None:
    """Return one probe a size, at its tuned rate, with the error of its mean over seeds; none where fewer than two sizes arrived.

    Args:
        result: Of a sweep that came to its end.
        folder: Where it is kept.
    """
    probes = []
    for point in result.points:
        if point.status == "tuned" and point.samples.value is not None:
            error = math.hypot(log_standard_error(point.samples), RATE_LOG_ERROR)
            probes.append(
                TrainingProbe(
                    global_batch_size=point.global_batch_size,
                    lr=point.lr,
                    outcome=ProbeOutcome.REACHED,
                    samples=point.samples.value,
                    log_error=error,
                )
            )
    if result.status != "ok" or len(probes) < 2:
        return None
    return SweepEvidence(target=str(result.settings.target), folder=folder, probes=tuple(probes))


def swept_curves(evidence: SweepEvidence, rng: np.random.Generator, n_draws: int) -> CurveDraws:
    """Draws of the samples to the target: curves for tuned rates, weighed by the sweep's sizes, then drawn again by weight.

    The gradient noise has no part in them: what training to the target showed leaves nothing for a pilot to add.
    """
    middle = math.exp(float(np.mean([math.log(probe.global_batch_size) for probe in evidence.probes])))
    many = _OVERSAMPLED * n_draws
    draws = draw_curves(PRIORS["tuned"], middle=middle, rng=rng, n_draws=many)
    return draws.rows(rng.choice(many, n_draws, p=weigh(draws, evidence.probes).weights))


def is_outside(size: int, evidence: SweepEvidence | None) -> bool:
    """Whether a size lies outside those that reached the target in a sweep; where there was one, nothing is known of such a size."""
    if evidence is None:
        return False
    sizes = [probe.global_batch_size for probe in evidence.probes]
    return not min(sizes) <= size <= max(sizes)


def with_swept_rate(workload: WorkloadSummary, evidence: SweepEvidence | None, size: int) -> WorkloadSummary:
    """Return the workload with the rate that the sweep tuned at the size nearest to this one."""
    if evidence is None:
        return workload
    nearest = min(evidence.probes, key=lambda probe: abs(math.log(probe.global_batch_size / size)))
    return workload.model_copy(update={"lr": nearest.lr, "lr_batch_size": nearest.global_batch_size, "lr_is_tested": True})
