"""What follows the batch size from step to step: the optimizer's settings by the schedule, and the scheduler by samples."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rightbatch.engine.learning_rate import multiply_setting
from rightbatch.records.schedule import BatchSetting
from rightbatch.training.batch_schedule import SettingSource


class Coupling:
    """Applies a schedule's factors to an optimizer for the length of a step, and steps a scheduler by samples.

    Between steps the optimizer's groups hold what the user or the scheduler set, so that any scheduler works and checkpoints hold no
    factor; each group keeps its own rate.

    Args:
        optimizer: Its groups are changed within ``applied``.
        schedule: Where the factors come from; none changes nothing.
        scheduler: A torch scheduler; none is stepped.
        step_samples: Samples after each of which the scheduler is stepped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: SettingSource | None, scheduler: Any, step_samples: int) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._step_samples = step_samples
        self.scheduler = scheduler

    def setting_at(self, samples_seen: int) -> BatchSetting | None:
        """Return what the next step trains with; none without a schedule."""
        return None if self._schedule is None else self._schedule.setting_at(samples_seen)

    @contextlib.contextmanager
    def applied(self, setting: BatchSetting | None) -> Iterator[None]:
        """Train with a setting's rate, betas and weight decay within; put back exactly what was there after."""
        if setting is None:
            yield
            return
        groups = self._optimizer.param_groups
        before = [{key: _kept(group[key]) for key in ("lr", "betas", "weight_decay") if key in group} for group in groups]
        try:
            multiply_setting(self._optimizer, "lr", setting.lr_factor)
            multiply_setting(self._optimizer, "weight_decay", setting.weight_decay_factor)
            for group in groups:
                if "betas" in group and setting.beta_power != 1.0:
                    group["betas"] = tuple(beta**setting.beta_power for beta in group["betas"])
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                for key, value in values.items():
                    _put_back(group, key, value)

    def advance(self, samples_before: int, samples_seen: int) -> None:
        """Step the scheduler once for each multiple of the step's samples that was passed."""
        if self.scheduler is None:
            return
        for _ in range(samples_seen // self._step_samples - samples_before // self._step_samples):
            with warnings.catch_warnings():
                # An infinity may have kept the optimizer from its first step: the scheduler goes by samples.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.scheduler.step()


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _put_back(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(value, Tensor):
        group[key].copy_(value)
    else:
        group[key] = value
