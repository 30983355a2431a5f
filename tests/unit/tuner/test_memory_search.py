"""The search on a device of known capacity: the exact ceiling, few probes, its proof, and buckets that are held beside a step."""

import statistics
from dataclasses import replace

import pytest
import torch

from fakes import DIMENSION, FakeDevice, planted_rig, planted_workload
from rightbatch.engine.isolation import InProcessHost
from rightbatch.engine.ranks import SingleRank
from rightbatch.engine.rig import Rig
from rightbatch.errors import UsageError
from rightbatch.fits.memory import fit_memory
from rightbatch.probes import memory
from rightbatch.records.measurements import Outcome
from rightbatch.tuner.measuring import Measuring
from rightbatch.tuner.memory_search import MemorySearch
from rightbatch.tuner.request import Request, SilentProgress

CEILINGS = (7, 37, 200, 1000, 3000, 10_000)


def search(ceiling, *, certify=False, alternatives=False, bucket_bytes=0, train_size=30_000):
    device = FakeDevice(fixed_bytes=4000, bytes_per_sample=600, capacity_bytes=4000 + 600 * ceiling + 599)
    host = InProcessHost(planted_rig(device, planted_workload(device, torch.zeros(train_size, DIMENSION), lr=1e-9)), lambda line: None)
    workload = host.call(Rig.describe).value
    request = Request(certify=certify, alternatives=alternatives, isolation="in-process")
    limit, allocator = host.call(memory.limit, None).value
    run = MemorySearch(
        host=host, request=request, workload=workload, clock_s=lambda: 0.0, ranks=SingleRank(), bucket_bytes=bucket_bytes
    ).run(limit, allocator, 100.0)
    return device, run


@pytest.mark.parametrize("ceiling", CEILINGS)
def test_the_ceiling_of_a_device_that_counts_every_byte_is_exact_without_running_out(ceiling):
    device, run = search(ceiling)
    assert fit_memory(run).ceiling == ceiling
    assert device.out_of_memory_errors == 0
    assert fit_memory(run).certificate is None


@pytest.mark.parametrize("ceiling", CEILINGS)
def test_a_proof_fails_one_sample_above_the_ceiling(ceiling):
    device, run = search(ceiling, certify=True)
    certificate = fit_memory(run).certificate
    assert (certificate.micro_batch_size, certificate.outcome, certificate.holds) == (ceiling + 1, Outcome.OUT_OF_MEMORY, True)
    assert device.out_of_memory_errors == 1
    assert fit_memory(run).ceiling == ceiling


def test_probes_with_proof_are_few():
    counts = [len(search(ceiling, certify=True)[1].points) for ceiling in CEILINGS]
    assert statistics.median(counts) <= 5
    assert max(counts) <= 6


def test_nothing_is_proved_where_the_dataset_ends_the_search():
    device, run = search(200, certify=True, train_size=100)
    assert (fit_memory(run).ceiling, fit_memory(run).certificate) == (100, None)
    assert device.out_of_memory_errors == 0


def test_side_traces_are_kept_and_alternatives_only_when_asked_for():
    assert search(37)[1].alternatives == ()
    run = search(37, alternatives=True)[1]
    assert {other.change for other in run.alternatives} >= {"adam", "sgd with momentum"}
    assert run.accumulation_trace.moments
    assert run.evaluation_trace.moments
    curve = fit_memory(run)
    assert curve.accumulation_ceiling <= curve.ceiling < curve.evaluation_ceiling
    assert {other.change for other in curve.alternatives} == {other.change for other in run.alternatives}


def test_the_peak_is_attributed_to_kinds_and_modules():
    curve = fit_memory(search(1000)[1])
    assert {share.name for share in curve.shares} >= {"parameters", "inputs"}
    assert sum(holder.size_bytes for holder in curve.holders) <= sum(share.size_bytes for share in curve.shares)
    assert curve.holders[0].size_bytes == max(holder.size_bytes for holder in curve.holders)


def test_buckets_are_recorded_and_added_to_what_is_traced():
    alone, beside = search(37)[1], search(37, bucket_bytes=4096)[1]
    size = alone.points[0].micro_batch_size
    assert (beside.bucket_bytes, beside.world_size) == (4096, 1)
    assert next(p for p in beside.points if p.micro_batch_size == size).traced_bytes == alone.points[0].traced_bytes + 4096


def test_tight_malloc_needs_a_process_of_its_own():
    request = replace(Request(isolation="in-process"), malloc="tight")
    with pytest.raises(UsageError, match="MALLOC_MMAP_THRESHOLD_=65536"):
        Measuring(lambda: None, request, SilentProgress(), lambda: 0.0)
