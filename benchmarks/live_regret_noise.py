"""The noise scale along whole runs to the target, beside what the critical batch size of a sweep says."""

from collections.abc import Sequence
from statistics import geometric_mean

import numpy as np

from live_regret_training import Trainer
from rightbatch.engine.gradients import GradientBlocks, flat_gradient
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import Trainee, backward_mean, clear_gradients
from rightbatch.fits.noise_scale import fit_noise_scale, is_decided
from rightbatch.records.estimates import NoiseScale
from rightbatch.records.gradient_norms import GradientNorms
from rightbatch.records.measurements import GradientNoiseMeasurements

SHARES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Of the run's samples, where the noise is measured."""
PILOT_SHARES = (0.05, 0.1, 0.25)
"""Of the run, as if a pilot had ended there."""
PRECISION = 1.3
"""Factor within which the interval of a snapshot has to lie, unless the data end before."""
MICRO_BATCH = 16
SEEDS = 3
"""Runs: the noise scale at one moment of one run scatters by a factor of three."""
_FIRST_TEST = 32


def along_a_run(trainer: Trainer, size: int, lr: float, samples: float, *, batch_norm: bool, seed: int) -> GradientNoiseMeasurements:
    """Train for so many samples, and measure the noise at given shares of them.

    Args:
        trainer: Trains.
        size: Batch size of the run.
        lr: Its rate.
        samples: Its length.
        batch_norm: Whether samples are coupled.
        seed: Of weights and order.
    """
    rig = trainer.rig(seed)
    due = [share * samples for share in SHARES[1:]]
    snapshots = [snapshot(rig, rig.new_trainee(), 0)]
    for trainee, seen, _ in trainer.steps(size, lr, seed):
        if seen >= due[0]:
            snapshots.append(snapshot(rig, trainee, seen))
            due = [at for at in due if at > seen]
        if not due:
            break
    return GradientNoiseMeasurements(
        snapshots=tuple(snapshots), pilot_batch_size=size, pilot_lr=lr, pilot_samples=snapshots[-1].samples_seen, batch_norm=batch_norm
    )


def snapshot(rig: Rig, trainee: Trainee, samples_seen: int) -> GradientNorms:
    """Norms of micro-batch gradients at frozen parameters, drawn without replacement, until precise or out of data."""
    blocks = GradientBlocks()
    order = np.random.default_rng([rig.seed, samples_seen]).permutation(rig.train_size)
    available = rig.train_size // MICRO_BATCH
    test_at = _FIRST_TEST
    for index in range(available):
        clear_gradients(trainee)
        backward_mean(trainee, [rig.real_batch(order[index * MICRO_BATCH : (index + 1) * MICRO_BATCH].tolist())])
        blocks.add(flat_gradient(trainee.parameters))
        if blocks.micro_batch_count == test_at:
            test_at *= 2
            if is_decided(_norms(rig, blocks, samples_seen), factor=PRECISION):
                break
    clear_gradients(trainee)
    return _norms(rig, blocks, samples_seen)


def _norms(rig: Rig, blocks: GradientBlocks, samples_seen: int) -> GradientNorms:
    return GradientNorms(
        samples_seen=samples_seen,
        micro_batch_size=MICRO_BATCH,
        dataset_size=rig.train_size,
        block_counts=blocks.counts(),
        block_sq_norm_sums=blocks.sq_norm_sums(),
        block_gram=blocks.gram(),
    )


def average_until(measured: GradientNoiseMeasurements, share: float) -> NoiseScale:
    """The weighted average of the trade-off law over the first part of one run."""
    end = share * measured.snapshots[-1].samples_seen
    first = tuple(norms for norms in measured.snapshots if norms.samples_seen <= end)
    return fit_noise_scale(measured.model_copy(update={"snapshots": first, "pilot_samples": first[-1].samples_seen}))


def mean_until(runs: Sequence[GradientNoiseMeasurements], share: float) -> float | None:
    """Geometric mean of the averages of several runs; none when one of them has none."""
    values = [average_until(run, share).value for run in runs]
    return None if None in values else geometric_mean(value for value in values if value is not None)
