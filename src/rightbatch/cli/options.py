"""The options of every command; their docstrings are the help text. Imports nothing heavy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, Token
from cyclopts.validators import Number

from rightbatch.units import parse_bytes, parse_duration_s


def _one_word(parse: Callable[[str], float]) -> Callable[[type, Sequence[Token]], float]:
    """Let the parser convert one word, so that its message names the option and where the word came from."""

    def convert(_: type, tokens: Sequence[Token]) -> float:
        return parse(tokens[0].value)

    return convert


def _gpu_list(_: type, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Split ``t4,a100-40gb`` at its commas; names are looked up later, where the table of GPUs is at hand."""
    names = tuple(name.strip() for name in tokens[0].value.split(","))
    if not all(names):
        raise ValueError(f"names of GPUs separated by single commas are needed; got {tokens[0].value!r}; write them like t4,a100-40gb.")
    return names


Size = Annotated[int, Parameter(converter=_one_word(parse_bytes), n_tokens=1, metavar="SIZE")]
Duration = Annotated[float, Parameter(converter=_one_word(parse_duration_s), n_tokens=1, metavar="TIME")]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
NotNegative = Annotated[int, Parameter(validator=Number(gte=0))]
WorkloadSpec = Annotated[
    str, Parameter(help="FILE.py:FUNCTION or package.module:FUNCTION; the function returns a rightbatch.Workload.", show_env_var=False)
]
RunPath = Annotated[Path, Parameter(help="Folder of a run of find, a training or a sweep.", show_env_var=False)]
GpuList = Annotated[tuple[str, ...], Parameter(converter=_gpu_list, n_tokens=1, metavar="LIST", negative=())]
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How the answer is printed."""

    json: Flag = False
    """Print one JSON document instead of text, also for errors."""
    quiet: Flag = False
    """Show no progress."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How a workload is measured, by every command that measures."""

    device: str = "auto"
    """Where to measure: auto (an accelerator if there is one), cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] | None = None
    """Overrides the workload's own precision."""
    max_batch: Positive | None = None
    """Largest micro-batch to consider, in samples."""
    limit: Annotated[Size | None, Parameter(show_default=False)] = None
    """Most memory that training may use, such as 24GiB; without it, what the device has free."""
    budget: Annotated[Duration, Parameter(show_default=lambda _: "2m")] = 120.0
    """Time that all measurements together may take once the workload is loaded, such as 90s or 2m; half as long again on a busy machine."""
    seed: NotNegative = 0
    """Seed of everything that is drawn."""
    threads: Positive | None = None
    """Threads torch computes with; without it, torch's default."""
    isolation: Literal["child", "in-process"] = "child"
    """Where measurements run: in a process of their own, or in this one, which is then put back as it was."""
    out: Path | None = None
    """The run folder; without it, one below rightbatch-runs."""
    fresh: Flag = False
    """Measure again what the run folder already holds."""
    config: Path | None = None
    """Options as TOML; without it, the nearest rightbatch.toml or [tool.rightbatch] of pyproject.toml, upwards from here."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FindOptions:
    """What the answer is for."""

    goal: Literal["time", "samples", "energy", "accuracy"] = "time"
    """What to have least of until the target is reached (time, samples, energy), or the best accuracy at about the least time."""
    max_global_batch: Positive | None = None
    """Largest global batch size to recommend, in samples."""
    world_size: Positive = 1
    """Processes that will train together (data parallel)."""
    verify: Flag = False
    """Check the answer by training from a checkpoint at several sizes; takes half of the budget."""
    lr_range: Flag = False
    """Test learning rates by short runs even if the workload says where its own was tuned; without a tuned one that is done anyway."""
    link_speed: Annotated[Size | None, Parameter(show_default=False)] = None
    """Bytes a second that a device exchanges gradients at, such as 10GiB, to predict more devices; without it, exchanging is free."""
    link_latency: Annotated[Duration | None, Parameter(show_default=False)] = None
    """Time that a message between devices takes however short it is, such as 0.02ms; needs --link-speed."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What to find out about memory."""

    gpu: Annotated[GpuList | None, Parameter(show_default=False)] = None
    """GPUs that need not be here, such as t4,a100-40gb,h100, or sizes such as 24GiB: forecast the ceiling on each, without measuring."""
    expect: Positive | None = None
    """Fail with exit code 1 unless a micro-batch of this size fits: here, or with --gpu on every GPU named."""
    certify: Flag = False
    """Prove the ceiling: also try one sample more, which must fail."""
    malloc: Literal["default", "tight"] = "default"
    """How glibc allocates while measuring on the CPU: as training will, or giving freed memory back at once."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What a sweep trains."""

    target: Annotated[str | None, Parameter(show_default=False)] = None
    """What every trial trains to, in quotes: 'accuracy>=0.97' (any name for the workload's metric), or 'loss<=0.1'. Needed."""
    batches: Annotated[str | None, Parameter(show_default=False)] = None
    """Global batch sizes, 8..512 by factors of two, or 8,16,64; without it, around the plan."""
    seeds: Positive = 3
    """Trainings at the best rate of each size."""
    max_samples: Annotated[Positive | None, Parameter(show_default=False)] = None
    """Most samples of a trial; without it, 100 epochs."""
    budget: Annotated[Duration | None, Parameter(show_default=False)] = None
    """Time after which no trial goes on, such as 30m; repeat the command to go on."""
    plan: Annotated[Path | None, Parameter(show_default=False)] = None
    """Run folder of `find` whose plan is judged; without it, the latest run of the same workload below rightbatch-runs."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SweepRunOptions:
    """Where trials run, and what is kept."""

    on: str = "local"
    """Where trials run: local, in processes of this machine; ray, ray:ADDRESS, slurm or slurm:PARTITION, on a cluster."""
    jobs: Annotated[Positive | None, Parameter(show_default=False)] = None
    """Trials at once; without it, one a GPU, or up to four on the cores of a processor."""
    device: str = "auto"
    """Where a trial trains: auto (an accelerator if there is one), cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] | None = None
    """Overrides the workload's own precision."""
    threads: Annotated[Positive | None, Parameter(show_default=False)] = None
    """Threads of a trial; without it, the cores are shared."""
    out: Path | None = None
    """Folder of the sweep; without it, one below rightbatch-runs that the same command finds again."""
    fresh: Flag = False
    """Train again what the folder already holds."""
    config: Path | None = None
    """Options as TOML; without it, the nearest rightbatch.toml or [tool.rightbatch] of pyproject.toml, upwards from here."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train."""

    plan: Annotated[str | None, Parameter(metavar="RUN|SIZE")] = None
    """Folder of a run of find, or a batch size; without it, the run that find would have made, else the workload's lr_batch_size."""
    epochs: Annotated[float | None, Parameter(validator=Number(gt=0, lt=math.inf))] = None
    """How long to train, in epochs."""
    samples: Positive | None = None
    """How long to train, in samples over all epochs and processes."""
    target: str | None = None
    """End as soon as the validation samples show it: "accuracy>=0.97" with any name for the workload's metric, or "loss<=0.1"."""
    dynamic: Flag = False
    """Let the batch size follow the gradient noise, where that is forecast to be worth it; needs the findings of a run."""
    schedule: Annotated[str | None, Parameter(metavar="SPEC")] = None
    """How the batch size changes with the samples: geometric:64..512@200000, milestones:0=64,100000=256, ..."""
    resume: Flag = False
    """Go on from the last checkpoint in the folder; what is not said again is as it was."""
    fresh: Flag = False
    """Start again in a folder that holds a training."""
    out: Path | None = None
    """Folder for log, checkpoints and report; without it, one below rightbatch-runs."""
    checkpoint_every: Annotated[Duration, Parameter(show_default=lambda _: "60s")] = 60.0
    """Time between checkpoints."""
    evaluate_every: Positive | None = None
    """Samples between evaluations; without it, one epoch."""
    noise_every: NotNegative | None = None
    """Measure the gradient noise on every so many steps, or never with 0; without it, where it costs and changes next to nothing."""
    device: str = "auto"
    """Where to train: auto (an accelerator if there is one), cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] | None = None
    """Overrides the plan's and the workload's own precision."""
    seed: NotNegative | None = None
    """Seed of everything that is drawn; without it, 0."""
    threads: Positive | None = None
    """Threads torch computes with; without it, torch's default."""
    config: Path | None = None
    """Options as TOML; without it, the nearest rightbatch.toml or [tool.rightbatch] of pyproject.toml, upwards from here."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """What to show of a stored run."""

    goal: Literal["time", "samples", "energy", "accuracy"] | None = None
    """Judge the stored measurements by another goal than the run's own."""
    schema: Flag = False
    """Print the JSON schema of what the folders hold, and of what --json prints of them, instead of a run."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where the report goes."""

    output: Annotated[Path | None, Parameter(alias=("-o", "--out"))] = None
    """The HTML file; without it, report.html in each run folder."""
