"""How noisy gradients are: norms of micro-batch gradients at frozen parameters, at initialisation and along a short pilot run."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from rightbatch.engine.gradients import GradientBlocks, block_limit, flat_gradient
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import Trainee, backward_mean, train_step
from rightbatch.records.measurements import GradientNoiseMeasurements, GradientNorms, NoiseProblem

_BLOCK_BUDGET_BYTES = 2**30
_FEWEST_MICRO_BATCHES = 16
_PILOT_SNAPSHOTS = 3


def measure(
    rig: Rig,
    *,
    micro_batch_size: int,
    pilot_batch_size: int,
    batch_norm: bool,
    is_decided: Callable[[GradientNorms], bool],
    budget_s: float,
) -> GradientNoiseMeasurements:
    """Measure the noise at initialisation, then three times along a pilot run that a third of the budget pays for.

    The pilot trains a copy with the workload's own optimizer. Without one it is left out: the noise scale depends on the rate, and a rate
    of ours would measure another run than the user's.

    Args:
        rig: The workload on its device.
        micro_batch_size: Samples of one micro-batch of a snapshot.
        pilot_batch_size: Samples of one step of the pilot.
        batch_norm: Kept beside the norms.
        is_decided: Says whether a snapshot is precise enough.
        budget_s: Seconds for everything.
    """
    trainee = rig.new_trainee()
    clock = rig.meters.clock
    has_pilot = rig.workload.optimizer is not None
    start_s = clock.now_s()
    snapshot_s = budget_s * (2 / 3 / (1 + _PILOT_SNAPSHOTS) if has_pilot else 1)
    pilot_s = budget_s / 3 / _PILOT_SNAPSHOTS
    snapshots: list[GradientNorms] = []
    samples_seen = 0
    order = _epochs(rig.train_size, rig.seed + 1)
    problem: NoiseProblem | None = None
    lr = float(trainee.optimizer.param_groups[0]["lr"]) if has_pilot else None
    for index in range(1 + _PILOT_SNAPSHOTS if has_pilot else 1):
        if index:
            samples_seen += _pilot(rig, trainee, order, pilot_batch_size, samples_seen, pilot_s)
        norms, problem = _snapshot(rig, trainee, micro_batch_size, samples_seen, is_decided, snapshot_s)
        if norms is not None:
            snapshots.append(norms)
        if problem is not None or clock.now_s() - start_s > budget_s:
            break
    return GradientNoiseMeasurements(
        snapshots=tuple(snapshots),
        pilot_batch_size=pilot_batch_size,
        pilot_lr=lr,
        pilot_samples=samples_seen,
        batch_norm=batch_norm,
        problem=problem,
        remark=_REMARKS[problem] if problem is not None else "",
    )


_REMARKS = {
    NoiseProblem.NON_FINITE_LOSS: "The loss was NaN or infinite.",
    NoiseProblem.ZERO_GRADIENT: "Every gradient was zero.",
    NoiseProblem.DATASET_TOO_SMALL: "The dataset holds too few samples to compare micro-batches.",
    NoiseProblem.OUT_OF_BUDGET: "The budget ended before enough micro-batches had run.",
    NoiseProblem.OUT_OF_MEMORY: "Memory ran out.",
}


def _pilot(rig: Rig, trainee: Trainee, order: Iterator[int], batch_size: int, samples_before: int, budget_s: float) -> int:
    """Train for a while; return the samples used."""
    clock = rig.meters.clock
    end_s = clock.now_s() + budget_s
    samples = 0
    while samples == 0 or clock.now_s() < end_s:
        rig.say(f"pilot run: {samples_before + samples} samples")
        batch = rig.real_batch([next(order) for _ in range(batch_size)])
        train_step(trainee, [batch])
        samples += batch_size
    return samples


def _epochs(size: int, seed: int) -> Iterator[int]:
    """Yield shuffled indices, epoch after epoch."""
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(size).tolist()


def _snapshot(
    rig: Rig,
    trainee: Trainee,
    micro_batch_size: int,
    samples_seen: int,
    is_decided: Callable[[GradientNorms], bool],
    budget_s: float,
) -> tuple[GradientNorms | None, NoiseProblem | None]:
    """Add micro-batches at frozen parameters, testing at every doubling, until decided or out of budget or data.

    Samples are drawn without replacement, as in an epoch.
    """
    clock = rig.meters.clock
    parameters = trainee.parameters
    parameter_bytes = sum(parameter.nbytes for parameter in parameters)
    most_blocks = block_limit(parameter_bytes, _BLOCK_BUDGET_BYTES)
    keep_on = None if parameter_bytes * most_blocks < _BLOCK_BUDGET_BYTES // 4 else torch.device("cpu")
    blocks = GradientBlocks(most_blocks, keep_on)
    order = np.random.default_rng(rig.seed + samples_seen).permutation(rig.train_size)
    available = rig.train_size // micro_batch_size
    if available < 2:
        return None, NoiseProblem.DATASET_TOO_SMALL
    end_s = clock.now_s() + budget_s
    losses, skipped, test_at = 0.0, 0, _FEWEST_MICRO_BATCHES

    def norms() -> GradientNorms:
        return GradientNorms(
            samples_seen=samples_seen,
            micro_batch_size=micro_batch_size,
            dataset_size=rig.train_size,
            block_counts=blocks.counts(),
            block_sq_norm_sums=blocks.sq_norm_sums(),
            block_gram=blocks.gram(),
            mean_loss=losses / blocks.micro_batch_count,
            skipped_micro_batches=skipped,
        )

    for index in range(available):
        rig.say(f"gradient noise after {samples_seen} samples: {index} micro-batches of {micro_batch_size}")
        batch = rig.real_batch(order[index * micro_batch_size : (index + 1) * micro_batch_size].tolist())
        loss, gradient = _mean_gradient(trainee, batch)
        if not np.isfinite(loss):
            return None, NoiseProblem.NON_FINITE_LOSS
        if blocks.add(gradient):
            losses += loss
        else:
            skipped += 1
        if skipped > _FEWEST_MICRO_BATCHES and not blocks.micro_batch_count:
            return None, NoiseProblem.NON_FINITE_LOSS
        count = blocks.micro_batch_count
        if count >= test_at:
            test_at = 2 * count
            if is_decided(norms()):
                break
        if count >= _FEWEST_MICRO_BATCHES and clock.now_s() > end_s:
            break
    if blocks.micro_batch_count < 2:
        return None, NoiseProblem.DATASET_TOO_SMALL
    found = norms()
    return (None, NoiseProblem.ZERO_GRADIENT) if sum(found.block_sq_norm_sums) == 0 else (found, None)


def _mean_gradient(trainee: Trainee, batch: object) -> tuple[float, torch.Tensor]:
    """Return the mean loss of one micro-batch and its gradient, the scaler's scale divided out."""
    trainee.optimizer.zero_grad(set_to_none=True)
    result = backward_mean(trainee, [batch])
    gradient = flat_gradient(trainee.parameters)
    if trainee.scaler is not None:
        gradient /= trainee.scaler.get_scale()
    trainee.optimizer.zero_grad(set_to_none=True)
    return float(result.mean_loss), gradient
