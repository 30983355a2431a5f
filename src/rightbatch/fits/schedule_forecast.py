"""What a batch schedule gains over the best fixed size: T_dyn / T_fix, draw by draw.

Symbols: b global batch size, B noise scale, c = B_crit / B, t(b) step time, p progress (fits/schedule_costs.py).
"""

import math
from dataclasses import replace

import numpy as np

from rightbatch.fits.batch_schedule import friendly_size, setting_at
from rightbatch.fits.critical_batch import CALIBRATION_LOG_SD, CALIBRATION_MEDIAN
from rightbatch.fits.intervals import FloatArray, normal_draws
from rightbatch.fits.noise_course import CELLS, draw_noise_course
from rightbatch.fits.schedule_costs import IntArray, RunDraws
from rightbatch.fits.tradeoff import N_DRAWS, CostDraws, draw_costs, step_time_at, summarise
from rightbatch.records.estimates import Estimate, NoiseScale, Status, StepTimeCurve
from rightbatch.records.plan import Findings
from rightbatch.records.schedule import (
    BatchSchedule,
    ConstantSize,
    GeometricGrowth,
    GrowthForDecay,
    LinearGrowth,
    MilestoneSizes,
    NoiseAdaptive,
    ScheduleForecast,
)
from rightbatch.units import format_number, format_percent

WORTH_IT = 0.95
"""Largest expected ratio of times at which a schedule is worth its trouble."""
_SIZES_PER_OCTAVE = 8
_FLAT = 3.0
"""A noise scale that grows by less than this factor asks for sizes within its square root: nearly one size."""
_NORMAL_QUANTILE_90 = 1.6448536269514722


def forecast_schedule(
    findings: Findings,
    schedule: BatchSchedule,
    total_samples: int,
    *,
    noise: NoiseScale | None = None,
    step_time: StepTimeCurve | None = None,
    rng_seed: int = 0,
) -> ScheduleForecast:
    """Predict the time to the target under a schedule over that of the best fixed size.

    T_dyn / T_fix = sum dp (1 + c B / b(p)) t(b(p)) / min_b sum dp (1 + c B / b) t(b) over draws of the course of B, of c and of t. With the
    optimal b and the affine law this is the integral of (sqrt(t0) + sqrt(c B / tau))^2 over that minimum. The noise-adaptive kind counts as
    well calibrated as its c is against the belief's median: an error of c would mislead the choice of a fixed size as much.

    Growth that stands for a decay of the rate is compared with the size that it starts with and the rate divided instead: by Smith et al.
    both need the same samples, so that only the seconds of a sample count.

    Args:
        findings: Of ``find``: step time, noise, bounds and plan.
        schedule: What is forecast.
        total_samples: Samples that the plan's size is expected to need, at least 1.
        noise: Noise scale of a finished run of so many samples, such as ``NoiseMonitor.noise_scale``; none takes the pilot's.
        step_time: Of another device; none takes the measured one.
        rng_seed: Equal arguments give equal forecasts.

    Returns:
        ``INDETERMINATE`` when the noise or the step time is unknown or unstable, or the loss couples the samples of a batch. Step times
        that no law fits are ``INCONSISTENT`` and still hold at and between the timed sizes: then only a schedule below those is refused.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix D; Smith et al. 2018, arXiv:1711.00489; docs/theory/dynamic_batch.md.
    """
    rng = np.random.default_rng(rng_seed)
    noise, step_time = noise or findings.noise_scale, step_time or findings.step_time
    plan = findings.recommendation.plan
    if step_time is None or plan is None:
        return _nothing("Without a step time and a plan nothing can be forecast: run find with all of its parts.")
    if step_time.status is Status.UNSTABLE:
        return _nothing("The step times are unstable, so nothing can be forecast: free the machine and measure again, with --fresh.")
    if findings.workload.couples_samples:
        return _nothing("The loss couples the samples of a batch: another size is another objective, which no forecast compares.")
    costs = draw_costs(
        step_time=step_time,
        loader=findings.loader,
        noise_scale=None,
        memory=findings.memory,
        workload=findings.workload,
        constraints=findings.constraints,
        rng=rng,
    )
    if costs is None:
        return _nothing("No timed size is allowed: raise --max-global-batch or the limit.")
    smallest_timed = round(costs.measured_sizes[0] * costs.world_size)
    if step_time.status is Status.INCONSISTENT and min(_ends(schedule), default=smallest_timed) < smallest_timed:
        return _nothing(
            "No curve fits the step times, so nothing can be forecast below the smallest timed size: "
            f"keep the batch at {smallest_timed} or more."
        )
    if isinstance(schedule, GrowthForDecay):
        return _forecast_growth(costs, schedule, total_samples)
    course = None if noise is None else draw_noise_course(noise, total_samples, rng, N_DRAWS)
    if course is None:
        return _nothing("The gradient noise is not known: measure longer, with --budget.")
    calibration = CALIBRATION_MEDIAN * np.exp(CALIBRATION_LOG_SD * normal_draws(rng, N_DRAWS))
    sizes = _sizes(costs, schedule)
    step_time_s = np.column_stack([step_time_at(costs, round(size)) for size in sizes])
    run = RunDraws.along(calibration[:, None] * course, plan.global_batch_size, total_samples, sizes, step_time_s)
    if findings.branches is not None and findings.tradeoff is not None:
        rows = _drawn_again(run, findings.tradeoff.critical_batch_size, rng)
        run = replace(run, critical=run.critical[rows], progress=run.progress[rows])
        calibration = calibration[rows]
    if isinstance(schedule, NoiseAdaptive):
        chosen = run.by_noise(schedule, schedule.calibration / float(np.median(calibration)))
    else:
        chosen = run.by_samples(schedule)
    return _forecast(run, chosen)


def _forecast_growth(costs: CostDraws, schedule: GrowthForDecay, total_samples: int) -> ScheduleForecast:
    """Growth that stands for a decay needs the samples of the decay, so that only the seconds of a sample differ."""
    positions = (np.arange(CELLS) + 0.5) / CELLS * total_samples
    sizes = [setting_at(schedule, int(position)).global_batch_size for position in positions]
    sample_s = {size: step_time_at(costs, size) / size for size in {*sizes, schedule.start}}
    relative_time = summarise(np.mean([sample_s[size] for size in sizes], axis=0) / sample_s[schedule.start])
    ratio = relative_time.value or math.nan
    worth_it = ratio <= WORTH_IT
    verdict = "Worth it" if worth_it else "Not worth it"
    why = "as many samples by assumption, and fewer steps" if ratio <= 1 else "as many samples by assumption, and larger steps are slower"
    return ScheduleForecast(
        status=Status.OK,
        relative_time=relative_time,
        relative_samples=Estimate(value=1.0, low=None, high=None, n=0),
        worth_it=worth_it,
        best_fixed_size=schedule.start,
        first_size=sizes[0],
        last_size=sizes[-1],
        noise_growth=Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE),
        reasons=(f"{verdict}: {_saved(ratio)} size {schedule.start} with the rate divided: {why}.",),
    )


def _saved(ratio: float) -> str:
    return f"{format_percent(abs(1 - ratio))} {'less' if ratio <= 1 else 'more'} time than"


def _forecast(run: RunDraws, chosen: IntArray) -> ScheduleForecast:
    time_s, samples = run.scheduled(chosen)
    fixed_time_s, fixed_samples = run.fixed()
    best = fixed_time_s.argmin(axis=1)
    rows = np.arange(len(best))
    relative_time = summarise(time_s / fixed_time_s[rows, best])
    overall = int((fixed_time_s / fixed_time_s.min(axis=1, keepdims=True)).mean(axis=0).argmin())
    worth_it = (relative_time.value or math.inf) <= WORTH_IT
    first, last = (round(float(np.median(run.sizes[chosen[:, at]]))) for at in (0, -1))
    growth = _median(run.critical[:, -1] / run.critical[:, 0])
    return ScheduleForecast(
        status=Status.OK,
        relative_time=relative_time,
        relative_samples=summarise(samples / fixed_samples[rows, best]),
        worth_it=worth_it,
        best_fixed_size=round(run.sizes[overall]),
        first_size=first,
        last_size=last,
        noise_growth=growth,
        reasons=_reasons(run, relative_time, growth, (first, last), worth_it=worth_it),
    )


def _reasons(run: RunDraws, relative_time: Estimate, growth: Estimate, ends: tuple[int, int], *, worth_it: bool) -> tuple[str, ...]:
    ratio, grows = relative_time.value or math.nan, growth.value or math.nan
    saved = f"{_saved(ratio)} the best fixed size"
    if worth_it:
        change = f"the noise scale changes by a factor of {format_number(grows)} over the run"
        return (f"Worth it: {saved}, because {change} and the size follows it, {ends[0]} to {ends[1]}.",)
    reasons = [f"Not worth it: {saved}."]
    ideal_time_s, _ = run.scheduled(best := run.best())
    ideal = float((ideal_time_s / run.fixed()[0].min(axis=1)).mean())
    if ideal <= WORTH_IT:
        reasons.append(f"Another schedule could take {format_percent(1 - ideal)} less time: this one does not follow the noise.")
    elif 1 / _FLAT < grows < _FLAT:
        reasons.append(f"The noise scale changes by a factor of {format_number(grows)} over the run: one size suits all of it.")
    bound = _bound(run, best)
    if bound:
        reasons.append(bound)
    return tuple(reasons)


def _bound(run: RunDraws, best: IntArray) -> str:
    """Why the best size hardly changes although the noise does; empty when it does change."""
    if (best == len(run.sizes) - 1).mean() > 0.5:
        return f"The largest size considered, {run.sizes[-1]:.0f}, is best for most of the run: memory or the dataset ends the choice."
    if (best == 0).mean() > 0.5:
        return f"The smallest size timed, {run.sizes[0]:.0f}, is best for most of the run: a step costs little besides its samples."
    return ""


def _drawn_again(run: RunDraws, critical: Estimate, rng: np.random.Generator) -> IntArray:
    """Rows drawn again, so that the critical batch size of the run is spread as the branches left it (importance resampling)."""
    log_run = np.log((run.progress * run.critical).sum(axis=1) / run.progress.sum(axis=1))
    if critical.value is None or critical.low is None:
        return np.arange(len(log_run))
    spread = math.log(critical.value / critical.low) / _NORMAL_QUANTILE_90
    before = float(log_run.std())
    log_weight = -0.5 * ((log_run - math.log(critical.value)) / spread) ** 2 + 0.5 * ((log_run - log_run.mean()) / before) ** 2
    weights = np.exp(log_weight - log_weight.max())
    return rng.choice(len(log_run), len(log_run), p=weights / weights.sum())


def _sizes(costs: CostDraws, schedule: BatchSchedule) -> FloatArray:
    """Friendly sizes from the smallest candidate to the largest, and on to where the schedule goes."""
    reach = [float(costs.sizes[0]), float(costs.sizes[-1]), *map(float, _ends(schedule))]
    octaves = math.log2(max(reach) / min(reach))
    between = np.geomspace(min(reach), max(reach), 1 + math.ceil(octaves * _SIZES_PER_OCTAVE))
    return np.array(sorted({*reach, *(friendly_size(size) for size in between)}), dtype=np.float64)


def _ends(schedule: BatchSchedule) -> tuple[int, ...]:
    """Sizes that a schedule takes beside those between them; none of a noise-adaptive one, whose bounds it may never see."""
    if isinstance(schedule, ConstantSize):
        return (schedule.global_batch_size,)
    if isinstance(schedule, MilestoneSizes):
        return tuple(size for _, size in schedule.milestones)
    if isinstance(schedule, GrowthForDecay):
        return (schedule.start,)
    return (schedule.start, schedule.stop) if isinstance(schedule, LinearGrowth | GeometricGrowth) else ()


def _median(draws: FloatArray) -> Estimate:
    low, median, high = (float(value) for value in np.percentile(draws, [5, 50, 95]))
    return Estimate(value=median, low=low, high=high, n=len(draws))


def _nothing(reason: str) -> ScheduleForecast:
    unknown = Estimate(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE)
    return ScheduleForecast(
        status=Status.INDETERMINATE,
        relative_time=unknown,
        relative_samples=unknown,
        worth_it=False,
        best_fixed_size=None,
        first_size=None,
        last_size=None,
        noise_growth=unknown,
        reasons=(reason,),
    )
