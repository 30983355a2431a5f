"""Which candidate serves a goal, which others serve it as well, and what keeps the choice from being larger or smaller."""

import numpy as np

from rightbatch.fits.intervals import FloatArray
from rightbatch.fits.tradeoff import CostDraws, relative_to_best, time_at
from rightbatch.records.estimates import MemoryCurve, StepTimeCurve
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import Binding, Constraints, Goal, Objective

TIE = 0.01
"""Sizes whose expected regret differs by no more than this are a tie; the smaller one is taken."""
SURE = 0.9
"""Probability with which an equivalent size must be within the tolerance."""
_FRIENDLY_MULTIPLE = 8


def choose(draws: CostDraws, objective: Objective) -> int:
    """Index of the candidate that serves the goal.

    Time and energy: least expected regret, ties to the smaller. Samples: the fastest within the tolerance of the fewest samples.
    Accuracy: the smallest friendly size (a power of two, else a multiple of eight, else any) within the tolerance of the shortest time.

    Raises:
        UsageError: The goal is energy and none was measured.
    """
    relative = np.where(draws.may_be_chosen, relative_to_best(draws.objective(objective.goal)).mean(axis=0), np.inf)
    enough = np.flatnonzero(relative <= relative.min() + objective.tolerance)
    if objective.goal is Goal.SAMPLES:
        time = relative_to_best(draws.time()).mean(axis=0)
        return int(enough[np.argmin(time[enough])])
    if objective.goal is Goal.ACCURACY:
        return min((int(i) for i in enough), key=lambda i: (_unfriendliness(draws.candidates[i].global_batch_size), i))
    return int(np.flatnonzero(relative <= relative.min() + TIE)[0])


def equivalents(draws: CostDraws, objective: Objective, chosen: int) -> tuple[int, ...]:
    """Sizes within the tolerance of the best with probability 90 %; within it in expectation when none is that sure. The choice is one."""
    relative = relative_to_best(draws.objective(objective.goal))
    good = (relative <= 1 + objective.tolerance).mean(axis=0) >= SURE
    if not good.any():
        expected = relative.mean(axis=0)
        good = expected <= expected.min() + objective.tolerance
    good &= draws.may_be_chosen
    good[chosen] = True
    return tuple(sorted({draws.candidates[i].global_batch_size for i in np.flatnonzero(good)}))


def binding_constraint(
    draws: CostDraws,
    chosen: int,
    *,
    step_time: StepTimeCurve,
    memory: MemoryCurve | None,
    workload: WorkloadSummary,
    objective: Objective,
    constraints: Constraints,
) -> Binding:
    """What keeps the choice from being another size.

    The loader, when the step waits for it; the smallest size that was timed; what ends the candidates, when the choice is the last of
    them or a single micro-batch of twice the size would be faster by the fitted law; else it is the optimum.
    """
    candidate = draws.candidates[chosen]
    waits = float(np.median(draws.step_time_s()[:, chosen])) > 1.02 * float(np.median(draws.compute_time_s[:, chosen]))
    if waits and objective.goal is not Goal.SAMPLES:
        return Binding.LOADER
    last = chosen == len(draws.candidates) - 1
    if chosen == 0 and not last:
        return Binding.SMALLEST
    if objective.goal in (Goal.SAMPLES, Goal.ACCURACY):
        return Binding.SMALLEST if chosen == 0 else Binding.OPTIMUM
    cap = constraints.max_global_batch_size
    if last and cap is not None and 2 * candidate.global_batch_size > min(cap, workload.train_size):
        return Binding.MAX_BATCH if cap <= workload.train_size else Binding.DATASET
    if candidate.accumulation_steps > 1:
        return Binding.DATASET if last else Binding.OPTIMUM
    at_edge = candidate.micro_batch_size == max(point.micro_batch_size for point in step_time.points)
    if last or (at_edge and _twice_is_faster(draws, chosen)):
        return _edge(candidate.micro_batch_size, memory, workload)
    return Binding.OPTIMUM


def _unfriendliness(size: int) -> int:
    if size & (size - 1) == 0:
        return 0
    return 1 if size % _FRIENDLY_MULTIPLE == 0 else 2


def _twice_is_faster(draws: CostDraws, chosen: int) -> bool:
    """Whether a single micro-batch of twice the size would shorten T by more than a tie, by the fitted law."""
    if draws.law is None:
        return False
    size = draws.candidates[chosen].global_batch_size
    micro = draws.candidates[chosen].micro_batch_size
    now_s, twice_s = draws.law.step_time_s(np.array([micro, 2.0 * micro]))
    steps: FloatArray = draws.steps(np.array([size, 2.0 * size]))
    return float((steps[:, 1] * twice_s / (steps[:, 0] * now_s)).mean()) < 1 - TIE


def _edge(micro_batch_size: int, memory: MemoryCurve | None, workload: WorkloadSummary) -> Binding:
    """What stopped the largest timed size from being larger."""
    if memory is None or memory.ceiling is None:
        return Binding.DATASET if 2 * micro_batch_size > workload.train_size else Binding.BUDGET
    if micro_batch_size < memory.ceiling or memory.stopped_by == "budget":
        return Binding.BUDGET
    if memory.ceiling_is_limit:
        return Binding.MEMORY
    return Binding.DATASET if memory.largest_allowed_source == "dataset" else Binding.MAX_BATCH


def relative_time(draws: CostDraws, global_batch_size: int, chosen: int) -> FloatArray:
    """Draws of the time to target at a size over that of the choice; exact where the size is a candidate."""
    time = draws.time()
    column = next((i for i, c in enumerate(draws.candidates) if c.global_batch_size == global_batch_size), None)
    other = time[:, column] if column is not None else time_at(draws, global_batch_size)
    return np.asarray(other / time[:, chosen])
