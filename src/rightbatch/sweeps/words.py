"""What a sweep says while it runs."""

from collections.abc import Sequence

from rightbatch.fits.sweep import tune
from rightbatch.records.sweep import SweepSettings, TrialResult, TrialSpec, TrialStatus
from rightbatch.units import format_duration_s, format_number

UNSTEADY = "the step times of the earlier find are unstable, so times will be rough; a find with --fresh on a free machine mends that"


def cost_words(settings: SweepSettings, *, expected: int, slots: int) -> str:
    """Say before the first trial what the sweep is expected to take."""
    sizes = f"{len(settings.sizes)} sizes from {settings.sizes[0]} to {settings.sizes[-1]}"
    seeds = "one seed" if settings.seeds == 1 else f"{settings.seeds} seeds"
    return (
        f"{sizes}, {seeds}: about {expected} trials, {slots} at once, each of at most {settings.most_samples} samples; "
        "most are stopped long before. The time is told once trials have ended."
    )


def spec_words(spec: TrialSpec) -> str:
    """Name a trial."""
    return f"batch {spec.global_batch_size}, lr {format_number(spec.lr)}, seed {spec.seed}"


def ended_words(result: TrialResult) -> str:
    """Say how a trial ended."""
    name = spec_words(result.spec)
    if result.samples_to_target is not None:
        return f"{name}: {round(result.samples_to_target)} samples to the target in {format_duration_s(result.training_s)}"
    if result.status is TrialStatus.FAILED:
        return f"{name}: failed: {result.reason}"
    return f"{name}: {result.status} after {result.samples} samples: {result.reason}"


def killed_words(spec: TrialSpec, reason: str) -> str:
    """Say that the process of a trial was killed, and that it is run again."""
    return f"{spec_words(spec)}: {reason}; it is run once more"


def best_words(settings: SweepSettings, trials: Sequence[TrialResult]) -> str:
    """Say which size needs the least time so far, by the trials' own clocks; empty while none has arrived."""
    tuned = [entry for size in settings.sizes if (entry := tune(settings, trials, size)) is not None]
    if not tuned:
        return ""
    best = min(tuned, key=lambda entry: sum(trial.seconds_to_target or 0.0 for trial in entry.trials) / len(entry.trials))
    seconds = sum(trial.seconds_to_target or 0.0 for trial in best.trials) / len(best.trials)
    return f"best so far: batch {best.size} at lr {format_number(best.lr)}, {format_duration_s(seconds)} to the target"
