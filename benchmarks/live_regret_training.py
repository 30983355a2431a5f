"""One training to a target: the optimizer step that `find` times, evaluated often, the crossing interpolated."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from live_regret_truth import Ending
from rightbatch.engine.meters import meters_for
from rightbatch.engine.rig import Rig, resolve_device
from rightbatch.engine.step import Trainee, train_step
from rightbatch.workload.ingredients import Batch, Workload, map_tensors, tensors_of

PROTOCOL = 1
"""Raised when a change here alters what a training or its end is: cached trainings of another protocol are not used."""
FIRST_EVALUATION = 0.1
"""Epochs before the first evaluation."""
COARSE_RATIO, FINE_RATIO = 1.2, 1.05
"""Samples seen at one evaluation over those at the one before: far from the target, and near it."""
NEAR = 0.15
"""Near: the metric is within this fraction of the target."""
SMOOTHED = 5
"""The mean of so many evaluations in a row has to reach the target."""
_EVALUATION_BATCH = 512
_DIVERGED_LOSS = 1e4
_MOST_HELD_BYTES = 2**31
_COMPARED_SAMPLES = 8


class Crossing:
    """Where a smoothed metric first reaches its target: between two evaluations, linear in the logarithm of the samples."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._values: list[float] = []
        self._before: tuple[float, float] | None = None

    def add(self, samples: int, value: float) -> float | None:
        """Take one evaluation; return the samples at the crossing once it has happened."""
        self._values.append(value)
        if len(self._values) < SMOOTHED:
            return None
        smooth = sum(self._values[-SMOOTHED:]) / SMOOTHED
        before, self._before = self._before, (math.log(samples), smooth)
        if smooth < self._target:
            return None
        if before is None:
            return float(samples)
        share = (self._target - before[1]) / (smooth - before[1])
        return math.exp(before[0] + share * (math.log(samples) - before[0]))


class Trainer:
    """Trains one workload at any size and rate.

    Args:
        workload: With ``valid`` and ``metric``, and batches ``(input, ..., target)``.
        target: What the metric has to reach.
        device: Where.
    """

    def __init__(self, workload: Workload, target: float, device: str = "cpu") -> None:
        self._workload, self._target, self._device = workload, target, resolve_device(device)
        rig = self.rig()
        self._held = _held(rig)
        trainee = rig.new_trainee()
        self.base_lr = float(trainee.optimizer.param_groups[0]["lr"])
        self._valid = _validation_batches(rig)

    def rig(self, seed: int = 0) -> Rig:
        """Return the workload on its device, to measure with."""
        return Rig(workload=self._workload, device=self._device, meters=meters_for(self._device), seed=seed)

    def __call__(self, size: int, lr: float, seed: int, most_samples: float) -> Ending:
        """Train a fresh model until the target, divergence, or more samples than that; the seed sets weights and order."""
        crossing = Crossing(self._target)
        seen, due = 0, FIRST_EVALUATION * len(self._workload.train)
        for trainee, seen, loss in self.steps(size, lr, seed):
            if seen >= due or seen >= most_samples:
                if not float(loss) < _DIVERGED_LOSS:
                    return Ending(samples_to_target=None, samples_seen=seen, diverged=True)
                value = self.metric(trainee)
                reached = crossing.add(seen, value)
                due = seen * (FINE_RATIO if value >= self._target - NEAR * abs(self._target) else COARSE_RATIO)
                if reached is not None or seen >= most_samples:
                    return Ending(samples_to_target=reached, samples_seen=seen)
        raise AssertionError("steps never end")

    def steps(self, size: int, lr: float, seed: int) -> Iterator[tuple[Trainee, int, torch.Tensor]]:
        """Yield the model, the samples seen and the loss after every step, without end; epochs follow each other without a gap."""
        rig = self.rig(seed)
        trainee = rig.new_trainee()
        for group in trainee.optimizer.param_groups:
            group["lr"] *= lr / self.base_lr
        seen = 0
        for indices in _batches(rig.train_size, size, seed):
            seen += size
            yield trainee, seen, train_step(trainee, [self.batch(rig, indices)]).mean_loss

    def batch(self, rig: Rig, indices: np.ndarray) -> Batch:
        """Return these samples as one batch on the device."""
        if self._held is None:
            return rig.real_batch(indices.tolist())
        rows = torch.from_numpy(indices).to(self._device)
        return map_tensors(lambda tensor: tensor[rows], self._held)

    def metric(self, trainee: Trainee) -> float:
        """The metric over the validation set, in evaluation mode; the model goes back to training mode."""
        assert self._workload.metric is not None, "checked by _validation_batches"  # noqa: S101
        trainee.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for *inputs, target in self._valid:
                total += self._workload.metric(trainee.model(*inputs), target) * len(target)
                count += len(target)
        trainee.model.train()
        return total / count


def _batches(train_size: int, size: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(train_size)
    while True:
        while len(order) < size:
            order = np.concatenate([order, generator.permutation(train_size)])
        yield order[:size]
        order = order[size:]


def _held(rig: Rig) -> Batch | None:
    """The whole training set as one batch on the device; none when it is large, or differs from reading to reading."""
    few = range(min(_COMPARED_SAMPLES, rig.train_size))
    first, second = tensors_of(rig.real_batch(few)), tensors_of(rig.real_batch(few))
    sample_bytes = sum(tensor.nbytes for tensor in first) / len(few)
    if sample_bytes * rig.train_size > _MOST_HELD_BYTES or not all(map(torch.equal, first, second)):
        return None
    return rig.real_batch(range(rig.train_size))


def _validation_batches(rig: Rig) -> list[Batch]:
    workload = rig.workload
    if workload.valid is None or workload.metric is None or workload.loss is None:
        raise SystemExit(f"a workload needs loss=, valid= and metric= to be trained to a target; {workload.name} lacks one of them.")
    starts = range(0, len(workload.valid), _EVALUATION_BATCH)
    parts = [range(start, min(start + _EVALUATION_BATCH, len(workload.valid))) for start in starts]
    return [rig.place(rig.collate([workload.valid[index] for index in part])) for part in parts]
