"""Which learning rate trains: a sweep of growing rates, then short runs at a few fixed ones from one checkpoint."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rightbatch.engine.losses import loss_sum
from rightbatch.engine.rig import Rig, seed_everything
from rightbatch.engine.step import Trainee, train_step
from rightbatch.records.lr_range_measurements import LrRangeMeasurements, LrRangePoint, LrRangeRound

_LOWEST_LR, _HIGHEST_LR = 1e-6, 1e2
_LOWEST_SHARE = 1e-3
"""The sweep starts at this share of the optimizer's own rate, if that is lower."""
_MOST_STEPS_A_DECADE, _FEWEST_STEPS_A_DECADE = 8, 3
_SWEEP_SHARE = 0.25
"""Of the budget; a sweep with the fewest steps a decade may take twice that, and is cut there."""
_SMOOTHING = 0.7
_FIRST_BATCHES = 8
"""Batches whose losses at the first weights say how much losses differ before anything is trained."""
_DIVERGED_SDS = 6.0
_FEWEST_STEPS, _MOST_STEPS = 16, 300
"""Steps of one run."""
_EXPECTED_RUNS = 8
"""Runs of a round: five rates, a few neighbours, and the look at the checkpoint itself."""
_MOST_ROUNDS = 3
_MOST_EPOCHS = 2
"""A run goes over the data no more often, because it would memorise a small dataset."""
_TAIL = 3
"""The last third of a run is what counts."""


def measure(
    rig: Rig,
    *,
    batch_size: int,
    first_rates: Callable[[Sequence[LrRangePoint]], Sequence[float]],
    next_rate: Callable[[LrRangeRound], float | None],
    contenders: Callable[[LrRangeRound], Sequence[float]],
    budget_s: float,
) -> LrRangeMeasurements:
    """Sweep from fresh weights to divergence, train a little at a low rate, then compare fixed rates from there in rounds.

    All runs of a round take equal samples in the same order, with the same random numbers. While the budget lasts, the contenders are
    compared again over another order, in three rounds at most.

    Args:
        rig: The workload on its device.
        batch_size: Samples of a step.
        first_rates: Chooses the fixed rates from the sweep; the first is the likeliest.
        next_rate: Chooses a further rate from the first round; none ends it.
        contenders: Chooses from the first round the rates of a further one.
        budget_s: Seconds for everything.
    """
    trial = _Trial(rig, batch_size, budget_s)
    sweep = trial.sweep()
    rates = first_rates(sweep)
    rounds: tuple[LrRangeRound, ...] = ()
    pilot_samples = 0
    stopped_by: Literal["decided", "budget", "failure"] = "decided" if trial.is_finite else "failure"
    if rates:
        stopped_by = "budget"
        if trial.choose_steps():
            pilot_samples = trial.pilot(min(rates))
            first, is_decided = _first_round(trial, rates, next_rate)
            rounds = (first, *_further_rounds(trial, contenders(first)))
            stopped_by = "decided" if is_decided else "budget"
    return LrRangeMeasurements(
        batch_size=batch_size,
        optimizer=type(trial.trainee.optimizer).__name__,
        pilot_samples=pilot_samples,
        sweep=sweep,
        rounds=rounds,
        stopped_by=stopped_by,
        remark="" if trial.is_finite else "The loss of the first batches was NaN or infinite.",
    )


def _first_round(trial: "_Trial", rates: Sequence[float], next_rate: Callable[[LrRangeRound], float | None]) -> tuple[LrRangeRound, bool]:
    """Run the rates and the neighbours that are asked for; also return whether the time sufficed for all."""
    first, is_whole = _round(trial, 0, rates)
    while is_whole and (lr := next_rate(first)) is not None:
        is_whole = trial.has_time_for(1)
        if is_whole:
            first = first.model_copy(update={"runs": (*first.runs, trial.run(lr, 0))})
    return first, is_whole


def _further_rounds(trial: "_Trial", rates: Sequence[float]) -> Iterator[LrRangeRound]:
    """Run the rates over other orders of the data, as long as there is time for a whole round."""
    for order in range(1, _MOST_ROUNDS if rates else 1):
        if not trial.has_time_for(1 + len(rates)):
            return
        further, is_whole = _round(trial, order, rates)
        if not is_whole:
            return
        yield further


def _round(trial: "_Trial", order: int, rates: Sequence[float]) -> tuple[LrRangeRound, bool]:
    """Run every rate once over one order of the data; also return whether there was time for all."""
    still = trial.still_losses(order)
    runs: list[LrRangePoint] = []
    for lr in rates:
        if not trial.has_time_for(1):
            break
        runs.append(trial.run(lr, order))
    return LrRangeRound(still_losses=still, runs=tuple(runs)), len(runs) == len(rates)


class _Trial:
    """One model that is trained from the same checkpoint again and again.

    Args:
        rig: The workload on its device.
        batch_size: Samples of a step.
        budget_s: Seconds for everything, from now on.
    """

    def __init__(self, rig: Rig, batch_size: int, budget_s: float) -> None:
        self._rig = rig
        self._clock = rig.meters.clock
        self._batch_size = batch_size
        self._budget_s = budget_s
        self._end_s = self._clock.now_s() + budget_s
        self.trainee = rig.new_trainee()
        self._own_rates = [float(group["lr"]) for group in self.trainee.optimizer.param_groups]
        self._start = _Checkpoint.of(self.trainee)
        self._steps = 0
        self._step_s = 0.0
        first = self._losses_at_start(self._batches(_FIRST_BATCHES, order=-1))
        self.is_finite = bool(np.isfinite(first).all())
        self._first_loss, self._spread = float(np.mean(first)), float(np.std(first))
        self._lowest = self._first_loss

    def sweep(self) -> tuple[LrRangePoint, ...]:
        """Multiply the rate at every step until the loss diverges, the rates end, or twice the sweep's share of the budget is used."""
        if not self.is_finite:
            return ()
        lowest = min(_LOWEST_LR, _LOWEST_SHARE * (self._own_rates[0] or math.inf))
        decades = math.log10(_HIGHEST_LR / lowest)
        affordable = int(_SWEEP_SHARE * self._budget_s / (self._time_a_step(lowest) * decades))
        steps_a_decade = max(_FEWEST_STEPS_A_DECADE, min(_MOST_STEPS_A_DECADE, affordable))
        stop_s = self._end_s - (1 - 2 * _SWEEP_SHARE) * self._budget_s
        points: list[LrRangePoint] = []
        smoothed = self._first_loss
        for step, indices in enumerate(self._batches(math.ceil(decades * steps_a_decade) + 1, order=-1)):
            lr = lowest * 10 ** (step / steps_a_decade)
            self._rig.say(f"learning rate sweep: {lr:.2g}")
            loss = self._step(lr, indices)
            smoothed = _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss
            diverged = self._has_diverged(smoothed)
            points.append(self._point(lr, smoothed, step + 1, diverged=diverged))
            if diverged or self._clock.now_s() > stop_s:
                break
        self._start.restore(self.trainee)
        return tuple(points)

    def choose_steps(self) -> bool:
        """Divide the time that is left among the runs of two rounds, or one; return whether there is enough for that."""
        left = (self._end_s - self._clock.now_s()) / self._step_s
        if left < _EXPECTED_RUNS * _FEWEST_STEPS:
            return False
        most = max(_FEWEST_STEPS, min(_MOST_STEPS, _MOST_EPOCHS * self._rig.train_size // self._batch_size))
        self._steps = max(_FEWEST_STEPS, min(most, int(left / (2 * _EXPECTED_RUNS))))
        return True

    def has_time_for(self, runs: int) -> bool:
        """Return whether so many runs will end within the budget."""
        return self._clock.now_s() + runs * self._steps * self._step_s <= self._end_s

    def pilot(self, lr: float) -> int:
        """Train for a quarter of a run at a rate and start from there from now on, unless that diverges; return the samples."""
        steps = self._steps // 4
        losses = [self._step(lr, indices) for indices in self._batches(steps, order=-2)]
        if not np.isfinite(losses).all() or self._has_diverged(losses[-1]):
            self._start.restore(self.trainee)
            return 0
        self._start = _Checkpoint.of(self.trainee)
        return steps * self._batch_size

    def run(self, lr: float, order: int) -> LrRangePoint:
        """Train from the checkpoint at one rate over one order of the data."""
        self._rig.say(f"learning rate {lr:.2g}, over {self._steps} steps")
        self._start.restore(self.trainee)
        seed_everything(self._rig.seed + 1 + order)
        losses: list[float] = []
        smoothed = self._first_loss
        start_s = self._clock.now_s()
        for indices in self._batches(self._steps, order=order):
            losses.append(self._step(lr, indices))
            smoothed = _SMOOTHING * smoothed + (1 - _SMOOTHING) * losses[-1]
            if self._has_diverged(smoothed):
                return self._point(lr, smoothed, len(losses), diverged=True)
        self._step_s = max((self._clock.now_s() - start_s) / self._steps, 1e-9)
        tail = tuple(losses[-self._tail :])
        return self._point(lr, float(np.mean(tail)), self._steps, diverged=False, tail_losses=tail)

    def still_losses(self, order: int) -> tuple[float, ...]:
        """Return the losses at the checkpoint of the batches that end a run over one order of the data."""
        return tuple(self._losses_at_start(self._batches(self._steps, order=order)[-self._tail :]))

    @property
    def _tail(self) -> int:
        return max(_FIRST_BATCHES, self._steps // _TAIL)

    def _losses_at_start(self, batches: NDArray[np.int64]) -> list[float]:
        self._start.restore(self.trainee)
        losses = []
        with torch.no_grad():
            for indices in batches:
                total, count = loss_sum(self.trainee.objective, self.trainee.model, self._rig.real_batch(indices.tolist()))
                losses.append(float(total / count))
        self._start.restore(self.trainee)
        return losses

    def _time_a_step(self, lr: float) -> float:
        """Warm up, and measure a step at a rate that changes next to nothing."""
        warm_up, *rest = self._batches(3, order=-1)
        self._step(lr, warm_up)
        start_s = self._clock.now_s()
        for indices in rest:
            self._step(lr, indices)
        self._step_s = max((self._clock.now_s() - start_s) / len(rest), 1e-9)
        self._start.restore(self.trainee)
        return self._step_s

    def _step(self, lr: float, indices: NDArray[np.int64]) -> float:
        """Take one step; parameter groups keep the ratios of their rates."""
        own = self._own_rates[0]
        for group, rate in zip(self.trainee.optimizer.param_groups, self._own_rates, strict=True):
            group["lr"] = lr * (rate / own if own else 1.0)
        return float(train_step(self.trainee, [self._rig.real_batch(indices.tolist())]).mean_loss)

    def _has_diverged(self, smoothed: float) -> bool:
        """Whether a smoothed loss is not finite, or as far above the first as the lowest was below it, and beyond the noise."""
        if not math.isfinite(smoothed):
            return True
        self._lowest = min(self._lowest, smoothed)
        return smoothed > self._first_loss + max(_DIVERGED_SDS * self._spread, self._first_loss - self._lowest)

    def _batches(self, steps: int, *, order: int) -> NDArray[np.int64]:
        """Indices of samples, shape (steps, batch): shuffled epochs, the same for the same order."""
        rng = np.random.default_rng((self._rig.seed, order + 2))
        size = self._rig.train_size
        epochs = [rng.permutation(size) for _ in range(math.ceil(steps * self._batch_size / size))]
        return np.concatenate(epochs)[: steps * self._batch_size].reshape(steps, self._batch_size)

    def _point(self, lr: float, loss: float, steps: int, *, diverged: bool, tail_losses: tuple[float, ...] = ()) -> LrRangePoint:
        return LrRangePoint(
            lr=lr,
            smoothed_loss=loss if math.isfinite(loss) else None,
            samples=steps * self._batch_size,
            diverged=diverged,
            tail_losses=tail_losses,
        )


@dataclass(frozen=True)
class _Checkpoint:
    """Everything about a trainee that training changes."""

    states: tuple[Any, ...]

    @classmethod
    def of(cls, trainee: Trainee) -> "_Checkpoint":
        """Copy the state of the model, the optimizer, the scaler and the average of the weights."""
        return cls(tuple(copy.deepcopy(part.state_dict()) for part in _stateful(trainee)))

    def restore(self, trainee: Trainee) -> None:
        """Put the state back."""
        for part, state in zip(_stateful(trainee), self.states, strict=True):
            part.load_state_dict(copy.deepcopy(state))


def _stateful(trainee: Trainee) -> list[Any]:
    parts = (trainee.model, trainee.optimizer, trainee.scaler, trainee.average)
    return [part for part in parts if part is not None]
