"""What to do: the request, the plan, and the recommendation with its reasons."""

from enum import StrEnum
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rightbatch.records.devices import DeviceCurve, Interconnect
from rightbatch.records.environment import Environment
from rightbatch.records.estimates import BranchCurve, Estimate, LoaderCurve, MemoryCurve, NoiseScale, StepTimeCurve, Tradeoff
from rightbatch.records.lr_range import LrRange
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.record import SCHEMA_VERSION, Record
from rightbatch.records.training import SweepEvidence


class Goal(StrEnum):
    """What the user wants least of, or most of."""

    TIME = "time"
    """Shortest time to a target."""
    SAMPLES = "samples"
    """Fewest samples (epochs) to a target."""
    ENERGY = "energy"
    """Least energy to a target; needs an energy meter."""
    ACCURACY = "accuracy"
    """Best generalisation at a time near the shortest: the smallest friendly size within the tolerance."""


class Constraints(Record):
    """Bounds on the plan that do not come from a measurement."""

    max_global_batch_size: PositiveInt | None = None
    world_size: PositiveInt = 1
    interconnect: Interconnect | None = None
    """What gradients are exchanged over; none assumes that the exchange takes no time."""


class Objective(Record):
    """The goal and how close to the best is close enough."""

    goal: Goal = Goal.TIME
    tolerance: PositiveFloat = 0.05
    """Sizes whose objective is within this fraction of the best count as equivalent."""


class BatchPlan(Record):
    """A batch size that can be used as it stands.

    Raises:
        pydantic.ValidationError: ``global_batch_size`` is not micro-batch size x accumulation steps x world size.
    """

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    accumulation_steps: PositiveInt = 1
    world_size: PositiveInt = 1
    lr: PositiveFloat | None = None
    """Learning rate coupled to the size; none when the workload names no tuned rate to start from."""
    num_workers: NonNegativeInt | None = None
    """Data loader workers; none when the loader was not measured."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"

    @model_validator(mode="after")
    def _sizes_multiply(self) -> "BatchPlan":
        product = self.micro_batch_size * self.accumulation_steps * self.world_size
        if product != self.global_batch_size:
            raise ValueError(
                f"global_batch_size must be micro_batch_size x accumulation_steps x world_size; got {self.global_batch_size} and "
                f"{self.micro_batch_size} x {self.accumulation_steps} x {self.world_size} = {product}."
            )
        return self


class LrCoupling(Record):
    """How the learning rate follows the batch size, and what else moves with it."""

    rule: Literal["saturating linear", "square root", "saturating power", "none"]
    factor: PositiveFloat
    """The rule's rate over the rate at ``base_batch_size``."""
    over_rule: Estimate | None = None
    """Recommended rate over the rule's, where several rates were trained from a checkpoint; none: 1."""
    base_lr: PositiveFloat | None
    base_batch_size: PositiveInt | None
    base_is_tested: bool = False
    """Whether that rate comes from the range test of this run; else it is the user's."""
    validity: str
    """One sentence: where the rule holds, and where it stops."""
    companions: tuple[tuple[str, str], ...] = ()
    """Other settings that follow the size: (name, new value in words)."""


class Binding(StrEnum):
    """What keeps the recommended size from being another one."""

    OPTIMUM = "optimum"
    """Nothing: it is the interior optimum of the objective."""
    MEMORY = "memory"
    DATASET = "dataset"
    MAX_BATCH = "max_batch"
    LOADER = "loader"
    BUDGET = "budget"
    """The largest size that could be timed within the budget."""
    SMALLEST = "smallest"
    """The smallest size that was measured."""


class Comparison(Record):
    """What a size of common practice would cost here, against the choice."""

    label: str
    """Such as ``128``, ``largest that fits``, ``best throughput``."""
    global_batch_size: PositiveInt
    relative_time: Estimate
    """Predicted time to target over that of the choice."""
    relative_samples: Estimate
    """Predicted samples to target over those of the choice."""
    evidence: Literal["measured", "composed", "extrapolated"]


class Sensitivity(Record):
    """What the answer would be if something were different."""

    change: str
    """Such as ``noise scale 4x larger``, ``twice the memory``, ``no loader limit``."""
    global_batch_size: PositiveInt


class Recommendation(Record):
    """The answer, how sure it is, and why."""

    status: Literal["ok", "inconclusive", "nothing_fits", "unstable"]
    """``inconclusive``: a usable plan rests on the hardware alone, because the gradient noise decided nothing."""
    plan: BatchPlan | None
    objective: Objective
    binding_constraint: Binding | None
    evidence_level: Literal[0, 1, 2, 3]
    """0 step-time curve alone; 1 frozen probes and a pilot; 2 a real run; 3 training probes or a sweep."""
    expected_regret: NonNegativeFloat | None
    """Expected excess of the objective over the best size's, under everything that is uncertain."""
    equivalent_batch_sizes: tuple[PositiveInt, ...]
    """Candidates within the tolerance of the best with probability 90 %, or within it in expectation when none is that sure."""
    lr: LrCoupling
    comparisons: tuple[Comparison, ...]
    sensitivities: tuple[Sensitivity, ...]
    advice: tuple[str, ...]
    """Things to know or to do: last-batch trouble, a loader that limits, what to measure next."""
    devices: DeviceCurve | None = None
    """Time and efficiency by number of devices; none without a noise scale."""


class Findings(Record):
    """Everything one run concluded: the document that ``--json`` prints and the report renders."""

    schema_version: int = SCHEMA_VERSION
    workload: WorkloadSummary
    environment: Environment
    constraints: Constraints = Constraints()
    """The bounds that were asked for."""
    recommendation: Recommendation
    memory: MemoryCurve | None
    step_time: StepTimeCurve | None
    loader: LoaderCurve | None
    noise_scale: NoiseScale | None
    tradeoff: Tradeoff | None
    branches: BranchCurve | None = None
    """None unless the answer was checked by training."""
    lr_range: LrRange | None = None
    swept: SweepEvidence | None = None
    """The sweep of the same workload that the answer rests on; none where there was none."""
    reused_parts: tuple[str, ...] = ()
    """Measurements taken over from an earlier run of the same thing."""
    measured_at: str
    """When the oldest measurement in use was taken: ISO 8601, UTC."""
    duration_s: NonNegativeFloat
    """Seconds of measuring in this run; 0 when everything was reused."""
