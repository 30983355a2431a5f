"""Several ranks: one answer on all of them, and one error when one of them fails."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from fakes import FakeDevice, GivenSource, planted_rig, planted_samples, planted_workload
from launch import Ended, Launch, forked, torchrun
from rightbatch.tuner.find import find
from rightbatch.tuner.request import Part, Request, SilentProgress

PROGRAM = '''
"""Asks on a planted device whose memory differs by rank; writes what this rank found, or ends with its error."""
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fakes import FakeDevice, GivenSource, planted_rig, planted_samples, planted_workload
from rightbatch.errors import RightbatchError
from rightbatch.tuner.find import find
from rightbatch.tuner.request import Part, Request

options = json.loads(sys.argv[1])
rank = int(os.environ["RANK"])


@dataclass
class Device(FakeDevice):
    def limit(self, requested_bytes):
        if options.get("killed") == "limit" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().limit(requested_bytes)

    def run_forward(self, size):
        if options.get("killed") == "attempt" and rank == 1 and torch.is_grad_enabled() and size >= options["killed_from"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if options.get("raises") and rank == 1 and torch.is_grad_enabled():
            raise ValueError("an odd sample")
        super().run_forward(size)


class Lines:
    def update(self, stage, fraction, detail):
        with Path(f"progress-{rank}").open("a") as lines:
            lines.write(f"{stage}: {detail}\\n")


if options.get("own_group"):
    torch.distributed.init_process_group("gloo")
device = Device(capacity_bytes=options["capacities"][rank], load_time_s=1e-5)
workload = planted_workload(device, planted_samples(50.0, 2048, seed=1), lr=1e-9, lr_batch_size=32)
request = Request(
    parts=frozenset(Part(name) for name in options["parts"]),
    isolation=options.get("isolation", "in-process"),
    budget_s=600.0,
    out=Path(options["out"]) if "out" in options else None,
    save="out" in options,
)
clock = {"clock_s": device.now_s} if request.isolation == "in-process" else {}
try:
    found = find(GivenSource(workload), request, Lines(), build_rig=planted_rig(device, workload), **clock)
except RightbatchError as error:
    sys.exit(f"{type(error).__name__} on rank {rank}: {error}")
Path(f"found-{rank}.json").write_text(json.dumps({"folder": str(found.folder), "findings": json.loads(found.findings.model_dump_json())}))
if torch.distributed.is_initialized() != bool(options.get("own_group")):
    sys.exit("the ranks left a process group behind, or ended the program's own")
if options.get("own_group"):
    total = torch.tensor([rank + 1])
    torch.distributed.all_reduce(total)
    Path(f"total-{rank}").write_text(str(total.item()))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a process that ends them as its peer does: everything is written by now
'''
CAPACITIES = (600_000, 400_000)
"""Of the first and of the second rank's device, in bytes."""
MEMORY = ("memory",)


@dataclass(frozen=True)
class Found:
    """How all ranks together ended, and what each found."""

    ended: Ended
    found: dict[int, dict]

    @property
    def code(self) -> int:
        return self.ended.code

    @property
    def err(self) -> str:
        return self.ended.err


def together(folder: Path, launch: Launch = forked, **options: object) -> Found:
    """Run the program on two ranks."""
    (folder / "program.py").write_text(PROGRAM)
    ended = launch(folder, "program.py", json.dumps({"capacities": CAPACITIES, "parts": MEMORY} | options))
    found = {rank: folder / f"found-{rank}.json" for rank in range(2)}
    return Found(ended, {rank: json.loads(file.read_text()) for rank, file in found.items() if file.exists()})


def ceiling_alone(capacity_bytes: int) -> int:
    """Ceiling that one process finds on a device of so many bytes."""
    device = FakeDevice(capacity_bytes=capacity_bytes)
    workload = planted_workload(device, planted_samples(50.0, 2048, seed=1))
    request = Request(parts=frozenset({Part.MEMORY}), isolation="in-process", save=False)
    found = find(GivenSource(workload), request, SilentProgress(), build_rig=planted_rig(device, workload), clock_s=device.now_s)
    return found.findings.memory.ceiling


@pytest.mark.slow
def test_ranks_find_the_ceiling_of_the_smallest_device(tmp_path: Path):
    result = together(tmp_path, torchrun)
    larger, smaller = map(ceiling_alone, CAPACITIES)

    assert result.code == 0, result.err
    first, second = (result.found[rank]["findings"] for rank in range(2))
    assert first == second
    assert first["memory"]["ceiling"] == smaller < larger


@pytest.mark.slow
def test_first_rank_alone_measures_the_rest_and_keeps_the_folder_that_all_reuse(tmp_path: Path):
    options = {"parts": ("memory", "step_time", "loader", "gradient_noise"), "out": "run"}
    measured = together(tmp_path, **options)
    said = {rank: (tmp_path / f"progress-{rank}") for rank in range(2)}
    reused = together(tmp_path, **options)

    assert (measured.code, reused.code) == (0, 0), measured.err + reused.err
    assert measured.found[0]["findings"] == measured.found[1]["findings"]
    assert [measured.found[rank]["folder"] for rank in range(2)] == ["run", "None"]
    assert measured.found[1]["findings"]["recommendation"]["plan"]["world_size"] == 2
    assert "gradient noise" in said[0].read_text()
    assert not said[1].exists()
    assert reused.found[0]["findings"] == reused.found[1]["findings"]
    assert reused.found[1]["findings"]["reused_parts"] == ["memory", "step_time", "loader", "gradient_noise"]


@pytest.mark.slow
def test_programs_own_process_group_is_joined_and_left_as_it_was(tmp_path: Path):
    result = together(tmp_path, own_group=True)

    assert result.code == 0, result.err
    assert [(tmp_path / f"total-{rank}").read_text() for rank in range(2)] == ["3", "3"]
    assert result.found[0]["findings"] == result.found[1]["findings"]


@pytest.mark.slow
def test_child_killed_on_one_rank_ends_all_ranks_with_the_reason(tmp_path: Path):
    result = together(tmp_path, isolation="child", killed="limit")

    assert result.code != 0
    assert result.found == {}
    assert "IsolationError on rank 1" in result.err
    assert "RankError on rank 0: all ranks must finish; rank 1 gave up in the stage" in result.err
    assert result.err.count("killed by SIGKILL") >= 2


@pytest.mark.slow
def test_child_killed_at_a_size_on_one_rank_lowers_the_ceiling_of_all(tmp_path: Path):
    """As in a single process, where the kernel ends the child for the memory that the size needs."""
    result = together(tmp_path, isolation="child", killed="attempt", killed_from=100)

    assert result.code == 0, result.err
    assert result.found[0]["findings"] == result.found[1]["findings"]
    assert result.found[0]["findings"]["memory"]["ceiling"] < 100


@pytest.mark.slow
def test_users_error_on_one_rank_ends_all_ranks_with_the_reason(tmp_path: Path):
    result = together(tmp_path, torchrun, raises=True)

    assert result.code != 0
    assert "UserCodeError on rank 1: the workload's code raised ValueError: an odd sample" in result.err
    assert "RankError on rank 0: all ranks must finish; rank 1 gave up" in result.err
