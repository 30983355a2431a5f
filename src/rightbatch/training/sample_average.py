"""A moving average of weights that forgets by samples, not by steps."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rightbatch.errors import UsageError

Tensors = tuple[Tensor, ...] | list[Tensor]


class SampleAverage(nn.Module):
    """Exponential moving average of a model's weights with a half-life in samples, the same at every batch size.

    A step of b samples keeps 2**(-b / half_life_samples) of the average: a decay rho at steps of b0 samples becomes rho**(b / b0).
    Give it to ``Stepper(average=...)``, which says how many samples each step had; evaluate by calling it.

    Args:
        model: The model, not wrapped for ranks.
        half_life_samples: Samples after which a weight counts half. A decay rho at steps of b0 samples is b0 * log(1/2) / log(rho).
        use_buffers: Average buffers, such as BatchNorm's statistics, too; else they are copied.

    Raises:
        UsageError: The half-life is not positive.
    """

    def __init__(self, model: nn.Module, half_life_samples: float, *, use_buffers: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(half_life_samples) and half_life_samples > 0):
            raise UsageError(f"half_life_samples must be a positive number of samples; got {half_life_samples!r}.")
        self._half_life_samples = half_life_samples
        self._kept = 0.0
        self.averaged = AveragedModel(model, multi_avg_fn=self._blend, use_buffers=use_buffers)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the averaged model."""
        return self.averaged(*args, **kwargs)

    def count_samples(self, samples: int) -> None:
        """Say how many samples, over all ranks, the step has that the next update follows."""
        self._kept = 2.0 ** (-samples / self._half_life_samples)

    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.averaged.update_parameters(model)

    @torch.no_grad()
    def _blend(self, averages: Tensors, current: Tensors, _updates: Tensor | int) -> None:
        """Tensors come by type; counters among the buffers are copied."""
        if averages[0].is_floating_point() or averages[0].is_complex():
            torch._foreach_lerp_(averages, current, 1.0 - self._kept)
        else:
            torch._foreach_copy_(averages, current)
