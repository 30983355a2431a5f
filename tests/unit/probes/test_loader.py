"""The loader probe times real loaders, and a dataset that fails in a worker is the user's error, never a hang."""

import os

import psutil
import pytest
import torch

from cases import rig_of, vectors
from fakes import DIMENSION, FakeDevice, planted_rig, planted_workload
from rightbatch.engine.isolation import InProcessHost
from rightbatch.errors import UserCodeError
from rightbatch.probes import loader
from rightbatch.workload.ingredients import Workload


def workload_of(train, **changes):
    ingredients = {"model": lambda: torch.nn.Linear(6, 3), "train": train, "loss": torch.nn.functional.cross_entropy} | changes
    return Workload(**ingredients)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_configured_number_of_workers_is_the_only_one_timed(workers):
    measured = loader.measure(rig_of(workload_of(vectors(40), num_workers=workers)), budget_s=0.15)
    assert measured.configured_num_workers == workers
    (point,) = measured.points
    assert (point.num_workers, point.batch_size, len(point.samples_per_s)) == (workers, 40, 3)


def test_without_a_configured_number_those_the_cores_allow_are_timed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    measured = loader.measure(rig_of(workload_of(vectors(40))), budget_s=0.3)
    assert measured.configured_num_workers is None
    assert [point.num_workers for point in measured.points] == [0, 1]


def test_the_rate_is_the_planted_one():
    device = FakeDevice(load_time_s=0.002)
    rig = planted_rig(device, planted_workload(device, torch.zeros(300, DIMENSION)))()
    (point,) = loader.measure(rig, budget_s=30.0).points
    assert point.samples_per_s == pytest.approx([500.0] * 3)


def test_a_small_last_batch_counts_its_own_samples():
    device = FakeDevice(load_time_s=0.001)
    rig = planted_rig(device, planted_workload(device, torch.zeros(129, DIMENSION)))()
    (point,) = loader.measure(rig, budget_s=30.0).points
    assert point.samples_per_s == pytest.approx([1000.0] * 3)


def test_batches_are_made_by_the_workloads_collate_function():
    seen = []

    def collate(samples):
        seen.append(len(samples))
        return {"x": torch.stack([x for x, _ in samples])}

    loader.measure(rig_of(workload_of(vectors(300), num_workers=0, collate_fn=collate)), budget_s=0.15)
    assert set(seen) == {128, 300 - 2 * 128}


class Failing:
    """A dataset with a broken sample."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 17:
            raise FileNotFoundError("image 17 is missing")
        return torch.zeros(6), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_fails_is_the_users_error(workers):
    host = InProcessHost(lambda: rig_of(workload_of(Failing(), num_workers=workers)), lambda line: None)
    with pytest.raises(UserCodeError, match="raised FileNotFoundError") as caught:
        host.call(loader.measure, budget_s=0.15)
    assert "image 17 is missing" in str(caught.value)
    assert "__getitem__" in caught.value.user_traceback


def test_no_worker_outlives_the_probe_even_after_an_error():
    before = {process.pid for process in psutil.Process().children()}
    with pytest.raises(FileNotFoundError) as caught:
        loader.measure(rig_of(workload_of(Failing(), num_workers=1)), budget_s=0.15)
    after = {process.pid for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE}
    assert caught.value is not None
    assert after <= before


def test_slow_samples_are_loaded_in_batches_that_the_budget_holds():
    device = FakeDevice(load_time_s=0.5)
    rig = planted_rig(device, planted_workload(device, torch.zeros(300, DIMENSION)))()
    (point,) = loader.measure(rig, budget_s=16.0).points
    assert point.batch_size == 4
    assert point.samples_per_s == pytest.approx([2.0] * 3)
    assert device.now < 2 * 16.0
