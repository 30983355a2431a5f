"""The search on a device of known capacity: the exact ceiling, few probes, its proof, and buckets that are held beside a step."""

import itertools
import statistics
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from fakes import DIMENSION, FakeDevice, planted_rig, planted_workload
from rightbatch.engine.isolation import InProcessHost, Killed, OutOfMemory
from rightbatch.engine.ranks import SingleRank
from rightbatch.engine.rig import Rig
from rightbatch.errors import UsageError, UserCodeError
from rightbatch.fits.memory import fit_memory
from rightbatch.probes import memory
from rightbatch.records.measurements import MemoryLimit, Outcome
from rightbatch.tuner.measuring import Measuring
from rightbatch.tuner.memory_search import MemorySearch
from rightbatch.tuner.request import Request, SilentProgress

CEILINGS = (7, 37, 200, 1000, 3000, 10_000)


def search(ceiling, *, certify=False, alternatives=False, bucket_bytes=0, train_size=30_000, clock_s=lambda: 0.0):
    device = FakeDevice(fixed_bytes=4000, bytes_per_sample=600, capacity_bytes=4000 + 600 * ceiling + 599)
    host = InProcessHost(planted_rig(device, planted_workload(device, torch.zeros(train_size, DIMENSION), lr=1e-9)), lambda line: None)
    workload = host.call(Rig.describe).value
    request = Request(certify=certify, alternatives=alternatives, isolation="in-process")
    limit, allocator = host.call(memory.limit, None).value
    run = MemorySearch(host=host, request=request, workload=workload, clock_s=clock_s, ranks=SingleRank(), bucket_bytes=bucket_bytes).run(
        limit, allocator, 100.0
    )
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


def test_a_touch_the_ceiling_and_its_proof_are_all_that_is_run_after_recording():
    for ceiling in CEILINGS:
        run = search(ceiling, certify=True)[1]
        assert [p.purpose for p in run.points] == ["touch", "approach", "proof"]


def test_without_use_measured_while_recording_probes_with_proof_are_still_few(monkeypatch):
    recorded = memory.trace
    monkeypatch.setattr(memory, "trace", lambda rig, **how: recorded(rig, **how).model_copy(update={"used_bytes": ()}))
    runs = [search(ceiling, certify=True)[1] for ceiling in CEILINGS]
    assert [fit_memory(run).ceiling for run in runs] == list(CEILINGS)
    assert statistics.median(len(run.points) for run in runs) <= 5
    assert max(len(run.points) for run in runs) <= 6


def test_time_that_is_over_makes_no_attempt_of_one_sample(monkeypatch):
    monkeypatch.setattr(memory, "trace", lambda rig, **how: memory.no_trace("It was given up."))
    run = search(37, clock_s=partial(next, itertools.count(0.0, 1000.0)))[1]
    assert [point.micro_batch_size for point in run.points] == [2]


@dataclass
class Script:
    """A host whose attempts end as they are told; everything else runs on a planted device."""

    host: InProcessHost
    endings: dict[str, object]
    renewals: int = 0

    def call(self, probe, *args, **kwargs):
        if getattr(probe, "func", None) is not memory.attempt or args[1] not in self.endings:
            return self.host.call(probe, *args, **kwargs)
        ending = self.endings.pop(args[1])
        if isinstance(ending, Exception):
            raise ending
        return ending

    def renew(self):
        self.renewals += 1

    def close(self):
        self.host.close()


def scripted(endings, *, once_a_process=False):
    device = FakeDevice(fixed_bytes=4000, bytes_per_sample=600, capacity_bytes=4000 + 600 * 1000)
    rig = planted_rig(device, planted_workload(device, torch.zeros(30_000, DIMENSION), lr=1e-9))
    host = Script(InProcessHost(rig, lambda line: None), endings)
    workload = host.call(Rig.describe).value
    limit = MemoryLimit(limit_bytes=device.capacity_bytes, source="device", once_a_process=once_a_process)
    search = MemorySearch(host=host, request=Request(certify=True), workload=workload, clock_s=lambda: 0.0, ranks=SingleRank())
    return host, search.run(limit, "planted", 100.0)


@pytest.mark.parametrize(
    ("ending", "outcome", "detail"),
    [
        (OutOfMemory("DefaultCPUAllocator: can't allocate memory"), Outcome.OUT_OF_MEMORY, "DefaultCPUAllocator: can't allocate memory"),
        (Killed("SIGKILL"), Outcome.KILLED, "killed by SIGKILL"),
    ],
)
def test_an_attempt_that_ran_out_or_was_killed_is_told_apart_and_the_search_goes_on_below(ending, outcome, detail):
    _, run = scripted({"approach": ending})
    failed = next(point for point in run.points if point.outcome is not Outcome.RAN)
    assert (failed.outcome, failed.detail, failed.used_bytes) == (outcome, detail, None)
    later = run.points[run.points.index(failed) + 1 :]
    assert later
    assert all(point.micro_batch_size < failed.micro_batch_size for point in later)
    assert run.stopped_by == "failure"
    assert len(run.points) <= 6


def test_a_bug_in_the_users_code_ends_the_search_as_one():
    with pytest.raises(UserCodeError, match="raised ZeroDivisionError"):
        scripted({"approach": UserCodeError("the workload's code raised ZeroDivisionError: x", "Traceback")})


@pytest.mark.parametrize("once", [True, False])
def test_a_mark_that_cannot_be_reset_takes_a_fresh_process_for_every_attempt(once):
    host, run = scripted({}, once_a_process=once)
    assert host.renewals == (len(run.points) if once else 0)


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
