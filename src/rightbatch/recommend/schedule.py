"""The batch schedule to train with: proposed from what was found, or read as the user wrote it, with rate and company coupled."""

import math

import numpy as np

from rightbatch.errors import UsageError
from rightbatch.fits.batch_schedule import friendly_size
from rightbatch.fits.critical_batch import (
    CALIBRATION_MEDIAN,
    GROWTH_WITH_PILOT_MEDIAN,
    GROWTH_WITHOUT_PILOT_MEDIAN,
)
from rightbatch.fits.lr_scaling import known_noise_scale
from rightbatch.fits.noise_course import draw_noise_course
from rightbatch.fits.schedule_text import FORMS, parse_schedule
from rightbatch.fits.tradeoff import LARGEST_SHARE_OF_DATASET, N_DRAWS
from rightbatch.records.plan import BatchPlan, Findings
from rightbatch.records.schedule import (
    BatchSchedule,
    ConstantSize,
    GeometricGrowth,
    GrowthForDecay,
    LinearGrowth,
    MilestoneSizes,
    NoiseAdaptive,
    ScheduleKind,
    SizeCoupling,
)

DECAY = 10.0
"""Factor by which step schedules of the rate usually divide it, at half and at three quarters of the run (He et al. 2016)."""


def requested_schedule(text: str, findings: Findings, total_samples: int) -> BatchSchedule:
    """The schedule that a word asks for, with rate and company coupled to the size.

    Args:
        text: A word of ``parse_schedule``, or only the name of a kind, whose numbers are then proposed.
        findings: What the coupling and the proposal rest on.
        total_samples: Samples that the training is expected to take.

    Raises:
        UsageError: The word has none of the forms, or the findings do not say enough for a proposal.
    """
    kind = text.strip()
    if kind in FORMS:
        return propose(findings, kind, total_samples)  # type: ignore[arg-type]  # FORMS has the kinds as its keys
    return parse_schedule(text).model_copy(update={"coupling": coupling_of(findings)})


def coupling_of(findings: Findings) -> SizeCoupling:
    """How rate and company follow the size in a training whose optimizer was built for the plan.

    Raises:
        UsageError: The findings name no plan.
    """
    return SizeCoupling(
        base_batch_size=_plan(findings).global_batch_size,
        optimizer=findings.workload.optimizer,
        noise_scale_samples=known_noise_scale(findings.noise_scale),
    )


def propose(findings: Findings, kind: ScheduleKind, total_samples: int) -> BatchSchedule:
    """A schedule of a kind with its numbers from what was measured.

    It goes from the best size for the noise scale at the run's beginning to the best for that at its end, by
    b = sqrt(c B b_half); the noise-adaptive kind begins at the plan's size and has bounds alone.

    Args:
        findings: With a plan, a step-time law and a noise scale; a constant size needs the plan alone.
        kind: Of schedule.
        total_samples: Samples that the training is expected to take, at least 1.

    Raises:
        UsageError: The findings lack one of them.
    """
    coupling, plan = coupling_of(findings), _plan(findings)
    if kind == "constant":
        return ConstantSize(global_batch_size=plan.global_batch_size, coupling=coupling)
    smallest, largest = _bounds(findings, plan)
    calibration, half_saturation = _calibration(findings), _half_saturation(findings)
    if kind == "noise":
        return NoiseAdaptive(
            start=plan.global_batch_size,
            smallest=smallest,
            largest=largest,
            half_saturation=half_saturation,
            calibration=calibration,
            coupling=coupling,
        )
    if kind == "grow":
        at = tuple(max(1, math.ceil(share * total_samples)) for share in (0.5, 0.75))
        return GrowthForDecay(
            start=plan.global_batch_size,
            factor=DECAY,
            at_samples=at if at[0] < at[1] else at[:1],
            largest=max(plan.global_batch_size, min(largest, round(calibration * _noise(findings)))),
            coupling=coupling,
        )
    first, last = (
        min(max(friendly_size(math.sqrt(calibration * noise * half_saturation)), smallest), largest)
        for noise in _ends(findings, total_samples)
    )
    if kind == "milestones":
        middle = friendly_size(math.sqrt(first * last))
        steps = ((0, first), (math.ceil(total_samples / 9), middle), (math.ceil(total_samples / 3), last))
        return MilestoneSizes(milestones=tuple({samples: (samples, size) for samples, size in steps}.values()), coupling=coupling)
    growth = {"start": first, "stop": last, "over_samples": max(1, total_samples)}
    return LinearGrowth(**growth, coupling=coupling) if kind == "linear" else GeometricGrowth(**growth, coupling=coupling)


def _plan(findings: Findings) -> BatchPlan:
    if findings.recommendation.plan is None:
        raise UsageError("a batch schedule starts from a plan, and this run found none; see what it says, and measure again.")
    return findings.recommendation.plan


def _bounds(findings: Findings, plan: BatchPlan) -> tuple[int, int]:
    """Smallest timed and largest allowed size; the plan's lies between them."""
    workload, constraints = findings.workload, findings.constraints
    timed = [point.micro_batch_size * plan.world_size for point in findings.step_time.points] if findings.step_time else []
    cap = min(workload.train_size, constraints.max_global_batch_size or workload.train_size)
    accumulated = min(workload.train_size // LARGEST_SHARE_OF_DATASET, cap)
    largest = max([size for size in timed if size <= cap] + ([] if workload.couples_samples else [accumulated]), default=1)
    return min([*timed, plan.global_batch_size]), max(largest, plan.global_batch_size)


def _half_saturation(findings: Findings) -> float:
    half = findings.step_time.half_saturation if findings.step_time is not None else None
    if not half:
        raise UsageError(
            "a schedule that follows the noise needs b_half of the step time; time two sizes or more, or write the schedule out."
        )
    return half


def _noise(findings: Findings) -> float:
    noise = known_noise_scale(findings.noise_scale)
    if noise is None:
        raise _without_noise()
    return noise


def _calibration(findings: Findings) -> float:
    """B_crit over the noise scale as training at several sizes left it; its prior's median without that."""
    critical = findings.tradeoff.critical_batch_size.value if findings.tradeoff is not None else None
    if findings.branches is None or critical is None:
        return CALIBRATION_MEDIAN
    has_pilot = findings.noise_scale is not None and findings.noise_scale.pilot_samples > 0
    return critical / (_noise(findings) * (GROWTH_WITH_PILOT_MEDIAN if has_pilot else GROWTH_WITHOUT_PILOT_MEDIAN))


def _ends(findings: Findings, total_samples: int) -> tuple[float, float]:
    """Median noise scale at the run's beginning and at its end."""
    noise = findings.noise_scale
    course = None if noise is None else draw_noise_course(noise, total_samples, np.random.default_rng(0), N_DRAWS)
    if course is None:
        raise _without_noise()
    return float(np.median(course[:, 0])), float(np.median(course[:, -1]))


def _without_noise() -> UsageError:
    return UsageError("a schedule from the noise needs a measured noise scale; this run has none; measure longer, or write it out.")
