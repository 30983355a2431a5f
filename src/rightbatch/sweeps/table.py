"""The trials of a sweep as a table, in the form that ``benchmarks/replay.py`` reads as ``zeus.csv``."""

import csv
import io
from collections.abc import Mapping, Sequence

from rightbatch.fits.sweep import tune
from rightbatch.records.sweep import SweepSettings, TrialResult

HEADER = ("workload", "device", "target", "batch_size", "seed", "lr", "epochs_to_target", "epoch_time_s", "power_w")


def tidy_table(
    settings: SweepSettings,
    trials: Sequence[TrialResult],
    *,
    workload: str,
    device: str,
    train_size: int,
    step_times_s: Mapping[int, float] | None,
) -> str:
    """Return one row a seed at the best rate of each size, without ``epochs_to_target`` where it did not arrive.

    Args:
        settings: Of the sweep.
        trials: In any order.
        workload: Its name.
        device: Name of the device.
        train_size: Samples of an epoch.
        step_times_s: Seconds a step by size, timed alone; none takes the trials' own.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEADER)
    for size in settings.sizes:
        tuned = tune(settings, trials, size)
        own = [trial for trial in trials if trial.spec.global_batch_size == size and trial.steps > 0]
        if tuned is not None:
            step_s = tuned.trial_step_s if step_times_s is None else step_times_s[size]
            by_seed = {trial.spec.seed: trial for trial in own if trial.spec.lr == tuned.lr} | {t.spec.seed: t for t in tuned.trials}
            for seed in sorted(by_seed):
                samples = by_seed[seed].samples_to_target
                epochs = "" if samples is None else f"{samples / train_size:.6g}"
                row = (seed, f"{tuned.lr:.6g}", epochs, f"{train_size / size * step_s:.6g}", "")
                writer.writerow((workload, device, str(settings.target), size, *row))
        elif own:
            step_s = own[0].training_s / own[0].steps if step_times_s is None else step_times_s[size]
            writer.writerow((workload, device, str(settings.target), size, 0, "", "", f"{train_size / size * step_s:.6g}", ""))
    return stream.getvalue()
