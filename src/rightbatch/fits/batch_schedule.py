"""Batch schedules as pure functions of samples seen, with the rate and its company coupled to the size; and the noise-adaptive rule.

Symbols: b global batch size, B simple noise scale, c = B_crit / B, b_half = t0 * tau of the step time, kappa = b / b0.
"""

import bisect
import math
from collections.abc import Sequence

from rightbatch.fits.lr_company import clip_factor, decoupled_weight_decay, is_decoupled, is_layerwise
from rightbatch.fits.lr_scaling import rate_factor, rule_of
from rightbatch.records.estimates import Estimate, NoiseScale, Status
from rightbatch.records.schedule import (
    BatchSchedule,
    BatchSetting,
    ConstantSize,
    GeometricGrowth,
    GrowthForDecay,
    LinearGrowth,
    MilestoneSizes,
    NoiseAdaptive,
    SizeCoupling,
    SizeDecision,
)

_SIZES_PER_OCTAVE = 8


def setting_at(schedule: BatchSchedule, samples_seen: int, decisions: Sequence[SizeDecision] = ()) -> BatchSetting:
    """What the optimizer step that begins after ``samples_seen`` samples trains with.

    Args:
        schedule: Any kind.
        samples_seen: Global, over all epochs and ranks.
        decisions: Of a noise-adaptive schedule so far, ascending in samples; other kinds have none.
    """
    if isinstance(schedule, NoiseAdaptive):
        taken = bisect.bisect_right(decisions, samples_seen, key=lambda decision: decision.samples_seen)
        return coupled_setting(schedule.coupling, decisions[taken - 1].global_batch_size if taken else schedule.start)
    if isinstance(schedule, GrowthForDecay):
        return _grown_setting(schedule, samples_seen)
    return coupled_setting(schedule.coupling, size_at(schedule, samples_seen))


def size_at(schedule: ConstantSize | MilestoneSizes | LinearGrowth | GeometricGrowth, samples_seen: int) -> int:
    """Global batch size of the step that begins after ``samples_seen`` samples."""
    if isinstance(schedule, ConstantSize):
        return schedule.global_batch_size
    if isinstance(schedule, MilestoneSizes):
        passed = bisect.bisect_right(schedule.milestones, samples_seen, key=lambda milestone: milestone[0])
        return schedule.milestones[max(passed, 1) - 1][1]
    share = samples_seen / schedule.over_samples
    if share <= 0:
        return schedule.start
    if share >= 1:
        return schedule.stop
    if isinstance(schedule, LinearGrowth):
        wanted = schedule.start + share * (schedule.stop - schedule.start)
    else:
        wanted = schedule.start * (schedule.stop / schedule.start) ** share
    return _clamped(friendly_size(wanted), schedule.start, schedule.stop)


def friendly_size(size: float) -> int:
    """The nearest of eight sizes an octave, 8 to 16 times a power of two; below 16 the nearest whole number, 1 at least.

    Within 1/16 of any size. Few enough that kernels chosen by shape are seldom chosen anew; from 64 on all are multiples of eight.
    """
    unit = 1 << max(0, math.floor(math.log2(max(size, 1) / _SIZES_PER_OCTAVE)))
    return max(1, unit * round(size / unit))


def coupled_setting(coupling: SizeCoupling | None, size: int) -> BatchSetting:
    """A size with the rate and the company that belong to it: those of a whole run at that size.

    The rate saturates at the noise scale of the run, not at that of the moment, which made rates too hot (docs/theory/dynamic_batch.md).

    Args:
        coupling: None keeps everything as it is.
        size: Global batch size.
    """
    if coupling is None or size == coupling.base_batch_size:
        return BatchSetting(global_batch_size=size)
    factor = rate_factor(coupling.optimizer, coupling.noise_scale_samples, coupling.base_batch_size, size)
    return _with_company(coupling, size, factor, decay_factor=decoupled_weight_decay(1.0, size / coupling.base_batch_size, factor))


def _grown_setting(schedule: GrowthForDecay, samples_seen: int) -> BatchSetting:
    """The rate over the size is divided by the factor at each milestone passed: by growth as far as it may, by decay from there.

    A decay keeps the weight decay, and so does growth that stands for it.
    """
    wanted = schedule.factor ** bisect.bisect_right(schedule.at_samples, samples_seen)
    size = schedule.start if wanted == 1 else min(friendly_size(schedule.start * wanted), schedule.largest)
    factor = size / schedule.start / wanted
    if schedule.coupling is None:
        return BatchSetting(global_batch_size=size, lr_factor=factor)
    at_start = coupled_setting(schedule.coupling, schedule.start)
    return _with_company(schedule.coupling, size, at_start.lr_factor * factor, decay_factor=at_start.weight_decay_factor)


def _with_company(coupling: SizeCoupling, size: int, lr_factor: float, *, decay_factor: float) -> BatchSetting:
    base, noise_scale = coupling.base_batch_size, coupling.noise_scale_samples
    kappa = size / base
    has_rule = rule_of(coupling.optimizer) != "none"
    return BatchSetting(
        global_batch_size=size,
        lr_factor=lr_factor,
        beta_power=kappa if has_rule and not is_layerwise(coupling.optimizer) else 1.0,
        weight_decay_factor=decay_factor if is_decoupled(coupling.optimizer) else 1.0,
        clip_factor=1.0 if noise_scale is None else clip_factor(1.0, noise_scale, base, size),
    )


def latest_noise(noise: NoiseScale) -> NoiseScale | Estimate:
    """The most recent part of a run's noise scale; the whole where it has no parts."""
    return noise.snapshots[-1].noise_scale if noise.snapshots else noise


def next_size(schedule: NoiseAdaptive, current: int, noise: NoiseScale | Estimate) -> int:
    """The size to train with from now on: b = sqrt(c B b_half), in friendly sizes within the schedule's bounds.

    A change needs evidence: the size must differ by more than the hysteresis, and the noise scale for which the present size is best must
    lie outside the interval of the measured one. What is only bounded from below lets the size grow to what the bound supports.

    Args:
        schedule: The bounds and what the rule needs.
        current: The present size.
        noise: The latest noise scale.

    Returns:
        ``current`` when the noise scale says nothing.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, equation 2.12 and appendix D; docs/theory/dynamic_batch.md.
    """
    known = noise.low if noise.status is Status.AT_LEAST else noise.value if noise.status is Status.OK else None
    if known is None or known <= 0:
        return current
    per_noise = schedule.calibration * schedule.half_saturation
    suits_current = current**2 / per_noise
    low, high = noise.low, noise.high
    if (low is None or low <= suits_current) and (high is None or suits_current <= high):
        return current
    wanted = math.sqrt(per_noise * known)
    within = min(max(wanted, current / schedule.most_growth), current * schedule.most_growth)
    size = min(max(friendly_size(within), schedule.smallest), schedule.largest)
    if noise.status is Status.AT_LEAST and size < current:
        return current
    return size if abs(size / current - 1) > schedule.hysteresis else current


def _clamped(size: int, one: int, other: int) -> int:
    return min(max(size, min(one, other)), max(one, other))
