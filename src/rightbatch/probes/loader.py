"""How many samples a second the data loader delivers, alone, for each number of workers."""

import os
from collections.abc import Iterator

from torch.utils.data import DataLoader

from rightbatch.engine.loader_workers import end_workers
from rightbatch.engine.meters import Clock
from rightbatch.engine.rig import Rig
from rightbatch.records.measurements import LoaderMeasurements, LoaderPoint
from rightbatch.workload.ingredients import Batch, sample_count

_BATCH_SIZE = 128
_TIMED_SAMPLES = 3
_BATCHES = 8
"""Batch times that one number of workers takes at least: its warm-up, shared among the workers, and one batch a round."""
_ROUNDS = 3
_LEAST_ROUND_S = 0.05
_MOST_ROUND_S = 0.7


def measure(rig: Rig, *, budget_s: float) -> LoaderMeasurements:
    """Time a shuffling loader over the training set with 0, 1, 2, ... workers, or with the workload's own number.

    Args:
        rig: The workload on its device.
        budget_s: Seconds for all numbers of workers together, their start included.
    """
    configured = rig.workload.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    numbers = [configured] if configured is not None else [number for number in (0, 1, 2, 4, 8, 16) if number <= cores]
    batch_size = _batch_size(rig, budget_s / len(numbers))
    points = []
    for number in numbers:
        rig.say(f"loading with {number} worker{'' if number == 1 else 's'}")
        points.append(_point(rig, number, batch_size, budget_s / len(numbers)))
    return LoaderMeasurements(points=tuple(points), configured_num_workers=configured)


def _batch_size(rig: Rig, budget_s: float) -> int:
    """128 samples, or as many as the batches of one number of workers may hold within the budget where samples are slow."""
    clock = rig.meters.clock
    times_s = []
    for index in range(min(_TIMED_SAMPLES, rig.train_size)):
        start_s = clock.now_s()
        rig.workload.train[index]
        times_s.append(clock.now_s() - start_s)
    affordable = budget_s / (_BATCHES * max(min(times_s), 1e-9))
    return max(1, min(_BATCH_SIZE, rig.train_size, int(affordable)))


def _point(rig: Rig, num_workers: int, batch_size: int, budget_s: float) -> LoaderPoint:
    """Return rounds of samples a second, the workers' start and the first batches left out."""
    clock = rig.meters.clock
    end_s = clock.now_s() + budget_s
    loader: DataLoader[object] = DataLoader(
        rig.workload.train,  # type: ignore[arg-type]  # a sized sequence is all a DataLoader needs
        batch_size=batch_size,
        shuffle=True,
        num_workers=num_workers,
        collate_fn=rig.workload.collate_fn,
        persistent_workers=num_workers > 0,
    )
    try:
        rates = _rates(clock, _forever(loader), warm_up=1 + 3 * num_workers, end_s=end_s)
    finally:
        end_workers(getattr(loader, "_iterator", None))
    return LoaderPoint(num_workers=num_workers, batch_size=batch_size, samples_per_s=rates)


def _rates(clock: Clock, stream: Iterator[Batch], *, warm_up: int, end_s: float) -> tuple[float, ...]:
    for _ in range(warm_up):
        next(stream)
    round_s = min(_MOST_ROUND_S, max(_LEAST_ROUND_S, (end_s - clock.now_s()) / _ROUNDS))
    rates = []
    for _ in range(_ROUNDS):
        start_s, samples, elapsed_s = clock.now_s(), 0, 0.0
        while elapsed_s < round_s:
            samples += sample_count(next(stream))
            elapsed_s = clock.now_s() - start_s
        rates.append(samples / elapsed_s)
    return tuple(rates)


def _forever(loader: "DataLoader[object]") -> Iterator[Batch]:
    while True:
        yield from loader
