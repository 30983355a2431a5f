"""What a sweep trains, what came out of each training, and what all of them say together."""

from enum import StrEnum
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rightbatch.records.estimates import Estimate
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.record import SCHEMA_VERSION, Record
from rightbatch.records.training_log import TrainingTarget


class TrialSpec(Record):
    """One training of a sweep: everything that decides how it ends, apart from the workload and the target."""

    global_batch_size: PositiveInt
    lr: PositiveFloat
    """Of the first parameter group; the others follow by the same factor."""
    seed: NonNegativeInt
    """Of the weights and of the order of the samples."""
    most_samples: PositiveInt
    """Where to stop without the target: a training that needs more could not change the answer."""


class TrialStatus(StrEnum):
    """How a trial ended."""

    COMPLETE = "complete"
    """It reached the target."""
    ABORTED = "aborted"
    """It was stopped before the target: it could not win any more, or could not arrive in time."""
    DIVERGED = "diverged"
    """Its loss was not finite."""
    FAILED = "failed"
    """Its process was killed, or ran out of memory, more than once."""


class TrialPoint(Record):
    """One evaluation on the way."""

    samples: PositiveInt
    training_s: NonNegativeFloat
    """Seconds of training until then, loading included, evaluations not."""
    value: float
    """The metric of the target, or the loss."""


class TrialResult(Record):
    """What came out of one trial."""

    spec: TrialSpec
    status: TrialStatus
    reason: str = ""
    """Why it ended without the target."""
    steps: NonNegativeInt
    samples: NonNegativeInt
    """Samples trained on, also those after the target while it had to hold."""
    training_s: NonNegativeFloat
    """Seconds of all those steps, loading included, evaluations not; trials run side by side share the machine."""
    samples_to_target: PositiveFloat | None = None
    """Where the smoothed metric crossed the target; none when it did not."""
    steps_to_target: PositiveFloat | None = None
    seconds_to_target: NonNegativeFloat | None = None
    micro_batch_size: PositiveInt | None = None
    """Smallest that was used; none when no step was taken."""
    history: tuple[TrialPoint, ...] = ()
    """Evaluations, thinned."""


class SweepSettings(Record):
    """What decides which trials a sweep is made of. The same settings and the same results give the same next trials."""

    target: TrainingTarget
    sizes: tuple[PositiveInt, ...]
    """Global batch sizes, ascending."""
    first_size: PositiveInt
    """Where the search for rates begins; one of the sizes."""
    first_lr: PositiveFloat
    """The rate tried first there; all rates are this one times a power of two."""
    seeds: PositiveInt
    most_samples: PositiveInt
    """Most samples of any trial."""
    order: Literal["outward", "at once"] = "outward"
    """``outward``: each size starts from what its neighbour found, which trains least. ``at once``: all start from the first size."""
    noise_scale: PositiveFloat | None = None
    """Where the scaling rule stops being linear, in samples; none when it was not measured."""
    largest_micro_batch: PositiveInt | None = None
    """Memory ceiling; larger batches are accumulated. None when it is not known."""


class SweepManifest(Record):
    """What is swept, and on what."""

    schema_version: int = SCHEMA_VERSION
    written_by: Literal["rightbatch"] = "rightbatch"
    rightbatch_version: str
    created_at: str
    """ISO 8601, UTC."""
    updated_at: str
    """ISO 8601, UTC."""
    command: tuple[str, ...] = ()
    """The command that goes on with it; empty when it was started from Python."""
    workload_spec: str
    workload_arguments: tuple[str, ...] = ()
    code_files: tuple[tuple[str, str], ...] = ()
    """(path, SHA-256) of every file of the user's code."""
    workload: WorkloadSummary
    settings: SweepSettings
    asked: str
    """Digest of what was asked for, to tell whether a repeated command asks for the same."""
    device: str
    device_name: str
    versions: tuple[tuple[str, str], ...]
    state: Literal["running", "complete", "interrupted"] = "running"


class SweepPoint(Record):
    """What one size needed to the target, at its best rate."""

    global_batch_size: PositiveInt
    status: Literal["tuned", "partial", "unsteady", "never", "not tried"]
    """``partial``: not all seeds are there yet; ``unsteady``: no rate reached the target with every seed; ``never``: none did with any;
    ``not tried``: a neighbour already never did."""
    lr: PositiveFloat | None
    """Least mean samples to the target, of the rates that reached it with every seed."""
    lr_low: PositiveFloat | None
    """Smallest rate whose first seed came within a quarter of the best's samples."""
    lr_high: PositiveFloat | None
    samples: Estimate
    steps: Estimate
    seconds: Estimate
    """Steps times seconds a step: measured alone where ``time_source`` says so, else as the trials ran."""
    measured_seconds: Estimate
    """As the trials ran, side by side."""
    metric_at_equal_samples: Estimate
    """Best smoothed metric within the samples that every size had."""
    metric_at_equal_time: Estimate
    """Best smoothed metric within the seconds that every size had."""
    trials: NonNegativeInt
    samples_trained: NonNegativeInt
    """In all trials of this size."""


class SweepBand(Record):
    """Samples to the target at one size by the robust curve: median and 90 % interval of what is believed after all trials."""

    global_batch_size: PositiveFloat
    samples: PositiveFloat
    low: PositiveFloat
    high: PositiveFloat


class SweptPlan(Record):
    """What the plan of `find` costs, measured by the sweep."""

    global_batch_size: PositiveInt
    lr: PositiveFloat | None
    regret: Estimate
    """Time to the target at its size, with the rate tuned, over the least of all sizes, minus 1."""
    lr_over_best: PositiveFloat | None
    """Its rate over the tuned one, between the two nearest sizes; none without a rate."""
    is_interpolated: bool
    """Whether its size lies between two that were trained."""


class SweepResult(Record):
    """What a sweep came to: the document that ``--json`` prints and the report renders."""

    schema_version: int = SCHEMA_VERSION
    status: Literal["ok", "partial", "never"]
    """``partial``: it was ended before its last trial; ``never``: no size reached the target with every seed."""
    workload: WorkloadSummary
    settings: SweepSettings
    device_name: str
    points: tuple[SweepPoint, ...]
    best_size: PositiveInt | None
    """Least time to the target."""
    equivalent_sizes: tuple[PositiveInt, ...]
    """Sizes whose time to the target is not told apart from 1.05 times the least."""
    time_source: Literal["alone", "alone, unsteady", "side by side"]
    """Whether seconds a step come from steps timed alone (`find`), which may call them unsteady, or from the trials, which shared the
    machine."""
    critical_batch_size: Estimate
    """B_crit of the hyperbola E(b) = E_min (1 + b / B_crit)."""
    fewest_samples: PositiveFloat | None
    """E_min."""
    fewest_steps: PositiveFloat | None
    """S_min."""
    fit_error: NonNegativeFloat | None
    """Root of the mean squared relative distance between the sizes' samples and the hyperbola."""
    robust_critical_size: Estimate
    """B_c of the curve with another sharpness, too hot a rate at small sizes, and a smooth discrepancy."""
    band: tuple[SweepBand, ...]
    rule: Literal["saturating linear", "square root", "saturating power", "none"]
    rule_rates: tuple[tuple[PositiveInt, PositiveFloat], ...]
    """(size, rate) by the scaling rule from the tuned rate of the first size."""
    plan: SweptPlan | None
    trials: tuple[tuple[TrialStatus, NonNegativeInt], ...]
    samples_trained: NonNegativeInt
    grid_samples: NonNegativeInt
    """What all sizes with all rates that were tried anywhere and all seeds would have trained, at least."""
    best_value: float | None
    """Best smoothed metric of any trial."""
    remarks: tuple[str, ...] = ()
