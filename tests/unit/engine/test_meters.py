"""Meters see what training adds, forget it at a new start, and say how they measured; no device is needed."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from rightbatch.engine import meters
from rightbatch.engine.meters import CpuMemoryMeter, CudaMemoryMeter, DeviceClock, capped, measure_contention, meters_for
from rightbatch.units import GIB, MIB

CUDA = torch.device("cuda", 1)


def test_the_cpu_meter_sees_an_allocation_and_forgets_it_at_the_next_start():
    meter = CpuMemoryMeter()
    meter.start()
    held = torch.ones(200 * MIB // 4)
    seen = meter.peak_bytes()
    assert 199 * MIB < seen < 260 * MIB
    del held
    assert meter.peak_bytes() > 199 * MIB
    meter.start()
    assert meter.peak_bytes() < 40 * MIB


def test_what_was_held_before_the_start_is_not_counted():
    held = torch.ones(100 * MIB // 4)
    meter = CpuMemoryMeter()
    meter.start()
    assert meter.peak_bytes() < 40 * MIB
    assert held.sum() > 0


def test_the_cpu_meter_resets_the_mark_and_says_so(tmp_path):
    (tmp_path / "clear_refs").write_text("")
    meter = CpuMemoryMeter(tmp_path)
    assert meter.description.endswith("peak resident set of each probe")
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_a_mark_that_cannot_be_reset_is_said_to_be_the_whole_processs(tmp_path):
    meter = CpuMemoryMeter(tmp_path / "absent")
    assert meter.description.endswith("peak resident set of the whole process")


def test_without_a_reset_the_mark_of_the_kernel_still_counts(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t 9000 kB\nVmHWM:\t 5000 kB\nVmRSS:\t 4000 kB\n")
    (tmp_path / "clear_refs").mkdir()
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3000 * 1024)))
    meter = CpuMemoryMeter(tmp_path)
    meter.start()
    assert meter.peak_bytes() == 2000 * 1024
    assert "whole process" in meter.description


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_the_kernels_files_the_resource_usage_counts_in_the_platforms_unit(tmp_path, monkeypatch, platform, unit):
    monkeypatch.setattr(meters.sys, "platform", platform)
    monkeypatch.setattr(meters.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7000))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1000 * unit)))
    meter = CpuMemoryMeter(tmp_path)
    meter.start()
    assert meter.peak_bytes() == 6000 * unit


def test_a_peak_below_the_baseline_is_zero(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("VmHWM:\t 10 kB\n")
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB)))
    meter = CpuMemoryMeter(tmp_path)
    meter.start()
    assert meter.peak_bytes() == 0


def test_the_clock_waits_for_the_device_before_it_reads(monkeypatch):
    order = []
    monkeypatch.setattr(meters.time, "perf_counter", lambda: order.append("read") or 5.0)
    assert DeviceClock(lambda: order.append("wait")).now_s() == 5.0
    assert order == ["wait", "read"]


def test_a_clock_without_a_device_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(meters.time, "perf_counter", lambda: 7.0)
    assert DeviceClock(None).now_s() == 7.0


class FakeCuda:
    """The counters of a caching allocator."""

    def __init__(self) -> None:
        self.reserved = 300 * MIB
        self.peak = 900 * MIB
        self.cached = 100 * MIB
        self.free = 8 * GIB
        self.calls: list[str] = []

    def synchronize(self, device):
        assert device == CUDA
        self.calls.append("synchronize")

    def empty_cache(self):
        self.reserved -= self.cached
        self.free += self.cached
        self.cached = 0
        self.calls.append("empty_cache")

    def reset_peak_memory_stats(self, device):
        self.peak = self.reserved
        self.calls.append("reset")

    def memory_reserved(self, device):
        return self.reserved

    def max_memory_reserved(self, device):
        self.calls.append("read peak")
        return self.peak

    def mem_get_info(self, device):
        return self.free, 16 * GIB

    def get_allocator_backend(self):
        return "native"


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "memory_reserved", "max_memory_reserved", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", fake.get_allocator_backend)
    return fake


def test_the_cuda_meter_counts_reserved_bytes_above_those_left_after_emptying_the_cache(cuda):
    meter = CudaMemoryMeter(CUDA)
    meter.start()
    assert cuda.calls == ["synchronize", "empty_cache", "reset"]
    assert meter.peak_bytes() == 0
    cuda.peak = 700 * MIB
    assert meter.peak_bytes() == 500 * MIB
    assert cuda.calls[-2:] == ["synchronize", "read peak"]


def test_the_cuda_limit_is_what_is_free_less_a_hundredth_of_the_device(cuda):
    limit = CudaMemoryMeter(CUDA).limit(None)
    headroom = 16 * GIB // 100
    assert (limit.source, limit.headroom_bytes) == ("device", headroom)
    assert limit.limit_bytes == 8 * GIB + 100 * MIB - headroom


def test_a_request_lowers_the_cuda_limit_but_never_raises_it(cuda):
    meter = CudaMemoryMeter(CUDA)
    assert (meter.limit(GIB).source, meter.limit(GIB).limit_bytes) == ("--limit", GIB)
    assert meter.limit(32 * GIB).source == "device"


def test_the_cuda_meter_names_its_allocator(cuda):
    assert CudaMemoryMeter(CUDA).description == "cuda, caching allocator (native); peak reserved bytes"


def test_meters_of_a_cuda_device_ask_about_that_device(cuda, monkeypatch):
    asked = []
    monkeypatch.setattr(meters, "nvml_energy_meter", asked.append)
    monkeypatch.setattr(meters, "other_gpu_processes", lambda device: asked.append(device) or 0)
    made = meters_for(CUDA)
    made.contention()
    made.clock.now_s()
    assert asked == [CUDA, CUDA]
    assert cuda.calls == ["synchronize"]


def test_the_cpu_has_no_energy_meter():
    assert meters_for(torch.device("cpu")).energy is None


@pytest.fixture
def quiet_machine(monkeypatch):
    """A machine of 4 cores whose clocks the test moves; returns what others and this process burn in the window."""
    burnt = {"others_s": 0.0, "own_s": 0.0, "slept_s": 0.0}

    def sleep(seconds):
        burnt["slept_s"] += seconds

    monkeypatch.setattr(meters.time, "sleep", sleep)
    monkeypatch.setattr(meters.time, "perf_counter", lambda: burnt["slept_s"])
    monkeypatch.setattr(meters.time, "process_time", lambda: burnt["own_s"] if burnt["slept_s"] else 0.0)
    total = lambda: (burnt["own_s"] + burnt["others_s"]) if burnt["slept_s"] else 0.0  # noqa: E731
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(user=total(), system=0.0))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1.5, 0.0, 0.0))
    return burnt


def test_a_quiet_machine_gives_no_reason(quiet_machine):
    quiet_machine["own_s"] = 0.3
    contention = measure_contention(window_s=0.3)
    assert (contention.other_processes_cpu, contention.reasons) == (pytest.approx(0.0), ())
    assert (contention.load_average_1m, contention.cpu_count, contention.other_gpu_processes) == (1.5, 4, 0)


def test_busy_cores_of_others_are_a_reason(quiet_machine):
    quiet_machine.update(own_s=0.3, others_s=0.45)
    contention = measure_contention(window_s=0.3)
    assert contention.other_processes_cpu == pytest.approx(1.5)
    assert contention.reasons == ("Other processes keep 1.5 of 4 processor cores busy.",)


@pytest.mark.parametrize(("count", "sentence"), [(1, "1 other process computes on the GPU."), (3, "3 other processes compute on the GPU.")])
def test_processes_of_others_on_the_gpu_are_a_reason(quiet_machine, monkeypatch, count, sentence):
    monkeypatch.setattr(meters, "other_gpu_processes", lambda device: count)
    contention = measure_contention(CUDA)
    assert contention.other_gpu_processes == count
    assert contention.reasons == (sentence,)


@pytest.fixture
def fake_cuda(monkeypatch):
    """A device of 1000 bytes of which the allocator holds 100; notes every share that the process is allowed."""
    allowed, stats = [], {"num_alloc_retries": 3}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: allowed.append(share))
    return allowed, stats


def test_a_cap_leaves_the_allocator_the_limit_beside_what_it_has_and_is_lifted(fake_cuda):
    allowed, stats = fake_cuda
    with capped(torch.device("cuda"), 400) as has_retried:
        assert allowed == [0.5]
        assert not has_retried()
        stats["num_alloc_retries"] += 1
        assert has_retried()
    assert allowed == [0.5, 1.0]


def test_a_cap_is_lifted_after_an_error_and_never_more_than_the_device(fake_cuda):
    allowed, _ = fake_cuda
    with pytest.raises(torch.OutOfMemoryError), capped(torch.device("cuda"), 2000):
        raise torch.OutOfMemoryError
    assert allowed == [1.0, 1.0]


def test_a_cap_does_nothing_on_a_cpu(fake_cuda):
    allowed, _ = fake_cuda
    with capped(torch.device("cpu"), 400) as has_retried:
        assert not has_retried()
    assert allowed == []
