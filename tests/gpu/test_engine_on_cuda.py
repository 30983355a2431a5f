"""What only a real CUDA device can show; skipped, and said so, where there is none."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from cases import adam, images, plain_cnn
from rightbatch.engine.isolation import InProcessHost, OutOfMemory
from rightbatch.engine.meters import meters_for
from rightbatch.engine.nvml import other_gpu_processes
from rightbatch.engine.provenance import environment
from rightbatch.engine.rig import Rig, resolve_device
from rightbatch.engine.step import train_step
from rightbatch.probes import memory
from rightbatch.units import MIB
from rightbatch.workload.ingredients import Workload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]


def rig_on_cuda(**changes):
    ingredients = {"model": plain_cnn, "train": images(256), "loss": cross_entropy, "optimizer": adam} | changes
    device = resolve_device("cuda")
    return Rig(workload=Workload(**ingredients), device=device, meters=meters_for(device))


def test_the_meter_sees_reserved_bytes_and_forgets_them_at_the_next_start():
    meter = rig_on_cuda().meters.memory
    meter.start()
    held = torch.ones(64 * MIB // 4, device="cuda")
    assert 64 * MIB <= meter.peak_bytes() <= 66 * MIB
    del held
    meter.start()
    assert meter.peak_bytes() == 0


def test_the_clock_waits_for_kernels_that_are_still_running():
    rig = rig_on_cuda()
    matrix = torch.randn(4096, 4096, device="cuda")
    start_s = rig.meters.clock.now_s()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(20):
        matrix = matrix @ matrix / 4096
    ended.record()
    elapsed_s = rig.meters.clock.now_s() - start_s
    assert elapsed_s >= begun.elapsed_time(ended) / 1000


def test_the_trace_is_no_more_than_what_the_allocator_reserves():
    rig = rig_on_cuda()
    trace = memory.trace(rig)
    assert trace.recorded_on == "device", trace.remark
    traced = max(m.fixed_bytes + 256 * m.per_sample_bytes for m in trace.moments)
    point = memory.attempt(rig, 256, "touch", traced_bytes=traced, limit_bytes=2**60)
    assert point.used_bytes >= traced


def test_an_out_of_memory_is_an_outcome_and_the_next_step_runs():
    host = InProcessHost(rig_on_cuda, lambda line: None)

    def too_much(rig):
        return torch.empty(2**44, device="cuda")

    assert isinstance(host.call(too_much), OutOfMemory)
    assert host.call(memory.attempt, 8, "touch", traced_bytes=0, limit_bytes=2**60).value.used_bytes > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_runs_in_every_precision(precision):
    rig = rig_on_cuda(precision=precision)
    trainee = rig.new_trainee()
    result = train_step(trainee, [rig.real_batch(range(8)), rig.real_batch(range(8, 11))])
    assert torch.isfinite(result.mean_loss)
    assert result.samples == 11


def test_the_process_does_not_count_itself():
    rig = rig_on_cuda()
    assert other_gpu_processes(rig.device) == 0, "another process computes on this device, or NVML counts this one as foreign"


def test_the_environment_names_the_device():
    found = environment(rig_on_cuda(), "in-process")
    assert found.device_name == torch.cuda.get_device_name()
    assert found.device_total_bytes > 0
