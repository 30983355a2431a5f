"""Learning-rate range test: which fixed rates to compare after a sweep, and what their short runs say."""

import math
from collections.abc import Container, Mapping, Sequence

import numpy as np

from rightbatch.fits.intervals import FloatArray, student_quantile
from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.lr_range import LrRange, LrVerdict
from rightbatch.records.lr_range_measurements import LrRangeMeasurements, LrRangePoint, LrRangeRound
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.units import format_number

GRID_FACTOR = 2.0
MOST_RATES = 9
FEWEST_RATES = 3
SAFETY = 2.0
"""Ties go to the larger rate only below the divergence edge divided by this."""
NEGLIGIBLE = 0.01
"""A loss is as good as the best one when it misses so little of the fall that the best rate brought."""
_BLOCKS = 4
"""Blocks that the tail of a run is cut into: losses of neighbouring batches are not independent."""
_SLOPE_STEPS = 3
_SAME = 1 + 1e-6


def first_rates(sweep: Sequence[LrRangePoint]) -> tuple[float, ...]:
    """Five rates of a factor-2 grid around the middle of the bracket; none when no rate lowered the loss.

    The bracket runs from the rate at which the loss falls fastest to half the rate at which it diverges. The middle one comes first.

    Args:
        sweep: Ascending rates with smoothed losses; the last diverged if any did.

    Source:
        Smith 2017, arXiv:1506.01186, section 3.3 (the sweep); docs/theory/lr_range.md (why not to stop at it).
    """
    steepest = _steepest(sweep)
    if steepest is None:
        return ()
    edge = next((point.lr for point in sweep if point.diverged), None)
    middle = steepest if edge is None else math.sqrt(min(steepest, edge / SAFETY) * edge / SAFETY)
    return tuple(middle * GRID_FACTOR**power for power in (0, 1, -1, 2, -2))


def next_rate(first: LrRangeRound) -> float | None:
    """The neighbour of the grid to try next, because the best rate so far is at an end of it; none when it is inside.

    Upwards as long as the largest rate that did not diverge ties with the best and nothing above it diverged; else downwards as long as
    the smallest is the best.
    """
    rates = sorted(run.lr for run in first.runs)
    survived = _survived((first,))
    best = _best((first,), survived)
    if len(rates) >= MOST_RATES or not rates:
        return None
    if best is None:
        return rates[0] / GRID_FACTOR
    if max(survived) == rates[-1] and _excess((first,), rates[-1], best)[1]:
        return rates[-1] * GRID_FACTOR
    return rates[0] / GRID_FACTOR if best == rates[0] else None


def contenders(first: LrRangeRound) -> tuple[float, ...]:
    """The rates that a further round has to compare: those that tie with the best, and their neighbours on the grid."""
    survived = sorted(_survived((first,)))
    best = _best((first,), survived)
    if best is None:
        return ()
    tied = [place for place, lr in enumerate(survived) if _excess((first,), lr, best)[1]]
    return tuple(survived[max(0, min(tied) - 1) : max(tied) + 2])


def fit_lr_range(measurements: LrRangeMeasurements) -> LrRange:
    """The largest rate that ties with the best one and lies below half the divergence edge; half of it when none does.

    Two rates are compared on the same batches from the same checkpoint. The difference is averaged over blocks of the runs' tails; a rate
    is worse when its 95 % interval, by Student's t over the blocks, excludes the best and the difference is not negligible.

    Returns:
        ``OK`` with an interval that reaches half a step of the grid beyond the tied rates; ``AT_LEAST`` when the largest rate ties and
        none diverged above it; ``INDETERMINATE`` when the loss was not finite, the budget ended before three rates were compared, none
        lowered the loss beyond its noise, or the smallest rate was still the best.

    Source:
        docs/theory/lr_range.md.
    """
    rounds = measurements.rounds
    survived = _survived(rounds)
    best = _best(rounds, survived)
    edge = _edge(measurements, max(survived, default=0.0))
    problem = _problem(measurements, best)
    verdicts = _verdicts(rounds, survived, best)
    tied = [verdict.lr for verdict in verdicts if verdict.is_tied]
    if problem:
        return _answer(measurements, verdicts, edge, (None, None, None), Status.INDETERMINATE, (problem,))
    rates = [verdict.lr for verdict in verdicts]
    safe = [lr for lr in tied if edge is None or lr * SAFETY * _SAME < edge]
    value = max(safe, default=(edge or max(rates)) / SAFETY)
    half_step = math.sqrt(GRID_FACTOR)
    low = None if min(tied) == min(rates) else min(tied) / half_step
    open_above = max(tied) == max(rates) and edge is None
    high = None if open_above else min(max(tied) * half_step, edge or math.inf)
    remarks = () if safe else ("The best rates lie so close to divergence that half of its edge is recommended instead.",)
    status = Status.AT_LEAST if open_above else Status.OK
    return _answer(measurements, verdicts, edge, (value, None if low is None else min(low, value), high), status, remarks)


def with_tested_rate(workload: WorkloadSummary, tested: LrRange | None) -> WorkloadSummary:
    """The workload with the tested rate and its batch size in place of a tuned one, where the user names none."""
    if tested is None or tested.value is None or workload.lr_batch_size is not None:
        return workload
    return workload.model_copy(update={"lr": tested.value, "lr_batch_size": tested.batch_size, "lr_is_tested": True})


def _steepest(sweep: Sequence[LrRangePoint]) -> float | None:
    """The rate around which the smoothed loss falls most in a few steps of the sweep; none when it never falls."""
    losses = [(point.lr, point.smoothed_loss) for point in sweep if point.smoothed_loss is not None]
    falls = [(earlier - later, math.sqrt(low * high)) for (low, earlier), (high, later) in zip(losses, losses[_SLOPE_STEPS:], strict=False)]
    fall, lr = max(falls, default=(0.0, 0.0))
    return lr if fall > 0 else None


def _survived(rounds: Sequence[LrRangeRound]) -> dict[float, float]:
    """Final loss in the first round of every rate that diverged in none: losses over the same batches."""
    diverged = {run.lr for each in rounds for run in each.runs if run.diverged}
    return (
        {run.lr: run.smoothed_loss for run in rounds[0].runs if run.lr not in diverged and run.smoothed_loss is not None} if rounds else {}
    )


def _best(rounds: Sequence[LrRangeRound], survived: Container[float]) -> float | None:
    """The rate with the least final loss among those that ran in every round; none when all diverged."""
    losses: dict[float, list[float]] = {}
    for each in rounds:
        for run in each.runs:
            if run.lr in survived and run.smoothed_loss is not None:
                losses.setdefault(run.lr, []).append(run.smoothed_loss)
    means = {lr: float(np.mean(found)) for lr, found in losses.items() if len(found) == len(rounds)}
    return min(means, key=means.__getitem__, default=None)


def _edge(measurements: LrRangeMeasurements, survived: float) -> float | None:
    """The smallest rate that diverged above all that did not."""
    runs = (run for each in measurements.rounds for run in each.runs)
    return min((point.lr for point in (*measurements.sweep, *runs) if point.diverged and point.lr > survived), default=None)


def _problem(measurements: LrRangeMeasurements, best: float | None) -> str:
    """Why no rate can be named; empty when one can."""
    if measurements.stopped_by == "failure":
        return f"The range test of the learning rate found nothing. {measurements.remark}".strip()
    tried = sum(len(each.runs) for each in measurements.rounds[:1])
    if tried < FEWEST_RATES:
        if measurements.stopped_by == "budget" or len(measurements.sweep) <= _SLOPE_STEPS:
            return f"The budget ended the range test after {tried} fixed rates: give a larger --budget."
        return "No rate lowered the loss in the sweep: the loss is flat, or its batches differ more than training changes it."
    if best is None:
        return "Every rate diverged, also the smallest: does the loss grow with the batch or the model?"
    fall, error = _paired([(each.still_losses, run.tail_losses) for each in measurements.rounds for run in each.runs if run.lr == best])
    if fall <= error:
        return "No rate lowered the loss by more than its noise in the short runs: give a larger --budget."
    if best == min(run.lr for run in measurements.rounds[0].runs):
        return f"The smallest rate that was tried, {format_number(best)}, was the best: the rate is at most that; give a larger --budget."
    return ""


def _verdicts(rounds: Sequence[LrRangeRound], survived: Mapping[float, float], best: float | None) -> tuple[LrVerdict, ...]:
    verdicts = []
    for lr in sorted(run.lr for each in rounds[:1] for run in each.runs):
        if lr not in survived or best is None:
            verdicts.append(LrVerdict(lr=lr, loss=None, excess=None, is_tied=False))
            continue
        excess, is_tied = _excess(rounds, lr, best)
        verdicts.append(LrVerdict(lr=lr, loss=survived[lr], excess=excess, is_tied=is_tied))
    return tuple(verdicts)


def _excess(rounds: Sequence[LrRangeRound], lr: float, best: float) -> tuple[Estimate, bool]:
    """Loss at a rate over that at the best, and whether the two tie."""
    pairs, falls = [], []
    for each in rounds:
        tails = {run.lr: run.tail_losses for run in each.runs}
        if tails.get(lr) and tails.get(best):
            pairs.append((tails[lr], tails[best]))
            falls.append(float(np.mean(each.still_losses)) - float(np.mean(tails[best])))
    difference, error = _paired(pairs)
    count = _BLOCKS * len(pairs)
    excess = Estimate(value=difference, low=difference - error, high=difference + error, n=count)
    return excess, difference <= max(error, NEGLIGIBLE * float(np.mean(falls)))


def _paired(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float]:
    """Mean difference of paired losses, and the half-width of its 95 % interval over blocks."""
    differences: list[float] = []
    for first, second in pairs:
        difference: FloatArray = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        differences.extend(float(block.mean()) for block in np.array_split(difference, _BLOCKS))
    spread = float(np.std(differences, ddof=1))
    return float(np.mean(differences)), student_quantile(len(differences) - 1) * spread / math.sqrt(len(differences))


def _answer(
    measurements: LrRangeMeasurements,
    verdicts: tuple[LrVerdict, ...],
    edge: float | None,
    ends: tuple[float | None, float | None, float | None],
    status: Status,
    remarks: tuple[str, ...],
) -> LrRange:
    value, low, high = ends
    return LrRange(
        value=value,
        low=low,
        high=high,
        n=sum(run.samples for each in measurements.rounds for run in each.runs),
        status=status,
        batch_size=measurements.batch_size,
        optimizer=measurements.optimizer,
        divergence_edge=edge,
        verdicts=verdicts,
        remarks=remarks,
    )
