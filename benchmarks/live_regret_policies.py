"""What people would train with: the plans of `find`, common sizes at the base rate, the largest that fits, the noise at initialisation."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean, median

import torch

import rightbatch as rb
from live_regret_scoring import FIND, VERIFY, Policy
from live_regret_training import Trainer
from live_regret_truth import Tuned, rounded
from rightbatch.errors import RightbatchError
from rightbatch.fits.lr_scaling import couple_lr
from rightbatch.fits.step_time import fit_step_time, is_decided
from rightbatch.probes import step_time
from rightbatch.records.estimates import Status
from rightbatch.records.plan import Findings

COMMON = (32, 128)
Answer = tuple[Policy | None, Findings | None, str]
"""A plan, what it rests on, and a word on what went wrong or is missing."""
NOISE_AT_START = "noise scale at start"


def find(workload: rb.Workload, base_lr: float, *, budget_s: float, slowdown: float, verify: bool, seed: int = 0) -> Answer:
    """Ask `find` as a user does; return its plan as a policy, its findings, and a word on what went wrong or is missing.

    The cost is the seconds of its measuring: starting its process is left out, as loading and evaluating are left out of the sweep's.

    Args:
        workload: What is trained.
        base_lr: Rate of a plan that names none.
        budget_s: Seconds on an idle machine.
        slowdown: How much longer everything takes here and now; the budget is longer by that, and the cost shorter.
        verify: Whether to check by training.
        seed: Of everything random.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", rb.RightbatchWarning)
            plan = rb.find(workload, budget=f"{budget_s * slowdown:.1f}s", device="cpu", threads=1, seed=seed, verify=verify)
    except RightbatchError as error:
        return None, None, f"{type(error).__name__}: {error}"
    policy = Policy(
        name=VERIFY if verify else FIND,
        size=plan.global_batch_size,
        lr=rounded(plan.lr or base_lr),
        timed_size=plan.micro_batch_size,
        cost_s=plan.findings.duration_s / slowdown,
        note="; ".join((f"seed {seed}", *(str(warning.message).partition(";")[0] for warning in caught))),
    )
    return policy, plan.findings, ""


def find_elsewhere(
    ask: Callable[[rb.Workload, float], Answer], workload: rb.Workload, base_lr: float, tuned: Sequence[Tuned]
) -> list[Answer]:
    """Ask `find` again as if the rate had been tuned at the smallest, and at the largest, size of the sweep.

    Args:
        ask: (workload, its rate) -> answer; see ``find``.
        workload: What is trained.
        base_lr: Rate of its optimizer.
        tuned: The sweep, ascending in size.
    """
    answers: list[Answer] = []
    for entry in (tuned[0], tuned[-1]):
        policy, findings, why = ask(tuned_at(workload, base_lr, entry), entry.lr)
        name = f"{FIND}, rate from {entry.size}"
        answers.append((None if policy is None else replace(policy, name=name), findings, why))
    return answers


def tuned_at(workload: rb.Workload, base_lr: float, entry: Tuned) -> rb.Workload:
    """The workload as somebody would give it who had tuned its rate at another size."""
    build = workload.optimizer
    assert build is not None, "checked when the question was made"  # noqa: S101

    def optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        built = build(parameters)
        for group in built.param_groups:
            group["lr"] *= entry.lr / base_lr
        return built

    return replace(workload, optimizer=optimizer, lr_batch_size=entry.size)


def others(findings: Findings | None, base_lr: float, train_size: int, largest_timed: int) -> tuple[Policy, ...]:
    """The policies that need no tuning; the last two rest on what `find` measured.

    The largest that fits is taken to have the throughput of the largest size of the sweep, which is cheaper to time.
    """
    found = [_at_base(str(size), min(size, train_size), base_lr) for size in COMMON]
    if findings is None:
        return tuple(found)
    if findings.memory is not None and findings.memory.ceiling:
        largest = _at_base("largest that fits", findings.memory.ceiling, base_lr)
        found.append(replace(largest, timed_size=min(largest.size, largest_timed)))
    noise = findings.noise_scale
    first = noise.snapshots[0].noise_scale if noise is not None and noise.snapshots else None
    if first is not None and first.value is not None and first.status is Status.OK:
        size = max(1, min(round(first.value), train_size))
        coupling = couple_lr(findings.workload, first.value, size)
        found.append(Policy(name=NOISE_AT_START, size=size, lr=rounded(base_lr * coupling.factor), timed_size=size))
    return tuple(found)


def _at_base(name: str, size: int, base_lr: float) -> Policy:
    return Policy(name=name, size=size, lr=rounded(base_lr), timed_size=size, note="base rate")


def reference(best: Tuned, sweep_s: float) -> Policy:
    """The sweep's best as a policy, at the cost of the sweep."""
    return Policy(name="sweep", size=best.size, lr=best.lr, timed_size=best.size, cost_s=sweep_s)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds a sample by size, and how the machine was meanwhile."""

    sample_s: Mapping[int, float]
    slowdown: float
    """Wall clock over processor time: 1 on an idle machine."""
    reasons: tuple[str, ...]
    """What disturbed the rounds."""


class ProcessorClock:
    """Processor time of this process: on a machine that others use too it does not count their turns."""

    def now_s(self) -> float:
        """Return seconds."""
        return time.process_time()


def pooled(timings: Sequence[Timing]) -> Timing:
    """Put rounds from different times together: which size is faster changes with what else the machine does.

    Args:
        timings: The last has all sizes; a size that earlier ones lack keeps its ratio to the others there.
    """
    common = sorted(set.intersection(*(set(timing.sample_s) for timing in timings)))
    levels = [geometric_mean([timing.sample_s[size] for size in common]) for timing in timings]
    sample_s = {
        size: median(levels) * median([t.sample_s[size] / level for t, level in zip(timings, levels, strict=True) if size in t.sample_s])
        for size in timings[-1].sample_s
    }
    reasons = tuple(dict.fromkeys(reason for timing in timings for reason in timing.reasons))
    return Timing(sample_s=sample_s, slowdown=max(timing.slowdown for timing in timings), reasons=reasons)


def time_sizes(trainer: Trainer, sizes: Iterable[int], budget_s: float) -> Timing:
    """Median processor seconds a sample of every size, in interleaved rounds.

    Args:
        trainer: Of the workload, on the CPU.
        sizes: Batch sizes.
        budget_s: Processor seconds for the rounds.
    """
    rig = trainer.rig()
    rig.meters = replace(rig.meters, clock=ProcessorClock())
    machine = step_time.contention(rig)
    wall_s, processor_s = time.perf_counter(), time.process_time()
    measured = step_time.measure(
        rig, sorted(set(sizes)), is_decided=is_decided, budget_s=budget_s, machine=machine, largest_affordable=None
    )
    slowdown = (time.perf_counter() - wall_s) / (time.process_time() - processor_s)
    curve = fit_step_time(measured)
    sample_s = {point.micro_batch_size: (point.step_time_s.value or 0.0) / point.micro_batch_size for point in curve.points}
    return Timing(sample_s=sample_s, slowdown=max(1.0, slowdown), reasons=curve.reasons)
