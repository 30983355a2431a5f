"""How many samples a branch needs to a loss: its curve made monotone, and where that crosses the target."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from rightbatch.records.estimates import BranchCurve, BranchPoint, Status, Tradeoff
from rightbatch.records.training import BranchMeasurements, BranchProbe, ProbeOutcome

TARGET_SHARE = 0.85
"""The target is the loss that the first branch came to after this share of its samples: the rest of it shows that the loss stays there."""
COMPARED_FROM = 0.4
"""Branches are compared at the losses that the first one came to from this share of its samples on: one crossing alone is mostly luck."""
_COMPARED = 10
CHANCE_LOG_ERROR = 0.12
"""Of the samples of a branch, beside the scatter of its curve: weights that see the same samples in the same order come apart by chance."""
STALLED = 0.25
"""A branch that falls this many times slower than the first did at the same loss has stalled."""
_FEWEST_POINTS = 4
_LEAST_FALL = 2.5
"""Of the first branch, over its scatter: with less, samples read off it have an error of a factor of two and more."""
_UNKNOWN_ERROR = 1.0

Curve = Sequence[tuple[int, float]]
"""(samples, loss), ascending in samples."""


def monotone(curve: Curve) -> tuple[tuple[float, float], ...]:
    """Return the non-increasing curve nearest to the losses: (mean samples, loss) of each level.

    Source:
        Isotonic regression by pooling adjacent violators: Barlow et al., Statistical Inference under Order Restrictions (1972).
    """
    from scipy.optimize import isotonic_regression

    samples = np.array([at for at, _ in curve], dtype=np.float64)
    result = isotonic_regression(np.array([loss for _, loss in curve], dtype=np.float64), increasing=False)
    edges = result.blocks
    return tuple((float(samples[start:stop].mean()), float(result.x[start])) for start, stop in pairwise(edges))


def samples_to_loss(curve: Curve, target_loss: float) -> float | None:
    """Return where the monotone curve crosses a loss, by straight lines between its levels; none when it does not reach it.

    Returns:
        Samples; those of the first level when it lies below the target already.
    """
    levels = monotone(curve)
    if not levels or not math.isfinite(levels[-1][1]) or levels[-1][1] > target_loss:
        return None
    for (before, high), (after, low) in pairwise(levels):
        if high > target_loss >= low:
            return before + (after - before) * (high - target_loss) / (high - low)
    return levels[0][0]


def log_ratio(curve: Curve, first: Curve) -> float | None:
    """Return the logarithm of a branch's samples over the first branch's: the mean over losses from 40 to 85 % of the first's way.

    Returns:
        None when the branch did not come to half of those losses.
    """
    levels = monotone(first)
    shares = np.linspace(COMPARED_FROM, TARGET_SHARE, _COMPARED) * first[-1][0]
    losses = np.interp(shares, [at for at, _ in levels], [loss for _, loss in levels])
    needed = [(samples_to_loss(curve, float(loss)), samples_to_loss(first, float(loss))) for loss in losses]
    ratios = [math.log(own / reference) for own, reference in needed if own is not None and reference is not None]
    return float(np.mean(ratios)) if len(ratios) >= _COMPARED / 2 else None


def target_loss(first: Curve) -> float | None:
    """Return the loss that the first branch came to at 85 % of its samples.

    Returns:
        None when the losses are not finite, or fell by then no further than they scatter about the monotone curve: nothing to compare.
    """
    if len(first) < _FEWEST_POINTS or not all(math.isfinite(loss) for _, loss in first):
        return None
    levels = monotone(first)
    samples, losses = [at for at, _ in levels], [loss for _, loss in levels]
    loss = float(np.interp(TARGET_SHARE * first[-1][0], samples, losses))
    return loss if losses[0] - loss > _LEAST_FALL * _scatter(first, levels) else None


def log_error(curve: Curve) -> float:
    """Standard error of the logarithm of samples read off a curve: its scatter over its mean slope in log samples.

    A crossing lies between two levels, so two losses or more share in it.
    """
    levels = monotone(curve)
    fall = levels[0][1] - levels[-1][1]
    if fall <= 0:
        return _UNKNOWN_ERROR
    slope = fall / math.log(levels[-1][0] / levels[0][0])
    return min(_scatter(curve, levels) / math.sqrt(2) / slope, _UNKNOWN_ERROR)


def _scatter(curve: Curve, levels: Curve | tuple[tuple[float, float], ...]) -> float:
    samples, losses = [at for at, _ in levels], [loss for _, loss in levels]
    return float(np.std([loss - np.interp(at, samples, losses) for at, loss in curve]))


def has_stalled(curve: Curve, first: Curve) -> bool:
    """Whether a branch falls far slower over its last third than the first one did from the same loss on: it may never arrive.

    An early lead says nothing about the end: a rate too hot for the size falls fast, then stays above a floor.
    """
    if len(curve) < 2 * _FEWEST_POINTS or len(first) < 2 * _FEWEST_POINTS:
        return False
    start = curve[2 * len(curve) // 3][0]
    levels, reference = monotone(curve), monotone(first)
    at, losses = np.array([samples for samples, _ in levels]), np.array([loss for _, loss in levels])
    before, after = (float(np.interp(samples, at, losses)) for samples in (start, curve[-1][0]))
    reached = samples_to_loss(first, before)
    if reached is None or reached >= reference[-1][0]:
        return False
    rate = (before - after) / max(curve[-1][0] - start, 1)
    expected = (before - reference[-1][1]) / max(reference[-1][0] - reached, 1)
    return expected > 0 and rate < STALLED * expected and after > reference[-1][1]


def judged(probe: BranchProbe, *, first: Curve, loss: float) -> ProbeOutcome:
    """What a branch that ended without the target says: failed when it diverged or stalled, else stopped."""
    last = probe.losses[-1][1] if probe.losses else math.nan
    diverged = not math.isfinite(last) or (len(probe.losses) >= _FEWEST_POINTS and last > first[0][1] > loss)
    return ProbeOutcome.FAILED if diverged or has_stalled(probe.losses, first) else ProbeOutcome.STOPPED


def fit_branches(measured: BranchMeasurements, tradeoff: Tradeoff | None) -> BranchCurve:
    """Put what the branches needed beside each other.

    Args:
        measured: The branches.
        tradeoff: Where the measured seconds a sample come from.
    """
    seconds = {} if tradeoff is None else {point.global_batch_size: 1 / point.samples_per_s for point in tradeoff.points}
    results = [probe.result for probe in measured.probes]
    points = []
    for result in results:
        first = results[0]
        pace = (seconds.get(result.global_batch_size), seconds.get(first.global_batch_size))
        samples = result.samples / first.samples
        points.append(
            BranchPoint(
                global_batch_size=result.global_batch_size,
                lr=result.lr,
                outcome=result.outcome,
                relative_samples=samples,
                relative_time=samples * pace[0] / pace[1] if pace[0] and pace[1] else None,
            )
        )
    return BranchCurve(
        status=Status.OK if len(points) > 1 else Status.INDETERMINATE,
        checkpoint_samples=measured.checkpoint_samples,
        evaluated_samples=measured.evaluated_samples,
        target_loss=measured.target_loss,
        points=tuple(points),
        remarks=(measured.remark,) if measured.remark else (),
    )
