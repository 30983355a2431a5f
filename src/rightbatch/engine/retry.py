"""The gradient of a window when memory runs out on the way: smaller micro-batches, and nothing left of the attempt that failed.

An attempt changes gradients, buffers (statistics of BatchNorm) and random number generators. Gradients are dropped, the rest is put back.
Where ranks train together, a backward pass that reduces may have sent some gradients off already when memory runs out. They are complete
and stay; only those that had not arrived are computed again, outside the wrapper, and then handed to it, so that every rank takes part
once in every reduction. See ``docs/theory/accumulation.md``.
"""

import gc
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import is_not

import torch
from torch import Tensor, nn

from rightbatch.engine.data_parallel import DataParallel
from rightbatch.engine.losses import part_loss, part_weight
from rightbatch.engine.out_of_memory import is_out_of_memory
from rightbatch.engine.step import (
    StepResult,
    Trainee,
    Window,
    WindowSums,
    backward_window,
    clear_gradients,
    conclude_window,
    scaled,
    window_weights,
)
from rightbatch.errors import NothingFitsError
from rightbatch.workload.ingredients import Batch, sample_count
from rightbatch.workload.splitting import split_batch

_log = logging.getLogger(__name__)


class AttemptState:
    """What a forward and backward pass changes besides gradients: a model's buffers, and the random numbers of torch and of Python.

    Args:
        model: Its buffers stay in place, or are replaced under their names.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items() if buffer is not None]  # noqa: SLF001
        self._owners = [(module, name) for module, name, _ in sorted(named, key=lambda owner: str(owner[2].dtype))]  # copied together
        self._device = next(model.parameters()).device
        self._places: list[tuple[nn.Module, str]] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._generators: list[Callable[[], object]] = []

    def take(self) -> None:
        """Remember the present state."""
        held = [(owner, buffer) for owner in self._owners if (buffer := owner[0]._buffers.get(owner[1])) is not None]  # noqa: SLF001
        buffers = [buffer for _, buffer in held]
        with torch.no_grad():
            if len(buffers) != len(self._buffers) or any(map(is_not, buffers, self._buffers)):
                self._places, self._buffers = [owner for owner, _ in held], buffers
                self._copies = [torch.empty_like(buffer) for buffer in buffers]
            if buffers:
                torch._foreach_copy_(self._copies, buffers)  # what torch's optimizers call
        on_host, of_python = torch.get_rng_state(), random.getstate()  # NumPy's takes longer to read than the rest together
        self._generators = [lambda: torch.set_rng_state(on_host), lambda: random.setstate(of_python)]
        if self._device.type in ("cuda", "xpu", "mps"):
            of_device = torch.get_device_module(self._device)
            arguments = () if self._device.type == "mps" else (self._device,)
            on_device = of_device.get_rng_state(*arguments)
            self._generators.append(lambda: of_device.set_rng_state(on_device, *arguments))

    def restore(self) -> None:
        """Go back to the state that was remembered."""
        with torch.no_grad():
            for (module, name), buffer in zip(self._places, self._buffers, strict=True):
                module._buffers[name] = buffer  # noqa: SLF001
            if self._buffers:
                torch._foreach_copy_(self._buffers, self._copies)
        for put_back in self._generators:
            put_back()


@dataclass
class _Arrivals:
    """Which gradients have arrived since a moment, seen without hooks: a gradient that arrives is written to or replaced."""

    seen: list[tuple[nn.Parameter, Tensor | None, int]] = field(default_factory=list)

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        self.seen = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p in parameters]  # noqa: SLF001  # torch's documented counter

    def forget(self) -> None:
        """Hold no gradient longer than its step does."""
        self.seen = []

    def missing(self) -> list[nn.Parameter]:
        return [p for p, before, version in self.seen if p.grad is before and (before is None or before._version == version)]  # noqa: SLF001


@dataclass
class PatientBackward:
    """Backward passes over windows of one model, with micro-batches that become smaller when memory runs out, and stay so.

    Attributes:
        trainee: The model and what trains it.
        micro_batch_size: Samples that a micro-batch holds at most.
        place: Moves a micro-batch to the device.
        forget: Called when the gradients of a window were dropped.
    """

    trainee: Trainee
    micro_batch_size: int
    place: Callable[[Batch], Batch]
    forget: Callable[[], None]

    def __post_init__(self) -> None:
        self._start = AttemptState(self.trainee.model)
        self._before_last = AttemptState(self.trainee.model)
        self._arrivals = _Arrivals()

    def run(self, batch: Batch, window: Window) -> StepResult:
        """Leave in ``.grad`` the gradient of the window's mean loss, in as many attempts as it takes.

        Args:
            batch: This rank's samples, on any device.
            window: Its first division into micro-batches.

        Raises:
            NothingFitsError: Not even one sample fits.
        """
        parallel = self.trainee.parallel
        self._start.take()
        while True:
            clear_gradients(self.trainee)
            sums = WindowSums()
            is_complete = self._attempt(partial(backward_window, self.trainee, window, sums))
            if not is_complete:
                _let_go()
            if not is_complete and parallel is not None and parallel.is_armed:
                self._finish(window, sums, parallel)
                is_complete = True
            if is_complete:
                self._arrivals.forget()
                return conclude_window(self.trainee, window, sums)
            self._shrink(window.micro_batches)
            self._start.restore()
            self.forget()
            micro_batches = split_batch(batch, self.micro_batch_size)
            weights = window_weights(self.trainee.objective, micro_batches)
            window = replace(window, micro_batches=micro_batches, weights=weights)

    def before_last(self) -> None:
        """Remember where the micro-batch begins whose gradients go to the other ranks while they arrive."""
        self._before_last.take()
        self._arrivals.begin(self.trainee.parameters)

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Do something; return False when it ran out of memory. The error holds the attempt's tensors, and is gone on return."""
        try:
            work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _shrink(self, micro_batches: Sequence[Batch]) -> None:
        failed = max(map(sample_count, micro_batches))
        parallel = self.trainee.parallel
        if failed == 1 or (parallel is not None and parallel.couples_ranks):
            raise self._nothing_fits(failed)
        self.micro_batch_size = (failed + 1) // 2
        if parallel is not None:
            parallel.has_shrunk = True
        _log.warning(
            "out of memory with micro-batches of %d samples: the step is repeated, and training goes on, with at most %d; "
            "gradients are those of the same batch",
            failed,
            self.micro_batch_size,
        )

    def _nothing_fits(self, failed: int) -> NothingFitsError:
        if failed > 1:
            return NothingFitsError(
                f"memory ran out with micro-batches of {failed} samples, and SyncBatchNorm exchanges statistics in every forward pass, so "
                "that one rank cannot repeat its own; start with a smaller micro_batch_size on all ranks."
            )
        return NothingFitsError(
            "one sample must fit in memory with its gradients; it did not, in a training step; use a smaller model, lower precision, "
            "activation checkpointing, or free what else holds memory."
        )

    def _finish(self, window: Window, sums: WindowSums, parallel: DataParallel) -> None:
        """Complete a window whose last micro-batch ran out of memory after the wrapper had begun to wait for its gradients."""
        missing = self._arrivals.missing()
        whole = window.micro_batches[-1]
        self._shrink([whole])
        while True:
            self._before_last.restore()
            part_sums = replace(sums)
            gradients: list[Tensor | None] = [None] * len(missing)
            parts = split_batch(whole, self.micro_batch_size)
            job = _Rest(self.trainee, parallel.inner, window, parts, missing, part_sums, gradients, self.place)
            if self._attempt(job.run):
                break
            _let_go()
            self._shrink(parts)
        sums.loss, sums.weight, sums.samples = part_sums.loss, part_sums.weight, part_sums.samples
        parallel.finish_backward([(p, gradient) for p, gradient in zip(missing, gradients, strict=True) if gradient is not None])


@dataclass(frozen=True)
class _Rest:
    """The gradients of one micro-batch for some parameters, added up over smaller parts of it; ``.grad`` and its hooks are left alone."""

    trainee: Trainee
    model: nn.Module
    window: Window
    parts: list[Batch]
    missing: list[nn.Parameter]
    sums: WindowSums
    gradients: list[Tensor | None]
    place: Callable[[Batch], Batch]

    def run(self) -> None:
        for host_part in self.parts:
            batch = self.place(host_part)
            known = None if self.window.weights is None else part_weight(self.trainee.objective, host_part)
            part = part_loss(self.trainee.objective, self.model, batch, known)
            samples = sample_count(batch)
            share, _ = self.sums.share_of(part, len(self.parts), samples)
            added: tuple[Tensor | None, ...] = ()
            if self.missing:
                added = torch.autograd.grad(scaled(self.trainee, share), self.missing, allow_unused=True)
            for index, gradient in enumerate(added):
                before = self.gradients[index]
                self.gradients[index] = gradient if before is None else before if gradient is None else before + gradient
            self.sums.add(share, part.weight, samples)
            del share, part, batch, added


def _let_go() -> None:
    """Give back what a failed attempt held: cycles through its frames, casts that autocast keeps, blocks that the allocator keeps."""
    torch.clear_autocast_cache()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
