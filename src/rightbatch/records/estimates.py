"""What the fits concluded from measurements: values with intervals and a status, never a bare number."""

from enum import StrEnum
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rightbatch.records.measurements import MemoryLimit, MemoryPoint, Outcome
from rightbatch.records.record import Record
from rightbatch.records.training import ProbeOutcome


class Status(StrEnum):
    """How far an estimate can be trusted."""

    OK = "ok"
    AT_LEAST = "at_least"
    """Only the lower end is known: ``low`` is meaningful, ``high`` is none."""
    INDETERMINATE = "indeterminate"
    """The signal is below the noise, or nothing was measured."""
    UNSTABLE = "unstable"
    """Something else used the machine, or repeated measurements disagree."""
    INCONSISTENT = "inconsistent"
    """The model behind the estimate does not describe the measurements."""
    NON_FINITE = "non_finite"
    NO_GRADIENT = "no_gradient"
    NOTHING_FITS = "nothing_fits"


class Estimate(Record):
    """A value with a 95 % interval, the number of observations behind it, and a status."""

    value: float | None
    """None when nothing can be said about the value."""
    low: float | None
    """Lower end of the interval; none when unbounded."""
    high: float | None
    """Upper end of the interval; none when unbounded."""
    n: NonNegativeInt
    status: Status = Status.OK


class MemoryShare(Record):
    """Bytes of one kind of memory at the peak of the largest size that ran."""

    name: str
    """A kind of allocation, such as ``activations``; ``activations and temporaries`` where the trace does not tell them apart."""
    size_bytes: NonNegativeInt


class MemoryHolder(Record):
    """A module whose allocations are live at the peak of the largest size that ran."""

    module: str
    operation: str
    """Its operation that holds most."""
    size_bytes: NonNegativeInt


class MemoryAlternative(Record):
    """What one change to the workload would do to the ceiling, by tracing again."""

    change: Literal["bf16", "checkpointing", "sgd", "sgd with momentum", "adam"]
    peak_bytes: NonNegativeInt
    """Calibrated use at the largest size that ran."""
    predicted_ceiling: PositiveInt | None
    """Largest size that the calibrated trace lets fit; none when not even one sample would."""


class Certificate(Record):
    """The proof that the ceiling is one: what happened one sample above it."""

    micro_batch_size: PositiveInt
    outcome: Outcome
    holds: bool
    """Whether that size failed, so that the ceiling is exact."""


class GpuCeiling(Record):
    """The ceiling predicted for a GPU that is not here, from a trace and a replay of its caching allocator."""

    gpu: str
    total_bytes: PositiveInt
    """What the driver reports for the device."""
    available_bytes: PositiveInt
    """The total without the context and what the libraries hold outside the allocator."""
    smooth_ceiling: PositiveInt | None
    """Largest size at which the allocator never has to free its cache and retry; none when one sample does not fit."""
    hard_ceiling: PositiveInt | None
    """Largest size that fits at all; between the two, steps are slowed by retries."""
    low: PositiveInt | None
    """Lower end of the range in which the smooth ceiling is expected."""
    high: PositiveInt | None
    peak_reserved_bytes: NonNegativeInt
    """What the allocator reserves at the smooth ceiling."""


class MemoryForecast(Record):
    """Ceilings on devices that are not here."""

    recorded_on: Literal["cpu", "meta", "none"]
    consistent: bool
    ceilings: tuple[GpuCeiling, ...]
    bytes_at_one: NonNegativeInt
    peak_module: str
    peak_operation: str
    remarks: tuple[str, ...] = ()
    """What the forecast rests on, and what it cannot know."""


class MemoryCurve(Record):
    """Memory as a function of the micro-batch size, and the largest size that fits."""

    status: Status
    ceiling: PositiveInt | None
    """Memory ceiling: the largest micro-batch that ran within the limit; none when not even one sample fits."""
    ceiling_is_limit: bool
    """Whether memory stopped the search (else the dataset, ``--max-batch`` or the budget did: the ceiling is at least this)."""
    predicted_ceiling: PositiveInt | None
    """Largest size the calibrated trace lets fit (extrapolated beyond ``ceiling``); none without a trace."""
    stopped_by: Literal["limit", "cap", "budget", "failure"]
    largest_allowed: PositiveInt
    largest_allowed_source: Literal["dataset", "--max-batch"]
    limit: MemoryLimit
    calibration_scale: float | None
    """a in used = a * trace(b) + c."""
    calibration_offset_bytes: float | None
    """c in used = a * trace(b) + c."""
    calibration_error: NonNegativeFloat | None
    """Largest distance between measured and calibrated use, over the largest measured use."""
    bytes_at_one: NonNegativeInt
    """Predicted use at one sample."""
    points: tuple[MemoryPoint, ...]
    curve: tuple[tuple[PositiveInt, NonNegativeInt], ...]
    """(micro-batch size, predicted used bytes), for drawing."""
    shares: tuple[MemoryShare, ...]
    peak_module: str
    peak_operation: str
    recorded_on: Literal["device", "cpu", "meta", "none"]
    allocator: str
    remarks: tuple[str, ...] = ()
    holders: tuple[MemoryHolder, ...] = ()
    """Modules that hold most at the peak of the largest size that ran, largest first."""
    accumulation_ceiling: PositiveInt | None = None
    """Largest micro-batch that fits while gradients are accumulated: at most the ceiling; none when it was not traced."""
    evaluation_ceiling: PositiveInt | None = None
    """Largest batch predicted to fit without gradients; none when it was not traced."""
    smooth_ceiling: PositiveInt | None = None
    """Largest size predicted not to make a CUDA caching allocator free its cache and retry; none on other devices."""
    alternatives: tuple[MemoryAlternative, ...] = ()
    certificate: Certificate | None = None
    """None when no proof was asked for."""


class ThroughputPoint(Record):
    """Step time and throughput measured at one micro-batch size."""

    micro_batch_size: PositiveInt
    step_time_s: Estimate
    samples_per_s: Estimate
    fitted_step_time_s: PositiveFloat | None = None
    energy_per_step_j: PositiveFloat | None = None


class PowerOfTwo(Record):
    """Whether a power of two is faster than the sizes beside it."""

    size: PositiveInt
    relative_time: Estimate
    """Its step time over the mean of those of one sample less and one more: median over rounds."""
    multiple_of_eight: PositiveInt
    """The next multiple of eight, no power of two."""
    multiple_relative_time: Estimate
    """Time a sample at that multiple over that at the power."""


class StepTimeCurve(Record):
    """Step time as a function of the micro-batch size: t(b) = (t0**p + (b / tau)**p)**(1/p)."""

    status: Status
    reasons: tuple[str, ...]
    """Why the status is not ``ok``; empty otherwise."""
    points: tuple[ThroughputPoint, ...]
    fixed_time_s: NonNegativeFloat | None
    """t0: what a step costs however small the batch is."""
    saturated_samples_per_s: PositiveFloat | None
    """tau: the throughput that ever larger batches approach."""
    exponent: PositiveFloat | None
    """p >= 1: how sharply the two regimes meet; 1 is the affine law."""
    fit_error: NonNegativeFloat | None
    """Largest relative distance between a measured and a fitted step time."""
    half_saturation: PositiveFloat | None
    """b_half = t0 * tau: the size at which the two regimes meet."""
    knee: PositiveInt | None
    """Smallest measured size within 3 % of the best throughput."""
    best: PositiveInt | None
    """Measured size with the best throughput."""
    optimizer_time_s: NonNegativeFloat
    """Seconds of one optimizer step apart from forward and backward."""
    power_of_two: PowerOfTwo | None = None
    """None when the sizes beside a power of two were not timed."""


class LoaderThroughput(Record):
    """Throughput of the data loader alone with one number of workers."""

    num_workers: NonNegativeInt
    samples_per_s: Estimate


class LoaderCurve(Record):
    """Throughput of the data loader alone by number of workers."""

    points: tuple[LoaderThroughput, ...]
    num_workers: NonNegativeInt
    """The number the plan uses: the workload's own, or the smallest within 5 % of the best."""
    samples_per_s: Estimate
    """At ``num_workers``."""
    status: Status = Status.OK
    remark: str = ""


class NoiseSnapshot(Record):
    """The simple noise scale at one set of frozen parameters."""

    samples_seen: NonNegativeInt
    noise_scale: Estimate
    grad_sq_norm: Estimate
    """Squared norm of the true gradient, unbiased; may be negative when the signal is below the noise."""
    grad_noise_trace: Estimate
    """Trace of the covariance of a single sample's gradient, unbiased."""
    micro_batch_size: PositiveInt
    micro_batch_count: PositiveInt


class NoiseScale(Record):
    """The simple noise scale B_simple = tr Sigma / |G|**2 of the run, in samples."""

    value: float | None
    low: float | None
    high: float | None
    n: NonNegativeInt
    """Per-sample gradients averaged in all snapshots together."""
    status: Status
    snapshots: tuple[NoiseSnapshot, ...]
    pilot_samples: NonNegativeInt
    """How far a training was followed."""
    remarks: tuple[str, ...] = ()
    """What limits the estimate and what to do about it."""


class TradeoffPoint(Record):
    """What one global batch size is predicted to cost until the target, relative to the best candidate for time."""

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    accumulation_steps: PositiveInt
    evidence: Literal["measured", "composed", "extrapolated"]
    """``measured``: this very step was timed; ``composed``: accumulation of timed micro-batches;
    ``extrapolated``: from the fit, or on several ranks."""
    step_time_s: PositiveFloat
    """Seconds between optimizer steps, the data loader's limit included."""
    samples_per_s: PositiveFloat
    loader_bound: bool
    relative_time: Estimate
    """Time to target over that of the best size, draw by draw: mean and 90 % interval."""
    relative_samples: Estimate
    """Samples to target over the least possible: mean and 90 % interval."""
    relative_energy: Estimate | None = None
    regret: NonNegativeFloat | None
    """Expected excess of the objective over that of the best size; none without a usable noise scale."""


class Tradeoff(Record):
    """Predicted cost of every candidate size, and the belief about the critical batch size behind it."""

    status: Status
    critical_batch_size: Estimate
    """B_crit: posterior median and 90 % interval, in samples."""
    points: tuple[TradeoffPoint, ...]
    """In ascending order of the global batch size."""
    remarks: tuple[str, ...] = ()


class BranchPoint(Record):
    """What one branch needed to the common loss, relative to the first branch."""

    global_batch_size: PositiveInt
    lr: PositiveFloat | None
    outcome: ProbeOutcome
    relative_samples: PositiveFloat
    """Samples over the first branch's; a lower bound when the branch was stopped or failed."""
    relative_time: PositiveFloat | None
    """Seconds over the first branch's, from the measured step times; a lower bound likewise; none where the size was not timed."""


class BranchCurve(Record):
    """Training from one checkpoint at several sizes, each with its coupled learning rate."""

    status: Status
    """``indeterminate`` when fewer than two sizes could be trained."""
    checkpoint_samples: NonNegativeInt
    evaluated_samples: NonNegativeInt
    target_loss: float | None
    points: tuple[BranchPoint, ...]
    """In the order of training."""
    remarks: tuple[str, ...] = ()
