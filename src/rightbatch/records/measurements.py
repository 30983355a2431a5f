"""What the probes measured: raw numbers, nothing concluded."""

from enum import StrEnum
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rightbatch.records.gradient_norms import GradientNorms
from rightbatch.records.lr_range_measurements import LrRangeMeasurements
from rightbatch.records.record import Record
from rightbatch.records.training import BranchMeasurements, SweepEvidence


class Outcome(StrEnum):
    """How one attempt at a size ended."""

    RAN = "ran"
    OUT_OF_MEMORY = "out_of_memory"
    KILLED = "killed"
    OVER_LIMIT = "over_limit"
    """It ran, but used more than the limit allows."""


class RoundedBytes(Record):
    """Bytes of one allocation that grows in steps: a polynomial of the micro-batch size, as in ``LiveMoment``, rounded up to a multiple."""

    fixed_bytes: int
    per_sample_bytes: int
    per_sample_squared_bytes: int = 0
    per_sample_cubed_bytes: int = 0
    multiple_bytes: PositiveInt


class LiveMoment(Record):
    """One moment of a training step: the bytes live then, as a polynomial of the micro-batch size b and a few rounded terms.

    live bytes(b) = fixed_bytes + per_sample_bytes * b + per_sample_squared_bytes * b**2 + per_sample_cubed_bytes * b**3
    + sum of the rounded terms
    """

    fixed_bytes: int
    per_sample_bytes: int
    per_sample_squared_bytes: int = 0
    per_sample_cubed_bytes: int = 0
    rounded: tuple[RoundedBytes, ...] = ()
    smallest_size: PositiveInt = 1
    """Where a kernel changes with the size, the moment exists from this size on."""
    largest_size: PositiveInt | None = None
    """And up to this one; none when it has no end."""
    module: str
    """Qualified name of the module that ran; empty outside any module."""
    operation: str
    """The operation whose allocation made the moment, such as ``aten.convolution``."""


class AllocationKind(StrEnum):
    """What an allocation is for, by who holds it."""

    PARAMETER = "parameters"
    GRADIENT = "gradients"
    OPTIMIZER_STATE = "optimizer state"
    BUFFER = "buffers"
    INPUT = "inputs"
    AVERAGE = "weight averages"
    """Copies that a moving average of the weights keeps."""
    ACTIVATION = "activations"
    """Made in the forward pass and kept for the backward pass."""
    TEMPORARY = "temporaries"
    """Everything else: freed before the pass that made it ends, or made in the backward pass or the update."""


class AllocationTable(Record):
    """Every allocation of the recorded steps in the order of birth: one column an attribute, all of the same length.

    bytes of allocation i at micro-batch size b = fixed_bytes[i] + per_sample_bytes[i] * b + per_sample_squared_bytes[i] * b**2
    + per_sample_cubed_bytes[i] * b**3, rounded up to a multiple of ``rounding_bytes[i]``.
    """

    fixed_bytes: tuple[int, ...]
    per_sample_bytes: tuple[int, ...]
    per_sample_squared_bytes: tuple[int, ...]
    rounding_bytes: tuple[PositiveInt, ...]
    """1 but for the few allocations that grow in steps: workspaces in whole pages, every second sample."""
    death: tuple[int, ...]
    """Number of allocations that had been made when it was freed; -1 when it outlives the steps."""
    kind: tuple[AllocationKind, ...]
    module: tuple[NonNegativeInt, ...]
    """Index into ``modules``."""
    operation: tuple[NonNegativeInt, ...]
    """Index into ``operations``."""
    modules: tuple[str, ...]
    """Qualified names of the modules; the empty name is outside any module."""
    operations: tuple[str, ...]
    per_sample_cubed_bytes: tuple[int, ...] = ()
    """Empty when no allocation has such a term, which is nearly always."""


class MemoryTrace(Record):
    """Allocations of two optimizer steps, recorded at small sizes and reduced to the moments that can be the peak."""

    batch_sizes: tuple[PositiveInt, ...]
    """Micro-batch sizes that were recorded."""
    used_bytes: tuple[NonNegativeInt, ...] = ()
    """Measured peak use of each recording, as of an attempt; empty where nothing could be measured, as on meta tensors."""
    warm_up_size: PositiveInt | None = None
    """The size that was recorded first, while the process loaded the code of its kernels: its use calibrates nothing."""
    recorded_on: Literal["device", "cpu", "meta", "none"]
    """``device``: real tensors on the target device; ``none``: no trace could be recorded, the ceiling was searched for."""
    event_count: NonNegativeInt
    """Allocations recorded at one size."""
    moments: tuple[LiveMoment, ...]
    """Every moment not dominated by another at all sizes: their maximum is the peak, at any size."""
    consistent: bool
    """Whether the recordings agree on one polynomial for every allocation."""
    remark: str = ""
    """Why the trace is missing or inconsistent; empty when there is nothing to say."""
    allocations: AllocationTable | None = None
    """Every allocation, for replaying an allocator and for saying what holds the memory; none in records of version 0.1.

    Where a kernel changes with the size these are the allocations above the last change."""
    parameter_bytes: NonNegativeInt = 0
    gradient_bytes: NonNegativeInt = 0
    optimizer_state_bytes: NonNegativeInt = 0
    buffer_bytes: NonNegativeInt = 0
    input_bytes_per_sample: NonNegativeInt = 0


class AlternativeTrace(Record):
    """The trace of the same workload with one thing changed."""

    change: Literal["bf16", "checkpointing", "sgd", "sgd with momentum", "adam"]
    """``checkpointing`` recomputes the activations of every block in the backward pass."""
    trace: MemoryTrace


class MemoryLimit(Record):
    """The most that the workload may use, and where that comes from."""

    limit_bytes: NonNegativeInt
    """Bytes that training may add to what the process held before the model was built."""
    source: str
    """What sets it: ``--limit``, ``cgroup``, ``RLIMIT_AS``, ``MemAvailable``, ``device``."""
    headroom_bytes: NonNegativeInt = 0
    """Bytes left free on purpose, already taken off the limit."""
    once_a_process: bool = False
    """Whether each attempt needs a process of its own, because the high-water mark of what counts towards the limit cannot be reset."""


class MemoryPoint(Record):
    """One attempt at two optimizer steps of one micro-batch size."""

    micro_batch_size: PositiveInt
    purpose: Literal["touch", "approach", "proof"]
    outcome: Outcome
    traced_bytes: NonNegativeInt
    """Peak live bytes that the trace predicts at this size."""
    used_bytes: NonNegativeInt | None = None
    """Measured peak above what the process held before the model was built; none when the attempt failed."""
    step_time_s: NonNegativeFloat | None = None
    """Seconds of the second step; none when the attempt failed."""
    detail: str = ""
    """First line of the error, when the attempt failed."""


class MemoryMeasurements(Record):
    """Everything the memory probe saw."""

    trace: MemoryTrace
    limit: MemoryLimit
    points: tuple[MemoryPoint, ...]
    largest_allowed: PositiveInt
    """Cap on the size from elsewhere: the dataset or ``--max-batch``."""
    largest_allowed_source: Literal["dataset", "--max-batch"]
    stopped_by: Literal["limit", "cap", "budget", "failure"]
    """Why no larger size was tried."""
    allocator: str
    """How memory was allocated and measured, such as ``cpu, glibc malloc (default arenas), peak resident set``."""
    accumulation_trace: MemoryTrace | None = None
    """A step of two micro-batches: gradients are held during the second one. More micro-batches need no more."""
    evaluation_trace: MemoryTrace | None = None
    """A forward pass without gradients, in evaluation mode."""
    alternatives: tuple[AlternativeTrace, ...] = ()
    world_size: PositiveInt = 1
    """Processes that agreed on every size; each holds its gradient buckets."""
    bucket_bytes: NonNegativeInt = 0
    """Bytes of the gradient buckets that DistributedDataParallel keeps on each process, held during every attempt."""


class Contention(Record):
    """What else used the machine just before a timing probe."""

    load_average_1m: NonNegativeFloat
    cpu_count: PositiveInt
    other_processes_cpu: NonNegativeFloat
    """Processor cores kept busy by other processes; 0.5 is half a core."""
    other_gpu_processes: NonNegativeInt = 0
    reasons: tuple[str, ...] = ()
    """Sentences that say why the timings cannot be trusted; empty when the machine was quiet."""


class StepTimePoint(Record):
    """Device-synchronised seconds of whole optimizer steps at one micro-batch size without accumulation."""

    micro_batch_size: PositiveInt
    step_times_s: tuple[PositiveFloat, ...]
    """One number a round: the mean over the steps of that round."""
    energy_per_step_j: tuple[PositiveFloat, ...] = ()
    """Joules of one step, one number a round; empty without an energy meter."""


class StepTimeMeasurements(Record):
    """Interleaved rounds over candidate sizes."""

    points: tuple[StepTimePoint, ...]
    optimizer_times_s: tuple[NonNegativeFloat, ...]
    """Seconds of the optimizer's part alone, one number a round."""
    contention: Contention
    largest_affordable: PositiveInt | None = None
    """Largest size that was timed because the budget allowed no larger one; none when the budget did not bind."""
    neighbours: tuple[StepTimePoint, ...] = ()
    """A power of two b, b - 1, b + 1 and b + 8, timed in rounds of their own; empty when there was no room or no time."""


class LoaderPoint(Record):
    """Samples a second that the data loader alone delivers with so many workers."""

    num_workers: NonNegativeInt
    batch_size: PositiveInt
    samples_per_s: tuple[PositiveFloat, ...]
    """One number a round."""


class LoaderMeasurements(Record):
    """Throughput of the data loader by number of workers."""

    points: tuple[LoaderPoint, ...]
    configured_num_workers: NonNegativeInt | None
    """The workload's own ``num_workers``; none when it leaves the choice open."""
    remark: str = ""


class NoiseProblem(StrEnum):
    """Why the gradient noise could not be measured at all."""

    NON_FINITE_LOSS = "non_finite_loss"
    ZERO_GRADIENT = "zero_gradient"
    DATASET_TOO_SMALL = "dataset_too_small"
    OUT_OF_MEMORY = "out_of_memory"


class GradientNoiseMeasurements(Record):
    """Snapshots of the gradient noise, at initialisation and along a short pilot run."""

    snapshots: tuple[GradientNorms, ...]
    pilot_batch_size: PositiveInt
    pilot_lr: NonNegativeFloat | None
    """Learning rate of the pilot's first step; none when there was no pilot."""
    pilot_samples: NonNegativeInt
    batch_norm: bool
    """Whether normalisation couples the samples of a micro-batch, so that the estimate is for that ghost batch."""
    half_size: GradientNorms | None = None
    """The last snapshot's parameters again with micro-batches of half the size; taken where normalisation couples samples."""
    problem: NoiseProblem | None = None
    remark: str = ""


class NoiseBlock(Record):
    """Sums over consecutive optimizer steps whose gradients were measured during training; the parameters move from step to step.

    Of each step: unbiased estimates of tr Sigma, the trace of one sample's gradient covariance, and of the squared norm of the true
    gradient, both split by layer.
    """

    steps: PositiveInt
    micro_batches: PositiveInt
    samples: PositiveInt
    """In the measured steps, over all ranks."""
    samples_seen: NonNegativeInt
    """Training samples consumed when the block ended, measured or not."""
    trace_sums: tuple[float, ...]
    """One number a layer."""
    sq_norm_sums: tuple[float, ...]
    """One number a layer; noise may make it negative."""


class NoiseStream(Record):
    """Gradient noise along a real run, by blocks of steps in the order of the run."""

    layers: tuple[str, ...]
    blocks: tuple[NoiseBlock, ...]
    samples_seen: NonNegativeInt
    batch_norm: bool
    """Whether normalisation couples the samples of a micro-batch."""
    non_finite_steps: NonNegativeInt = 0
    """Measured steps left out because a gradient was not finite."""
    single_steps: NonNegativeInt = 0
    """Measured steps left out because they had one micro-batch only, which says nothing about noise."""
    dropped_steps: NonNegativeInt = 0
    """Measured steps whose gradients were cleared without an optimizer step, as after an infinity under a GradScaler."""
    inconsistent_steps: NonNegativeInt = 0
    """Measured steps left out because gradients were not those of the micro-batches alone."""


class WorkloadSummary(Record):
    """What the workload was, in numbers that need no torch to read."""

    name: str
    train_size: PositiveInt
    valid_size: NonNegativeInt | None
    parameter_count: PositiveInt
    trainable_parameter_count: PositiveInt
    batch_norm: bool
    couples_samples: bool = False
    """Whether the loss of a batch is not the mean of losses of its samples, as a contrastive one: declared by the user, or found out."""
    loss_reduction: Literal["mean", "sum", "per_sample", "counted"]
    """How the loss reduces a batch; ``counted``: the user's step returns its own sample count."""
    optimizer: str
    """Class name of the optimizer, such as ``SGD``."""
    optimizer_given: bool
    """False when the workload named no optimizer and an Adam with rate 0.001 stood in for it."""
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    lr: PositiveFloat | None
    """The workload's own learning rate, of the first parameter group; none without an optimizer."""
    further_lrs: tuple[NonNegativeFloat, ...] = ()
    """Rates of further parameter groups that differ from it."""
    loss_parameter_count: NonNegativeInt = 0
    """Trainable parameters of the loss itself, which no optimizer is given."""
    lr_batch_size: PositiveInt | None
    """The batch size at which that rate was tuned; none when the user did not say."""
    lr_is_tested: bool = False
    """Whether that rate and size come from the range test of this run rather than from the user."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient; none when it is not clipped."""
    num_workers: NonNegativeInt | None
    precision: Literal["fp32", "bf16", "fp16", "fp64"]
    channels_last: bool
    compiled: bool


class Measurements(Record):
    """All that a run has measured so far; a part that was not measured is none."""

    workload: WorkloadSummary
    memory: MemoryMeasurements | None = None
    step_time: StepTimeMeasurements | None = None
    loader: LoaderMeasurements | None = None
    gradient_noise: GradientNoiseMeasurements | None = None
    branches: BranchMeasurements | None = None
    lr_range: LrRangeMeasurements | None = None
    swept: SweepEvidence | None = None
    """Taken over from a sweep of the same workload."""
