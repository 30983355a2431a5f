"""``rightbatch memory`` inside a real limit of the kernel: it counts what the limit counts, and its answer runs there."""

import json
import os
import resource
import subprocess
import sys

import pytest

from rightbatch.units import GIB, MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")

WIDE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import rightbatch as rb


def workload():
    data = TensorDataset(torch.zeros(60_000, 8), torch.zeros(60_000, dtype=torch.long))
    model = lambda: nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 2))
    return rb.Workload(model=model, train=data, loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), num_workers=0)
"""
ROOM_BYTES = 400 * MIB


def address_space_of_an_idle_child(folder, environment):
    """Bytes that a process maps once torch and the workload are loaded."""
    code = "import train, torch; train.workload(); print(open('/proc/self/statm').read().split()[0])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return int(ended.stdout) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_ceiling_within_a_real_limit_is_measured_in_what_that_limit_counts(tmp_path, kind):
    (tmp_path / "train.py").write_text(WIDE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    limit_bytes = ROOM_BYTES + (address_space_of_an_idle_child(tmp_path, environment) if kind == "RLIMIT_AS" else 0)
    command = [sys.executable, "-m", "rightbatch", "memory", "train.py:workload", "--budget", "5m", "--json", "--out", "run"]
    set_limit = lambda: resource.setrlimit(getattr(resource, kind), (limit_bytes, limit_bytes))  # noqa: E731
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, preexec_fn=set_limit)
    assert ended.returncode == 0, ended.stderr
    memory = json.loads(ended.stdout)["memory"]
    assert (memory["limit"]["source"], memory["limit"]["headroom_bytes"]) == (kind, 0)
    assert memory["limit"]["limit_bytes"] < ROOM_BYTES + 64 * MIB < GIB
    assert "peak address space" in memory["allocator"]
    assert memory["ceiling"] < 60_000
    ran = {point["micro_batch_size"]: point["used_bytes"] for point in memory["points"] if point["outcome"] == "ran"}
    assert memory["ceiling"] == max(ran)
    # What malloc maps varies: the ceiling's own step may take less than a smaller one's that came near the limit.
    assert 0.8 * memory["limit"]["limit_bytes"] < max(ran.values()) <= memory["limit"]["limit_bytes"]
