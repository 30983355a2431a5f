"""Training probes from one checkpoint: the same samples in the same order, at one batch size and its own learning rate each."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rightbatch.engine.learning_rate import load_optimizer, scale_lr
from rightbatch.engine.losses import loss_sum
from rightbatch.engine.rig import Rig, seed_everything, shuffled_epochs
from rightbatch.engine.step import Trainee, train_step
from rightbatch.probes.gradient_noise import snapshot
from rightbatch.records.gradient_norms import GradientNorms
from rightbatch.records.training import BranchMeasurements, BranchPlan, BranchProbe, ProbeOutcome, TrainingProbe
from rightbatch.units import format_number

EVALUATIONS = 8
"""Losses along the first branch; the others are evaluated after the same numbers of samples."""
NO_TARGET = "The loss fell no further along the first branch than it scatters, so no other size was trained: give a larger --budget."
CUT_SHORT = "The time ended while another size was trained, which is left out: a larger --budget checks more sizes."
_EVALUATED_SHARE, _FEWEST_EVALUATED, _MOST_EVALUATED = 1 / 16, 512, 2048
"""Held-out samples over those of the checkpoint, and bounds: two branches differ by less than few samples can tell."""
_AVERAGED = 8
"""Weights along an interval whose mean is evaluated: the last alone says more of how far the rate scatters it than of where it is going."""
_STAGE_SHARE = 0.25
"""Most of the budget that the checkpoint takes, and the first branch."""
_NOISE_SHARE = 0.08
"""Share of the budget for the gradient noise at the checkpoint."""
_CHECKPOINT_SEED, _BRANCH_SEED, _HELD_OUT_SEED = 11, 12, 13


class BranchDesign(Protocol):
    """Decides what to train, from what was trained; pure, so that it can be sent to where the probes run."""

    def next_branch(self, measured: BranchMeasurements) -> BranchPlan | None:
        """Return the branch to train next; none ends the probing."""

    def is_beyond(self, losses: Sequence[tuple[int, float]], target_loss: float) -> bool:
        """Return whether the losses so far have come to the target loss."""

    def conclude(self, probe: BranchProbe, measured: BranchMeasurements) -> tuple[TrainingProbe, float | None]:
        """Return what a branch came to, and the target loss, which the first branch sets."""


def measure(
    rig: Rig,
    *,
    checkpoint: BranchPlan,
    design: BranchDesign,
    budget_s: float,
    noise_micro_batch_size: int,
    is_decided: Callable[[GradientNorms], bool],
) -> BranchMeasurements:
    """Train to a checkpoint, measure the gradient noise there, then train branch after branch until no more is wanted or the time is over.

    Args:
        rig: The workload on its device.
        checkpoint: How to train to the checkpoint; ``most_samples`` is where that is.
        design: Chooses and judges the branches.
        budget_s: Seconds for everything; the first branch is always trained to its end.
        noise_micro_batch_size: Samples of one micro-batch where the noise is measured.
        is_decided: Says whether the noise is known precisely enough.
    """
    clock = rig.meters.clock
    end_s = clock.now_s() + budget_s
    trainee = rig.new_trainee()
    state = _State.of(trainee)
    state.restore(trainee, lr_factor=checkpoint.lr_factor)
    rig.say(f"training {checkpoint.most_samples} samples to the checkpoint")
    order = shuffled_epochs(rig.train_size, rig.seed + _CHECKPOINT_SEED)
    start_s = clock.now_s()
    seen = _train(rig, trainee, checkpoint, order, checkpoint.most_samples, until_s=start_s + _STAGE_SHARE * budget_s)
    affordable = int(seen * _STAGE_SHARE * budget_s / max(clock.now_s() - start_s, 1e-9))
    state = _State.of(trainee)
    norms, _ = snapshot(rig, trainee, noise_micro_batch_size, seen, is_decided, _NOISE_SHARE * budget_s)
    evaluated = max(_FEWEST_EVALUATED, min(_MOST_EVALUATED, int(_EVALUATED_SHARE * seen)))
    held_out = _HeldOut(rig, evaluated, checkpoint.micro_batch_size)
    measured = BranchMeasurements(
        checkpoint_samples=seen,
        checkpoint_batch_size=checkpoint.global_batch_size,
        evaluated_samples=held_out.count,
        target_loss=None,
        probes=(),
        checkpoint_norms=norms,
    )
    interval = 0
    while (branch := design.next_branch(measured)) is not None and not (measured.probes and clock.now_s() > end_s):
        if not measured.probes:  # the others are bounded by what this one takes
            branch = branch.model_copy(update={"most_samples": max(branch.global_batch_size, min(branch.most_samples, affordable))})
        interval = interval or -(-branch.most_samples // EVALUATIONS)
        rate = "" if branch.lr_over_rule == 1 else f", {format_number(branch.lr_over_rule)} times the rule's rate"
        rig.say(f"branch {len(measured.probes) + 1}: batch {branch.global_batch_size}{rate}, up to {branch.most_samples} samples")
        state.restore(trainee, lr_factor=branch.lr_factor / checkpoint.lr_factor)
        is_over = partial(_is_over, design, measured.target_loss)
        is_late = _never if not measured.probes else lambda: clock.now_s() > end_s
        losses = _train_branch(rig, trainee, branch, held_out, interval, is_over, is_late)
        if losses is None:
            measured = measured.model_copy(update={"remark": CUT_SHORT})
            break
        probe = _probe(branch, float(trainee.optimizer.param_groups[0]["lr"]), losses)
        result, target_loss = design.conclude(probe, measured)
        probes = (*measured.probes, probe.model_copy(update={"result": result}))
        remark = NO_TARGET if target_loss is None else ""
        measured = measured.model_copy(update={"probes": probes, "target_loss": target_loss, "remark": remark})
    return measured


def _is_over(design: BranchDesign, target_loss: float | None, losses: list[tuple[int, float]]) -> bool:
    return not math.isfinite(losses[-1][1]) or (target_loss is not None and design.is_beyond(losses, target_loss))


def _never() -> bool:
    return False


def _train_branch(
    rig: Rig,
    trainee: Trainee,
    branch: BranchPlan,
    held_out: "_HeldOut",
    interval: int,
    is_over: Callable[[list[tuple[int, float]]], bool],
    is_late: Callable[[], bool],
) -> list[tuple[int, float]] | None:
    """Train on the samples that all branches see; return (samples, loss on the held-out samples) after every interval.

    The loss is that of the mean weights along the interval: sizes and rates differ in how far they scatter about it, and a change of size
    at the checkpoint would show as a gain or a loss of its own. (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407.)

    Returns:
        None when the clock cut it short: it would say too little about its size.
    """
    order = shuffled_epochs(rig.train_size, rig.seed + _BRANCH_SEED)
    losses: list[tuple[int, float]] = []
    samples = 0
    while samples < branch.most_samples:
        mean = _MeanWeights(trainee.model)
        due = min(interval, branch.most_samples - samples)
        for part in range(1, _AVERAGED + 1):
            if (missing := due * part // _AVERAGED - mean.samples) > 0:
                mean.take(_train(rig, trainee, branch, order, missing))
        samples += mean.samples
        with mean.in_place():
            losses.append((samples, held_out.loss(trainee)))
        if is_over(losses):
            break
        if is_late():
            return None
    return losses


def _probe(branch: BranchPlan, lr: float, losses: list[tuple[int, float]]) -> BranchProbe:
    finite = tuple(pair for pair in losses if math.isfinite(pair[1]))
    outcome = ProbeOutcome.STOPPED if len(finite) == len(losses) else ProbeOutcome.FAILED
    result = TrainingProbe(
        global_batch_size=branch.global_batch_size,
        lr=lr or None,
        lr_over_rule=branch.lr_over_rule,
        outcome=outcome,
        samples=losses[-1][0],
    )
    return BranchProbe(micro_batch_size=branch.micro_batch_size, accumulation_steps=branch.accumulation_steps, result=result, losses=finite)


def _train(rig: Rig, trainee: Trainee, branch: BranchPlan, order: Iterator[int], samples: int, *, until_s: float = math.inf) -> int:
    """Take whole steps, one at least, until so many samples were trained on or a time has come; return how many."""
    seen = 0
    while seen == 0 or (seen < samples and (until_s == math.inf or rig.meters.clock.now_s() < until_s)):
        micro_batches = [rig.real_batch(list(islice(order, branch.micro_batch_size))) for _ in range(branch.accumulation_steps)]
        train_step(trainee, micro_batches)
        seen += branch.global_batch_size
    return seen


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


@dataclass(frozen=True)
class _State:
    """A checkpoint in the host's memory: model, optimizer, scaler and average; and the seed that every branch starts from."""

    saved: bytes

    @classmethod
    def of(cls, trainee: Trainee) -> "_State":
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in _stateful(trainee).items()}, buffer)
        return cls(buffer.getvalue())

    def restore(self, trainee: Trainee, *, lr_factor: float) -> None:
        parts: dict[str, dict[str, Any]] = torch.load(io.BytesIO(self.saved), map_location="cpu", weights_only=False)
        for name, part in _stateful(trainee).items():
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, parts[name])
            else:
                part.load_state_dict(parts[name])
        trainee.model.train()
        scale_lr(trainee.optimizer, lr_factor)
        seed_everything(_BRANCH_SEED)


def _stateful(trainee: Trainee) -> dict[str, _Stateful]:
    parts: dict[str, _Stateful | None] = {
        "model": trainee.model,
        "optimizer": trainee.optimizer,
        "scaler": trainee.scaler,
        "average": trainee.average,
    }
    return {name: part for name, part in parts.items() if part is not None}


class _MeanWeights:
    """The mean of a model's weights, and of its buffers that are no integers, along its way, in the memory of the host."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point() or tensor.is_complex()]
        self._sums = [torch.zeros_like(tensor, dtype=_widest(tensor.dtype), device="cpu") for tensor in self._tensors]
        self._count = 0
        self.samples = 0

    @torch.no_grad()
    def take(self, samples: int) -> None:
        """Take the weights in, after so many samples more."""
        for total, tensor in zip(self._sums, self._tensors, strict=True):
            total.add_(tensor.cpu())
        self._count += 1
        self.samples += samples

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the mean weights; then its own again."""
        own = [tensor.to("cpu", copy=True) for tensor in self._tensors]
        self._set([total / self._count for total in self._sums])
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.copy_(value)


def _widest(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


class _HeldOut:
    """The same samples for every evaluation: of the validation set, or of the training set where there is none."""

    def __init__(self, rig: Rig, most: int, micro_batch_size: int) -> None:
        given = rig.workload.valid
        dataset = rig.workload.train if given is None or len(given) == 0 else given
        self.count = min(most, len(dataset))
        indices = list(islice(shuffled_epochs(len(dataset), rig.seed + _HELD_OUT_SEED), self.count))
        self._batches = [
            [dataset[index] for index in indices[start : start + micro_batch_size]] for start in range(0, self.count, micro_batch_size)
        ]
        self._rig = rig

    def loss(self, trainee: Trainee) -> float:
        """Mean loss in evaluation mode."""
        trainee.model.eval()
        total, count = 0.0, 0.0
        with torch.no_grad():
            for samples in self._batches:
                loss, weight = loss_sum(trainee.objective, trainee.model, self._rig.place(self._rig.collate(samples)))
                total, count = total + float(loss), count + float(weight)
        trainee.model.train()
        return total / count
