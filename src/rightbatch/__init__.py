"""What batch size, split how, with which learning rate: answered by measurement, for your model, data, device and goal.

>>> import rightbatch as rb
>>> plan = rb.find(rb.Workload(model=Net, train=dataset, loss=F.cross_entropy))  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

from rightbatch._version import __version__
from rightbatch.errors import RightbatchError, RightbatchWarning

if TYPE_CHECKING:
    from rightbatch.api import FoundPlan, find, train
    from rightbatch.api_sweep import sweep
    from rightbatch.records.plan import BatchPlan, Findings, Goal
    from rightbatch.training.batch_schedule import DynamicBatch
    from rightbatch.training.loader import BatchLoader
    from rightbatch.training.monitor import NoiseMonitor
    from rightbatch.training.stepper import Stepper
    from rightbatch.workload.ingredients import Workload

__all__ = [
    "BatchLoader",
    "BatchPlan",
    "DynamicBatch",
    "Findings",
    "FoundPlan",
    "Goal",
    "NoiseMonitor",
    "RightbatchError",
    "RightbatchWarning",
    "Stepper",
    "Workload",
    "__version__",
    "find",
    "sweep",
    "train",
]

_HOMES = {
    "BatchLoader": "rightbatch.training.loader",
    "BatchPlan": "rightbatch.records.plan",
    "DynamicBatch": "rightbatch.training.batch_schedule",
    "Findings": "rightbatch.records.plan",
    "FoundPlan": "rightbatch.api",
    "Goal": "rightbatch.records.plan",
    "NoiseMonitor": "rightbatch.training.monitor",
    "Stepper": "rightbatch.training.stepper",
    "Workload": "rightbatch.workload.ingredients",
    "find": "rightbatch.api",
    "sweep": "rightbatch.api_sweep",
    "train": "rightbatch.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
