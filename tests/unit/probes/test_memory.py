"""Attempts measure the peak of two steps against the limit; the limit is taken before anything is built."""

import contextlib

import pytest
import torch

from fakes import DIMENSION, FakeDevice, planted_rig, planted_workload
from rightbatch.engine.isolation import InProcessHost, OutOfMemory
from rightbatch.probes import memory
from rightbatch.records.measurements import Outcome


def rig_on(device):
    return planted_rig(device, planted_workload(device, torch.zeros(100, DIMENSION), lr=1e-9))()


@pytest.mark.parametrize(("limit_bytes", "outcome"), [(10_000, Outcome.RAN), (9_999, Outcome.OVER_LIMIT)])
def test_an_attempt_compares_its_peak_with_the_limit(limit_bytes, outcome):
    device = FakeDevice(fixed_bytes=4000, bytes_per_sample=600, fixed_time_s=0.5, samples_per_s=1e9)
    point = memory.attempt(rig_on(device), 10, "approach", traced_bytes=77, limit_bytes=limit_bytes)
    assert (point.micro_batch_size, point.purpose, point.outcome) == (10, "approach", outcome)
    assert (point.used_bytes, point.traced_bytes) == (10_000, 77)
    assert point.step_time_s == pytest.approx(0.5)


def test_an_attempt_may_be_larger_than_the_dataset():
    device = FakeDevice()
    assert memory.attempt(rig_on(device), 250, "touch", traced_bytes=0, limit_bytes=2**40).outcome is Outcome.RAN
    assert device.largest_run == 250


def test_an_attempt_that_does_not_fit_is_an_outcome_of_the_host():
    device = FakeDevice(capacity_bytes=9_999)
    host = InProcessHost(lambda: rig_on(device), lambda line: None)
    outcome = host.call(memory.attempt, 10, "approach", traced_bytes=0, limit_bytes=2**40)
    assert outcome == OutOfMemory("planted device: tried to hold 10000 of 9999 bytes")


def test_the_limit_is_the_devices_unless_less_is_asked_for():
    device = FakeDevice(capacity_bytes=5000)
    assert memory.limit(rig_on(device), None)[0].limit_bytes == 5000
    limit, description = memory.limit(rig_on(device), 3000)
    assert (limit.limit_bytes, description) == (3000, "planted device")


@pytest.mark.parametrize(
    ("purpose", "retries", "outcome"), [("proof", True, Outcome.OVER_LIMIT), ("proof", False, Outcome.RAN), ("approach", True, Outcome.RAN)]
)
def test_a_proof_that_runs_on_a_freed_cache_alone_shows_that_the_size_does_not_fit(monkeypatch, purpose, retries, outcome):
    caps = []

    @contextlib.contextmanager
    def capped(device, limit_bytes):
        caps.append(limit_bytes)
        yield lambda: retries

    monkeypatch.setattr(memory, "capped", capped)
    point = memory.attempt(rig_on(FakeDevice()), 10, purpose, traced_bytes=0, limit_bytes=2**40)
    assert (point.outcome, caps) == (outcome, [2**40] if purpose == "proof" else [])
    assert ("freed its cache" in point.detail) is (outcome is Outcome.OVER_LIMIT)


def test_no_trace_says_why():
    trace = memory.no_trace("Memory ran out.")
    assert (trace.recorded_on, trace.moments, trace.consistent, trace.remark) == ("none", (), False, "Memory ran out.")
