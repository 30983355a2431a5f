"""Evaluation: the mean loss and the workload's metric on the validation samples, leaving the training as it was."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from rightbatch.engine.losses import part_loss
from rightbatch.engine.process_state import preserved_process_state
from rightbatch.errors import WorkloadError
from rightbatch.training.peers import Peers
from rightbatch.training.stop_signals import outlive_first_signal
from rightbatch.workload.ingredients import Batch, Workload, sample_count
from rightbatch.workload.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What the validation samples showed.

    Attributes:
        loss: Mean over the samples, or over what the loss is a mean over; none when it is not finite.
        metric: Mean over batches, weighted by their samples; none without a metric, or when it is not finite.
        samples: How many were evaluated, over all ranks.
    """

    loss: float | None
    metric: float | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates models of one workload.

    Attributes:
        workload: With validation samples.
        objective: The loss and its precision.
        place: Moves a batch to the device.
        peers: Ranks that share the samples.
        num_workers: Processes that load.
    """

    workload: Workload
    objective: Objective
    place: Callable[[Batch], Batch]
    peers: Peers
    num_workers: int

    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluated:
        """Run all validation samples forward, in evaluation mode and without gradients.

        The metric is that of batches: one that is no mean over samples, such as a median, depends on their size.

        Args:
            model: Not wrapped; its mode, and the process's generators, are put back.
            batch_size: Samples of a batch.
        """
        valid = self.workload.valid
        assert valid is not None, "only called with validation samples"  # noqa: S101
        first = self.peers.rank * len(valid) // self.peers.world_size
        stop = (self.peers.rank + 1) * len(valid) // self.peers.world_size
        loader: DataLoader[Batch] = DataLoader(
            Subset(valid, range(first, stop)),  # type: ignore[arg-type]  # a length and samples by index are all it needs
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=self.workload.collate_fn,
            worker_init_fn=outlive_first_signal,
        )
        sums = [0.0, 0.0, 0.0, 0.0]
        with preserved_process_state(), _evaluating(model), torch.no_grad():
            for batch in loader:
                parts = self._sums_of(model, self.place(batch))
                sums = [total + part for total, part in zip(sums, parts, strict=True)]
        loss, weight, metric, samples = self.peers.totals(sums)
        return Evaluated(
            loss=_finite(loss / weight if weight else math.nan),
            metric=_finite(metric / samples) if self.has_metric else None,
            samples=int(samples),
        )

    @property
    def has_metric(self) -> bool:
        """Whether there is a metric that can be computed: one for a workload with a loss, whose outputs are known."""
        return self.workload.metric is not None and self.objective.loss is not None

    def _sums_of(self, model: nn.Module, batch: Batch) -> tuple[float, float, float, float]:
        seen: list[tuple[Any, Any]] = []
        part = part_loss(self._recording(seen), model, batch)
        weight, samples = float(part.weight), sample_count(batch)
        loss = float(part.value) * (weight if part.is_mean else 1.0) if weight else 0.0
        if not self.has_metric:
            return loss, weight, 0.0, float(samples)
        assert self.workload.metric is not None, "has_metric says so"  # noqa: S101
        output, target = seen[0]
        return loss, weight, _number(self.workload.metric(output, target)) * samples, float(samples)

    def _recording(self, seen: list[tuple[Any, Any]]) -> Objective:
        """The objective with a loss that notes the output and the target it was given, so that the model runs once."""
        loss = self.objective.loss
        if loss is None or not self.has_metric:
            return self.objective

        def recorded(output: Any, target: Any) -> Tensor:
            seen.append((output, target))
            return loss(output, target)

        return replace(self.objective, loss=recorded)


def check_target(workload: Workload, *, is_loss: bool) -> None:
    """Refuse a target that no evaluation could meet.

    Args:
        workload: What is trained.
        is_loss: Whether the target is of the loss; else of the metric.

    Raises:
        WorkloadError: The workload has no validation samples, or no metric.
    """
    if workload.valid is None:
        raise WorkloadError("a target needs validation samples; the workload has none; give it valid=.")
    if is_loss:
        return
    if workload.metric is None or workload.loss is None:
        given = "no metric" if workload.metric is None else "a step, whose outputs a metric cannot be given"
        raise WorkloadError(f"a target of a metric needs metric= and loss=; the workload has {given}; give them, or use 'loss<=VALUE'.")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode within, and back into its own after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


def _number(returned: object) -> float:
    """The metric of a batch, as the user's function returned it.

    Raises:
        WorkloadError: It is no number.
    """
    try:
        return float(returned)  # type: ignore[arg-type]  # whatever it is
    except (TypeError, ValueError, RuntimeError) as error:
        what = (
            f"a tensor of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else f"{type(returned).__name__} {returned!r:.40}"
        )
        raise WorkloadError(
            f"metric must return one number for a batch; got {what}; return its mean over the batch, for example."
        ) from error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
