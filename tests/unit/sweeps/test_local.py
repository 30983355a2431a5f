"""Which GPU a trial on this machine gets, and what its own process calls it."""

import threading
from dataclasses import dataclass

import pytest

from rightbatch.errors import UsageError
from rightbatch.sweeps.executors import ExecutorSetting, local, packed


@dataclass
class Opened:
    """What an executor would have been opened with."""

    slots: list[dict[str, str]]
    device: str | None = None


@pytest.fixture
def open_with(monkeypatch):
    def opened(device, *, gpus=("4", "6"), jobs=None):
        monkeypatch.setattr(local, "visible_gpus", lambda: gpus)
        monkeypatch.setattr(local, "LocalExecutor", Opened)
        return local.open_executor(ExecutorSetting(device=device, jobs=jobs))

    return opened


def test_a_named_gpu_is_the_only_one_that_its_trials_see_so_that_they_call_it_cuda(open_with):
    assert open_with("cuda:1") == Opened([{"CUDA_VISIBLE_DEVICES": "6"}], device="cuda")
    assert open_with("cuda:0", jobs=3) == Opened([{"CUDA_VISIBLE_DEVICES": "4"}], device="cuda")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_without_a_number_every_gpu_gets_trials_that_call_it_as_the_user_does(open_with, device):
    assert open_with(device) == Opened([{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}])
    assert open_with(device, jobs=1) == Opened([{"CUDA_VISIBLE_DEVICES": "4"}])


def test_where_no_gpu_can_be_told_apart_the_device_stays_as_it_was_named(open_with):
    assert open_with("cuda:1", gpus=(), jobs=2) == Opened([{}, {}])


@pytest.mark.parametrize(
    ("device", "gpus", "advice"), [("cuda:2", ("4", "6"), "cuda:0 to cuda:1, or cpu"), ("cuda:1", ("4",), "cuda:0, or cpu")]
)
def test_a_gpu_that_is_not_here_is_refused_with_those_that_are(open_with, device, gpus, advice):
    with pytest.raises(UsageError, match=f"must name a GPU of this machine; got {device}; use {advice}"):
        open_with(device, gpus=gpus)


def test_a_workload_that_cannot_be_pickled_is_refused_with_what_to_do():
    with pytest.raises(UsageError, match=r"must be picklable .* cannot pickle '_thread.lock' object; .* or give it as 'FILE.py:FUNCTION'"):
        packed(print, threading.Lock())
