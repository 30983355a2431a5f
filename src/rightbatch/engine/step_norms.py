"""Square norms of the gradients that one optimizer step adds up: of each micro-batch's, and of their sum."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rightbatch.engine.gradients import as_real
from rightbatch.errors import UsageError


class StepNorms:
    """Norms by parameter, left on the device.

    A micro-batch's own gradient is seen by hooks on the parameters just before it is added to ``.grad`` (and before any reduction over
    ranks); the sum is read from ``.grad`` once backward is over, thus before clipping. The hooks exist only inside ``micro_batch``.

    Args:
        parameters: By name. They, and their gradients, must be whole and dense.
        reducer: The module that averages gradients over ranks; none on a single rank.

    Attributes:
        dropped_count: Steps so far whose gradients were cleared without an optimizer step.
        micro_batch_count: Micro-batches of this rank so far.
        samples: Sum of m_k.
        weight: Sum of w_k.
        sq_weight: Sum of w_k**2.
        sq_weight_per_sample: Sum of w_k**2 / m_k.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], reducer: DistributedDataParallel | None = None) -> None:
        self._names = tuple(parameters)
        self._parameters = tuple(parameters.values())
        self._reducer = reducer
        self._hooks = tuple(partial(self._see, index) for index in range(len(self._parameters)))
        self._device = self._parameters[0].device
        is_double = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in self._parameters)
        self._norm_dtype = torch.float64 if is_double else torch.float32
        self._sum_dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._absent = torch.zeros((), dtype=self._norm_dtype, device=self._device)
        self._is_spread = len({parameter.device for parameter in self._parameters}) > 1
        self.dropped_count = 0
        self.restart()

    def restart(self) -> None:
        """Forget the step's micro-batches."""
        self.micro_batch_count = 0
        self.samples = 0
        self.weight = 0.0
        self.sq_weight = 0.0
        self.sq_weight_per_sample = 0.0
        self._unknown_change = False
        self._is_reduced = True
        self._current: dict[int, Tensor] = {}
        self._left_over: list[Tensor] = []
        self._state: tuple[tuple[int, int], ...] = ()
        self._sq_norm_sums = torch.zeros(len(self._parameters), dtype=self._sum_dtype, device=self._device)
        self._sq_norms_of_sum = torch.zeros_like(self._sq_norm_sums)

    @contextlib.contextmanager
    def micro_batch(self, samples: int, weight: float) -> Iterator[None]:
        """Watch the one backward pass that runs inside.

        If gradients were dropped since the last micro-batch, so was the step they belonged to, and this is the first one of another.

        Args:
            samples: m_k.
            weight: w_k, what the mean loss of these samples was multiplied with.

        Raises:
            UsageError: No backward pass ran inside, or two did, or a gradient is sparse.
        """
        if self.micro_batch_count and all(parameter.grad is None for parameter in self._parameters):
            self.dropped_count += 1
            self.restart()
        self._unknown_change |= bool(self._state) and self._state != self._gradient_state()
        self._current = {}
        handles = [p.register_hook(hook) for p, hook in zip(self._parameters, self._hooks, strict=True) if p.requires_grad]  # type: ignore[no-untyped-call]
        try:
            yield
        except BaseException:
            self._unknown_change = True
            raise
        finally:
            for handle in handles:
                handle.remove()
        if not self._current:
            raise UsageError(
                "a micro_batch block must hold the backward pass; none of the gradients arrived inside; put backward() into it."
            )
        self._add(samples, weight)

    def _see(self, index: int, gradient: Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise UsageError(f"gradients must be dense; that of {self._names[index]} is sparse; build its layer with sparse=False.")
        if index in self._current:
            raise UsageError(
                f"a micro_batch block must hold one backward pass; {self._names[index]} received two gradients; "
                "add the losses up and call backward() once."
            )
        self._current[index] = self._norm(gradient)
        before = self._parameters[index].grad
        if before is not None and self.micro_batch_count == 0:
            self._left_over.append(self._norm(before))
        if self._reducer is not None:
            self._is_reduced = self._reducer.require_backward_grad_sync

    def _norm(self, gradient: Tensor) -> Float[Tensor, ""]:
        norm: Tensor = torch.linalg.vector_norm(as_real(gradient.detach()), dtype=self._norm_dtype)
        return norm

    def _add(self, samples: int, weight: float) -> None:
        self._sq_norm_sums += self._squares(self._current)
        self.micro_batch_count += 1
        self.samples += samples
        self.weight += weight
        self.sq_weight += weight**2
        self.sq_weight_per_sample += weight**2 / samples
        self._state = self._gradient_state()
        if self.micro_batch_count > 1 or self._reducer is not None:
            held = {index: as_real(parameter.grad) for index, parameter in enumerate(self._parameters) if parameter.grad is not None}
            norms = torch._foreach_norm(list(held.values()), 2, self._norm_dtype)  # noqa: SLF001  # what torch's own clipping calls
            self._sq_norms_of_sum = self._squares(dict(zip(held, norms, strict=True)))
        self._current = {}

    def _squares(self, norms: dict[int, Tensor]) -> Float[Tensor, " param"]:
        whole = [norms.get(index, self._absent) for index in range(len(self._parameters))]
        if self._is_spread:
            whole = [norm.to(self._device, non_blocking=True) for norm in whole]
        return torch.stack(whole).to(self._sum_dtype).square_()

    def _gradient_state(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever a gradient is written to or replaced."""
        return tuple((id(p.grad), 0 if p.grad is None else p.grad._version) for p in self._parameters)  # noqa: SLF001  # torch's documented counter

    def is_sum_of_micro_batches(self) -> bool:
        """Whether, as far as the host can tell, ``.grad`` was written to by the micro-batches alone, and reduced over the ranks."""
        return not self._unknown_change and self._is_reduced

    def sq_norm_sums(self) -> Float[Tensor, " param"]:
        """Sum over this rank's micro-batches of the square norm of each parameter's gradient."""
        return self._sq_norm_sums

    def sq_norms_of_sum(self) -> Float[Tensor, " param"]:
        """Square norm of each parameter's gradient summed over the micro-batches, of all ranks where they are averaged."""
        ranks = 1 if self._reducer is None else self._reducer.process_group.size()
        return self._sq_norms_of_sum * ranks**2 if self.micro_batch_count > 1 or self._reducer is not None else self._sq_norm_sums

    def left_over(self) -> Float[Tensor, ""]:
        """Norm of what ``.grad`` held before the first micro-batch; not zero when it had not been cleared."""
        norms: Sequence[Tensor] = [norm.to(self._device) for norm in self._left_over]
        return torch.stack(list(norms)).to(self._sum_dtype).sum() if norms else torch.zeros((), dtype=self._sum_dtype, device=self._device)
