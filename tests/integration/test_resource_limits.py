"""``rightbatch memory`` inside a real limit of the kernel: it counts what the limit counts, and its answer runs there."""

import json
import os
import resource
import subprocess
import sys

import pytest

from rightbatch.units import MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")

WIDE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import rightbatch as rb


def workload():
    data = TensorDataset(torch.zeros(60_000, 8), torch.zeros(60_000, dtype=torch.long))
    model = lambda: nn.Sequential(nn.Linear(8, 2048), nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Linear(2048, 2))
    return rb.Workload(model=model, train=data, loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), num_workers=0)
"""
ROOM_BYTES = 400 * MIB


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def held_by_an_idle_child(folder, counter):
    """Bytes that the kernel counts for a process that has loaded torch and the workload."""
    code = "import train, torch; train.workload(); print(open('/proc/self/status').read())"
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, check=True)
    return next(int(line.split()[1]) * 1024 for line in ended.stdout.splitlines() if line.startswith(counter))


@pytest.mark.slow
def test_a_ceiling_within_a_real_limit_on_address_space_is_measured_in_address_space(tmp_path):
    (tmp_path / "train.py").write_text(WIDE)
    limit_bytes = ROOM_BYTES + held_by_an_idle_child(tmp_path, "VmSize")
    command = [sys.executable, "-m", "rightbatch", "memory", "train.py:workload", "--budget", "5m", "--json", "--out", "run"]
    set_limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))  # noqa: E731
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, preexec_fn=set_limit)
    assert ended.returncode == 0, ended.stderr
    memory = json.loads(ended.stdout)["memory"]
    assert (memory["limit"]["source"], memory["limit"]["headroom_bytes"]) == ("RLIMIT_AS", 0)
    assert memory["limit"]["limit_bytes"] < ROOM_BYTES + 64 * MIB
    assert "peak address space" in memory["allocator"]
    assert memory["ceiling"] < 60_000
    ran = {point["micro_batch_size"]: point["used_bytes"] for point in memory["points"] if point["outcome"] == "ran"}
    assert memory["ceiling"] == max(ran)
    # What malloc maps varies: the ceiling's own step may take less than a smaller one's that came near the limit.
    assert 0.7 * memory["limit"]["limit_bytes"] < max(ran.values()) <= memory["limit"]["limit_bytes"]


PRIVATE = """
import resource, torch
from rightbatch.engine.meters import meters_for
from rightbatch.engine.out_of_memory import is_out_of_memory

held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (held + 300 * 2**20,) * 2)
meter = meters_for(torch.device("cpu")).memory
limit = meter.limit(None)
meter.start()
torch.empty(200 * 2**20, dtype=torch.uint8)
peak_bytes = meter.peak_bytes()
try:
    torch.empty(400 * 2**20, dtype=torch.uint8)
    refused = False
except RuntimeError as error:
    refused = is_out_of_memory(error)
print(type(meter).__name__, limit.source, limit.once_a_process, limit.limit_bytes, peak_bytes, refused)
"""


def test_within_a_real_limit_on_private_memory_what_is_mapped_and_never_touched_counts(tmp_path):
    command = [sys.executable, "-c", PRIVATE]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    meter, source, once, limit_bytes, peak_bytes, refused = ended.stdout.split()
    assert (meter, source, once, refused) == ("AddressSpaceMeter", "RLIMIT_DATA", "True", "True")
    assert 280 * MIB < int(limit_bytes) <= 300 * MIB
    assert 200 * MIB <= int(peak_bytes) < 270 * MIB
