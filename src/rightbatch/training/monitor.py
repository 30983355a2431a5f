"""The noise monitor: the gradient noise scale of a training that the user runs."""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from rightbatch.engine.data_parallel import find_wrapper, layers_around
from rightbatch.engine.late_values import LateValues
from rightbatch.engine.step_norms import StepNorms
from rightbatch.errors import UsageError
from rightbatch.fits.intervals import FloatArray
from rightbatch.fits.noise_stream import StepWeights, fit_layers, fit_noise_stream, step_moments
from rightbatch.records.estimates import Estimate, NoiseScale
from rightbatch.records.measurements import NoiseStream
from rightbatch.training.noise_blocks import MeasuredStep, NoiseBlocks

_STATE_VERSION = 1
_SCALARS = 7
"""Of a measured step, in front of the norms: see ``NoiseMonitor._finish_step``."""


class NoiseMonitor:
    """Measures the simple noise scale of a training while it runs, on every n-th optimizer step.

    Say of each micro-batch how many samples it holds, around its backward pass::

        monitor = rb.NoiseMonitor(model, optimizer)
        for micro_batches in loader:
            for x, y in micro_batches:
                with monitor.micro_batch(len(x)):
                    (loss_fn(model(x), y) / len(micro_batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(monitor.noise_scale)

    A step needs two micro-batches, by accumulation or by ranks, to say anything. Without either, take its parts from the monitor: the
    whole batch, or on a measured step its two halves, each with its share of the samples::

        for x, y in loader:
            for share, x_part, y_part in monitor.parts(x, y):
                (share * loss_fn(model(x_part), y_part)).backward()

    Clipping and unscaling come after the blocks, as always. A constant factor on the loss drops out of the noise scale. Under
    DistributedDataParallel give the wrapped model; all ranks must take the same steps. Between measured steps the model carries no hook,
    and the host never waits for the device unless the noise scale is read.

    Args:
        model: The model that is trained.
        optimizer: Its optimizer. Parameters of the model that it updates are watched.
        every: Measure one step in so many; 1 measures all. A measured step costs the host some 30 microseconds for each parameter tensor
            and micro-batch, and where it is halved a second pass: take 50 or more where a step takes a few milliseconds.
        scaler: The GradScaler of mixed precision, whose changing scale is then divided out.
        dataset_size: Training samples that are drawn without replacement; none where samples never come again.

    Raises:
        UsageError: The model and the optimizer share no parameter, or ranks train together and the model is not wrapped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 10,
        scaler: GradScaler | None = None,
        dataset_size: int | None = None,
    ) -> None:
        if every < 1 or (dataset_size is not None and dataset_size < 1):
            raise UsageError(f"every and dataset_size must be at least 1; got {every} and {dataset_size}.")
        watched = _watched(model, optimizer)
        self._every = every
        self._scaler = scaler
        self._dataset_size = dataset_size
        self._reducer = find_wrapper(model, needed_by="the monitor")
        self._ranks = 1 if self._reducer is None else self._reducer.process_group.size()
        self._batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())  # noqa: SLF001
        names = [name.rpartition(".")[0] or name for name in watched]
        self._layers = tuple(dict.fromkeys(names))
        self._layer_of = np.array([self._layers.index(name) for name in names])
        self._norms = StepNorms(watched, self._reducer)
        self._device = next(iter(watched.values())).device
        self._late = LateValues()
        self._sent: deque[int] = deque()
        self._reducing: deque[_Reduction] = deque()
        self._blocks = NoiseBlocks()
        self._left_out = dict.fromkeys(("non_finite", "single", "inconsistent", "dropped"), 0)
        self._step = 0
        self._samples_seen = 0
        self._announced = self._announced_samples = 0
        self._scale: Tensor | None = None
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._is_open = True

    @contextlib.contextmanager
    def micro_batch(self, samples: int, *, weight: float = 1.0) -> Iterator[None]:
        """Announce a micro-batch; its one backward pass must run inside.

        Args:
            samples: Number of samples in it, on this rank.
            weight: What the mean loss of these samples was multiplied with before backward, the GradScaler's scale apart. It matters
                only where it differs within a step: give ``samples`` itself for a loss that is a sum over samples.

        Raises:
            UsageError: There is not one backward pass inside, or a gradient is sparse.
        """
        if samples < 1 or not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"a micro-batch needs samples >= 1 and a finite weight > 0; got {samples} and {weight}.")
        self._announced += 1
        self._announced_samples += samples * self._ranks
        self._samples_seen += samples * self._ranks
        if not self._is_measured:
            yield
            return
        dropped_before = self._norms.dropped_count
        with self._norms.micro_batch(samples, weight):
            yield
        self._left_out["dropped"] += self._norms.dropped_count - dropped_before
        if self._scaler is not None:
            self._scale = self._scaler.scale(torch.ones((), dtype=torch.float32, device=self._device))

    def parts(self, *batch: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield the batch whole, or on a measured step of a single rank in two halves, each announced as a micro-batch.

        Args:
            batch: Tensors with one row a sample.

        Yields:
            The part's share of the samples, to multiply its mean loss with, and the part of each tensor.

        Raises:
            UsageError: The tensors differ in length, or a part was not sent through one backward pass.
        """
        sizes = {len(tensor) for tensor in batch}
        if len(sizes) != 1 or 0 in sizes:
            raise UsageError(f"the tensors of a batch must have the same number of rows, at least 1; got {[len(t) for t in batch]}.")
        size = sizes.pop()
        middle = (size + 1) // 2
        is_halved = self._is_measured and self._ranks == 1 and size > 1
        for start, stop in ((0, middle), (middle, size)) if is_halved else ((0, size),):
            share = (stop - start) / size
            with self.micro_batch(stop - start, weight=share):
                yield (share, *(tensor[start:stop] for tensor in batch))

    def forget_step(self) -> None:
        """Forget the micro-batches since the last optimizer step: their gradients were dropped, and they will be announced again."""
        self._samples_seen -= self._announced_samples
        self._announced = self._announced_samples = 0
        self._norms.restart()
        self._scale = None

    def count_samples(self, samples_seen: int) -> None:
        """Say how many samples all ranks have seen, this step's among them; until then ranks are taken to hold equal shares."""
        self._samples_seen = samples_seen
        self._announced_samples = 0

    @property
    def measures_next_step(self) -> bool:
        """Whether the next optimizer step is one of those that are measured."""
        return self._is_measured

    @property
    def noise_scale(self) -> NoiseScale:
        """Noise scale of the run so far with its 95 % interval; the last of its ``snapshots`` is the most recent part of the run.

        Reading it waits for the device; any rank may read it, and all get the same.
        """
        return fit_noise_stream(self.stream)

    def by_layer(self) -> dict[str, Estimate]:
        """Return the noise scale of each layer's gradient, by module name, in the order of the model."""
        return fit_layers(self.stream)

    @property
    def stream(self) -> NoiseStream:
        """What was measured so far, as a record; reading it waits for the device."""
        self._collect(wait=True)
        return NoiseStream(
            layers=self._layers,
            blocks=self._blocks.records(),
            samples_seen=self._samples_seen,
            batch_norm=self._batch_norm,
            non_finite_steps=self._left_out["non_finite"],
            single_steps=self._left_out["single"],
            dropped_steps=self._left_out["dropped"],
            inconsistent_steps=self._left_out["inconsistent"],
        )

    def state_dict(self) -> dict[str, object]:
        """Return what was measured, in plain numbers and lists (``torch.load(weights_only=True)`` reads it); call it between steps."""
        self._collect(wait=True)
        return {
            "version": _STATE_VERSION,
            "layers": list(self._layers),
            "step": self._step,
            "samples_seen": self._samples_seen,
            "left_out": dict(self._left_out),
            "blocks": self._blocks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; what this monitor had measured is dropped.

        Raises:
            UsageError: The state is of another model, or of another version.
        """
        if state.get("version") != _STATE_VERSION or state.get("layers") != list(self._layers):
            raise UsageError(
                f"a monitor's state must be of version {_STATE_VERSION} and of a model with the same layers; got version "
                f"{state.get('version')} and {len(state.get('layers') or ())} layers for {len(self._layers)}; start without it."
            )
        self._collect(wait=True)
        self._blocks = NoiseBlocks.from_state_dict(state["blocks"])
        self._left_out = dict(state["left_out"])
        self._step, self._samples_seen = state["step"], state["samples_seen"]
        self._announced = self._announced_samples = 0
        self._norms.restart()

    def close(self) -> None:
        """Stop measuring and leave model and optimizer as found; what was measured can still be read."""
        self._hook.remove()
        self._is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def _is_measured(self) -> bool:
        return self._is_open and self._step % self._every == 0

    def _before_step(self, _optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        if not self._announced:
            raise UsageError(
                "each optimizer step must follow a micro-batch that was announced; there was none since the last step; put backward() "
                "into `with monitor.micro_batch(len(batch)):`, or close() the monitor."
            )
        self._collect(wait=False)
        if self._is_measured:
            self._finish_step()
        self._announced = self._announced_samples = 0
        self._step += 1

    def _finish_step(self) -> None:
        """Send off the step's numbers: seven scalars, the norms of micro-batches, and apart from them those of the sum.

        Scalars: micro-batches, samples, the three sums of weights, whether the host found gradients changed, what was left over. All
        but the norms of the sum are added up over the ranks.
        """
        norms = self._norms
        known = [norms.micro_batch_count, norms.samples, norms.weight, norms.sq_weight, norms.sq_weight_per_sample]
        known.append(0.0 if norms.is_sum_of_micro_batches() else 1.0)
        sq_norm_sums, of_sum = norms.sq_norm_sums(), norms.sq_norms_of_sum()
        if self._scale is not None:
            sq_scale = self._scale.to(sq_norm_sums.dtype).square()
            sq_norm_sums, of_sum = sq_norm_sums / sq_scale, of_sum / sq_scale
        on_device = torch.tensor(known, dtype=sq_norm_sums.dtype, pin_memory=self._device.type == "cuda")
        on_device = on_device.to(self._device, non_blocking=True)
        summed = torch.cat([on_device, norms.left_over().reshape(1), sq_norm_sums])
        work = None
        if self._reducer is not None:
            work = torch.distributed.all_reduce(summed, group=self._reducer.process_group, async_op=True)
        self._reducing.append(_Reduction(summed, of_sum, work, self._samples_seen))
        norms.restart()
        self._scale = None

    def _collect(self, *, wait: bool) -> None:
        """Take in the measured steps whose numbers have arrived; with ``wait``, all of them."""
        while self._reducing:
            step = self._reducing.popleft()
            if step.work is not None:
                step.work.wait()  # begun a step ago or more; on CUDA the device waits, not the host
            self._late.put(torch.cat([step.summed, step.of_sum]))
            self._sent.append(step.samples_seen)
        for values in self._late.take(wait=wait):
            self._take_in(np.array(values), self._sent.popleft())

    def _take_in(self, values: FloatArray, samples_seen: int) -> None:
        micro_batches, samples, total, squares, per_sample, changed, left_over = values[:_SCALARS].tolist()
        sums, of_sum = (self._by_layer(row) for row in values[_SCALARS:].reshape(2, -1))
        if not np.isfinite(values).all():
            self._left_out["non_finite"] += 1
        elif changed or left_over:
            self._left_out["inconsistent"] += 1
        elif micro_batches < 2:
            self._left_out["single"] += 1
        else:
            weights = StepWeights(total, squares, per_sample)
            trace, sq_norm = step_moments(sums, of_sum, weights, dataset_size=self._dataset_size)
            self._blocks.add(MeasuredStep(trace, sq_norm, round(micro_batches), round(samples), samples_seen))

    def _by_layer(self, by_parameter: FloatArray) -> FloatArray:
        by_layer = np.zeros(len(self._layers))
        np.add.at(by_layer, self._layer_of, by_parameter)
        return by_layer


@dataclass(frozen=True)
class _Reduction:
    """Numbers of one step that the ranks are adding up."""

    summed: Tensor
    of_sum: Tensor
    work: torch.distributed.Work | None
    samples_seen: int


def _watched(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The model's parameters that the optimizer updates, by the name they have in the model the user wrote."""
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = _unwrapped(model).named_parameters()
    watched = {name: parameter for name, parameter in named if id(parameter) in updated and parameter.requires_grad}
    if not watched:
        raise UsageError("the optimizer must update parameters of the model; it has none of them; build it from model.parameters().")
    return watched


def _unwrapped(model: nn.Module) -> nn.Module:
    return list(layers_around(model))[-1]
