"""How noisy gradients are: norms of micro-batch gradients at frozen parameters, at initialisation and along a short pilot run."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from rightbatch.engine.gradients import GradientBlocks, block_limit, flat_gradient
from rightbatch.engine.learning_rate import set_lr
from rightbatch.engine.rig import Rig, shuffled_epochs
from rightbatch.engine.step import Trainee, backward_mean, clear_gradients, train_step
from rightbatch.records.gradient_norms import GradientNorms
from rightbatch.records.measurements import GradientNoiseMeasurements, NoiseProblem

_BLOCK_BUDGET_BYTES = 2**30
_FIRST_TEST = 16
"""Micro-batches before the first test whether a snapshot is precise enough; every doubling is tested after that."""
_FEWEST_MICRO_BATCHES = 8
"""Micro-batches that a snapshot takes even when the budget is over: fewer give no interval worth the name."""
_PILOT_SNAPSHOTS = 3
_SMALLEST_GHOST = 2
"""Batch normalisation over one sample is none."""
_PILOT_EPOCHS = 4
"""A pilot goes no further than so many epochs: past them a small dataset is memorised, and its noise is not a run's any more."""


def measure(
    rig: Rig,
    *,
    micro_batch_size: int,
    pilot_batch_size: int,
    batch_norm: bool,
    is_decided: Callable[[GradientNorms], bool],
    budget_s: float,
    pilot_lr: float | None = None,
) -> GradientNoiseMeasurements:
    """Measure the noise at initialisation, then three times along a pilot run of four epochs at most, spaced by factors of three.

    A third of the budget pays for the pilot. Where normalisation couples samples, the last parameters are measured once more with
    micro-batches of half the size.

    The pilot trains a copy with the workload's own optimizer, or with the rig's stand-in.

    Args:
        rig: The workload on its device.
        micro_batch_size: Samples of one micro-batch of a snapshot.
        pilot_batch_size: Samples of one step of the pilot.
        batch_norm: Whether normalisation couples the samples of a micro-batch.
        is_decided: Says whether a snapshot is precise enough.
        budget_s: Seconds for everything.
        pilot_lr: Rate of the pilot; none takes the optimizer's own.
    """
    trainee = rig.new_trainee()
    set_lr(trainee.optimizer, pilot_lr)
    clock = rig.meters.clock
    milestones = tuple(math.ceil(_PILOT_EPOCHS * rig.train_size / 3**power) for power in reversed(range(_PILOT_SNAPSHOTS)))
    start_s = clock.now_s()
    takes_half_size = batch_norm and micro_batch_size >= 2 * _SMALLEST_GHOST
    snapshot_s = budget_s * 2 / 3 / (1 + _PILOT_SNAPSHOTS + takes_half_size)
    pilot_s = budget_s / 3 / _PILOT_SNAPSHOTS
    snapshots: list[GradientNorms] = []
    samples_seen = 0
    order = shuffled_epochs(rig.train_size, rig.seed + 1)
    problem: NoiseProblem | None = None
    lr = float(trainee.optimizer.param_groups[0]["lr"])
    for index in range(1 + _PILOT_SNAPSHOTS):
        if index:
            samples_seen = _pilot(rig, trainee, order, pilot_batch_size, (samples_seen, milestones[index - 1]), pilot_s)
        norms, problem = snapshot(rig, trainee, micro_batch_size, samples_seen, is_decided, snapshot_s)
        if norms is not None:
            snapshots.append(norms)
        if problem is not None or clock.now_s() - start_s > budget_s:
            break
    half_size = None
    if takes_half_size and problem is None and clock.now_s() - start_s <= budget_s:
        half_size, _ = snapshot(rig, trainee, micro_batch_size // 2, samples_seen, is_decided, snapshot_s)
    return GradientNoiseMeasurements(
        snapshots=tuple(snapshots),
        pilot_batch_size=pilot_batch_size,
        pilot_lr=lr,
        pilot_samples=samples_seen,
        batch_norm=batch_norm,
        half_size=half_size,
        problem=problem,
        remark=_REMARKS[problem] if problem is not None else "",
    )


_REMARKS = {
    NoiseProblem.NON_FINITE_LOSS: "The loss or its gradient was NaN or infinite.",
    NoiseProblem.ZERO_GRADIENT: "Every gradient was zero.",
    NoiseProblem.DATASET_TOO_SMALL: "The dataset holds too few samples to compare micro-batches.",
    NoiseProblem.OUT_OF_MEMORY: "Memory ran out.",
}


def _pilot(rig: Rig, trainee: Trainee, order: Iterator[int], batch_size: int, samples: tuple[int, int], budget_s: float) -> int:
    """Train from the first number of samples to the second, or until the budget ends; return the samples seen."""
    clock = rig.meters.clock
    end_s = clock.now_s() + budget_s
    seen, goal = samples
    while seen == samples[0] or (seen < goal and clock.now_s() < end_s):
        rig.say(f"pilot run: {seen} samples")
        train_step(trainee, [rig.real_batch([next(order) for _ in range(batch_size)])])
        seen += batch_size
    return seen


def snapshot(
    rig: Rig,
    trainee: Trainee,
    micro_batch_size: int,
    samples_seen: int,
    is_decided: Callable[[GradientNorms], bool],
    budget_s: float,
) -> tuple[GradientNorms | None, NoiseProblem | None]:
    """Measure the noise at frozen parameters: add micro-batches until decided, which every doubling tests, or out of budget or data.

    Samples are drawn without replacement, as in an epoch; its last, smaller micro-batch is left out.

    Args:
        rig: The workload on its device.
        trainee: The model; its gradients are cleared.
        micro_batch_size: Samples of one micro-batch.
        samples_seen: Samples that it was trained on.
        is_decided: Says whether it is precise enough.
        budget_s: Seconds; eight micro-batches are taken in any case.

    Returns:
        The sums, or why there are none.
    """
    available = rig.train_size // micro_batch_size
    if available < 2:
        return None, NoiseProblem.DATASET_TOO_SMALL
    clock = rig.meters.clock
    end_s = clock.now_s() + budget_s
    order = np.random.default_rng(rig.seed + samples_seen).permutation(rig.train_size)
    tally = _Tally(trainee, micro_batch_size, samples_seen, rig.train_size)
    test_at = _FIRST_TEST
    for index in range(available):
        rig.say(f"gradient noise after {samples_seen} samples: {index} micro-batches")
        if not tally.add(rig.real_batch(order[index * micro_batch_size : (index + 1) * micro_batch_size].tolist())):
            return None, NoiseProblem.NON_FINITE_LOSS
        if tally.count >= _FEWEST_MICRO_BATCHES and clock.now_s() > end_s:
            break
        if tally.count >= test_at:
            test_at = 2 * tally.count
            if is_decided(tally.norms()):
                break
    if tally.count < 2:
        return None, NoiseProblem.NON_FINITE_LOSS if tally.skipped else NoiseProblem.DATASET_TOO_SMALL
    norms = tally.norms()
    return (None, NoiseProblem.ZERO_GRADIENT) if sum(norms.block_sq_norm_sums) == 0 else (norms, None)


class _Tally:
    """Gradients of micro-batches at frozen parameters, summed up."""

    def __init__(self, trainee: Trainee, micro_batch_size: int, samples_seen: int, train_size: int) -> None:
        parameter_bytes = sum(parameter.nbytes for parameter in trainee.parameters)
        most_blocks = block_limit(parameter_bytes, _BLOCK_BUDGET_BYTES)
        keep_on = None if parameter_bytes * most_blocks < _BLOCK_BUDGET_BYTES // 4 else torch.device("cpu")
        self._trainee = trainee
        self._blocks = GradientBlocks(most_blocks, keep_on)
        self._micro_batch_size = micro_batch_size
        self._samples_seen = samples_seen
        self._train_size = train_size
        self._loss_total = 0.0
        self._skipped = 0

    @property
    def count(self) -> int:
        """Micro-batches added."""
        return self._blocks.micro_batch_count

    @property
    def skipped(self) -> int:
        """Micro-batches left out because their gradient was not finite."""
        return self._skipped

    def add(self, batch: object) -> bool:
        """Add one micro-batch; return whether the loss was finite and gradients are not all infinite."""
        loss, gradient = _mean_gradient(self._trainee, batch)
        if not np.isfinite(loss):
            return False
        if self._blocks.add(gradient):
            self._loss_total += loss
        else:
            self._skipped += 1
        return self.count > 0 or self._skipped <= _FEWEST_MICRO_BATCHES

    def norms(self) -> GradientNorms:
        """Return the sums so far."""
        return GradientNorms(
            samples_seen=self._samples_seen,
            micro_batch_size=self._micro_batch_size,
            dataset_size=self._train_size,
            block_counts=self._blocks.counts(),
            block_sq_norm_sums=self._blocks.sq_norm_sums(),
            block_gram=self._blocks.gram(),
            mean_loss=self._loss_total / self.count,
            skipped_micro_batches=self._skipped,
        )


def _mean_gradient(trainee: Trainee, batch: object) -> tuple[float, torch.Tensor]:
    """Return the mean loss of one micro-batch and its gradient, the scaler's scale divided out.

    Under ``fp16`` an infinite gradient halves the scale, as it would in training.
    """
    clear_gradients(trainee)
    result = backward_mean(trainee, [batch])
    gradient = flat_gradient(trainee.parameters)
    if trainee.scaler is not None:
        scale = trainee.scaler.get_scale()
        gradient /= scale
        if not bool(torch.isfinite(gradient).all()):
            trainee.scaler.update(scale / 2)
    clear_gradients(trainee)
    return float(result.mean_loss), gradient
