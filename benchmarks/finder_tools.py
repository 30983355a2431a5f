"""One memory finder on one workload within one limit, in this process: ``memory_finder.py`` runs it, in the peers' environment for peers.

Run: python benchmarks/finder_tools.py '{"tool": "bisection", "workloads": "FILE.py", "name": "NAME", "limit": "device", "value": 200,
"log": "FILE"}' ... The last line printed is a JSON list: for each task what was found, and what it took, or {"missing": "reason"}.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from finder_limits import LiveBytes, Watch, limit_address_space, limit_resident, limit_size
from rightbatch.engine.isolation import ChildHost, Completed, Host, InProcessHost
from rightbatch.engine.losses import loss_sum
from rightbatch.engine.meters import DeviceClock, Meters, measure_contention, meters_for
from rightbatch.engine.out_of_memory import is_out_of_memory
from rightbatch.engine.ranks import SingleRank
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import train_step
from rightbatch.probes import memory
from rightbatch.records.measurements import MemoryMeasurements, Outcome
from rightbatch.tuner.memory_search import MemorySearch
from rightbatch.tuner.request import Request
from workload_files import workloads_of

CPU = torch.device("cpu")
SCALE, CONTEXT_BYTES = 1.25, 2**20
"""Of the simulated device: what an allocator wastes, and what a context holds."""
STEPS = 2
"""Steps a trial where the finder leaves them to us: as many as an attempt of ours takes, so that there is optimizer state."""
SEARCH_S = 600.0
FIRST_TRUTH, TRUTH_RESOLUTION = 512, 0.01


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to run.

    Attributes:
        tool: Name of the finder, or ``truth``.
        workloads: Python file.
        name: Function in it.
        limit: ``device``, ``resident`` or ``address space``.
        value: Ceiling of the device in samples, or bytes.
        log: File for the sizes of all forward passes.
    """

    tool: str
    workloads: str
    name: str
    limit: str
    value: int
    log: str

    def rig(self, watch: Watch, meters: Meters | None = None) -> Rig:
        """The watched workload on the CPU."""
        torch.set_num_threads(1)
        workloads, _ = workloads_of(Path(self.workloads))
        return Rig(workload=watch.watched(workloads[self.name]), device=CPU, meters=meters or meters_for(CPU))

    def limited_rig(self) -> tuple[Rig, Watch]:
        """The workload within the limit, for finders that meet it by running into it."""
        watch = Watch(Path(self.log))
        rig = self.rig(watch)
        rig.typical_batch(1)
        if self.limit == "device":
            limit_size(watch, self.value)
        elif self.limit == "resident":
            limit_resident(watch, self.value)
        else:
            limit_address_space(self.value)
        return rig, watch


def trial(rig: Rig, watch: Watch, size: int) -> None:
    """Train on so many samples for two steps."""
    watch.current = size
    with watch.counting():
        trainee = rig.new_trainee()
        batch = rig.typical_batch(size)
        for _ in range(STEPS):
            train_step(trainee, [batch])


def bisection(rig: Rig, watch: Watch) -> int:
    """Double until memory runs out, then halve the interval to one sample."""

    def fits(size: int) -> bool:
        try:
            trial(rig, watch, size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def accelerate(rig: Rig, watch: Watch) -> int:
    """``find_executable_batch_size`` from its default of 128."""
    from accelerate.utils import find_executable_batch_size  # type: ignore[import-not-found]

    @find_executable_batch_size  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> int:
        trial(rig, watch, batch_size)
        return batch_size

    return int(train())


def batch_finder(rig: Rig, watch: Watch) -> int:
    """``find_max_minibatch`` with its defaults but for the pauses between attempts, in this process."""
    from batch_finder import find_max_minibatch  # type: ignore[import-not-found]

    class Trials(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            trial(rig, watch, len(x))
            return torch.zeros((), requires_grad=True)

    found = find_max_minibatch(Trials, input_shapes=(-1, 1), device=CPU, delay=0.0, use_subprocess=False)
    return 0 if found is None else int(found[0])


def lightning(rig: Rig, watch: Watch, *, mode: str) -> int:
    """Lightning's batch size scaler with its defaults."""
    import lightning.pytorch as pl  # type: ignore[import-not-found]
    from lightning.pytorch.tuner import Tuner, batch_size_scaling  # type: ignore[import-not-found]

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.trainee = rig.new_trainee(compiled=False)
            self.model = self.trainee.model

        def training_step(self, batch: Any, _index: int) -> Tensor:
            loss, count = loss_sum(self.trainee.objective, self.trainee.model, batch)
            return loss / count

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.trainee.optimizer

        def train_dataloader(self) -> DataLoader[object]:
            collate = rig.workload.collate_fn or default_collate
            return DataLoader(rig.workload.train, batch_size=self.batch_size, collate_fn=collate)

    def counted(error: BaseException, known: Callable[[BaseException], bool] = batch_size_scaling.is_oom_error) -> bool:
        watch.count(error)
        return known(error)

    batch_size_scaling.is_oom_error = counted
    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        return int(Tuner(trainer).scale_batch_size(module, mode=mode))


PEERS: dict[str, Callable[[Rig, Watch], int]] = {
    "lightning power": lambda rig, watch: lightning(rig, watch, mode="power"),
    "lightning binsearch": lambda rig, watch: lightning(rig, watch, mode="binsearch"),
    "accelerate": accelerate,
    "batch-finder": batch_finder,
    "bisection": bisection,
}
OURS = {"rightbatch": False, "rightbatch --certify": True}
"""By whether a proof is asked for."""


def run_peer(task: Task) -> dict[str, object]:
    """Let a peer run into the limit."""
    rig, watch = task.limited_rig()
    try:
        found = PEERS[task.tool](rig, watch)
    except ImportError as error:
        return {"missing": str(error)}
    sizes = [int(line.split()[0]) for line in Path(task.log).read_text().splitlines() if line.endswith("train")]
    probes = sum(size != before for before, size in zip([0, *sizes], sizes, strict=False))
    return {
        "found": found,
        "probes": probes,
        "out_of_memory_errors": watch.errors,
        "over_limit": 0,
        "ever_ran": found in sizes and found not in watch.failed,
    }


def run_ours(task: Task) -> dict[str, object]:
    """Search within the limit as the product does: in a child where the limit is real."""
    if task.limit != "device":
        return searched(task, ChildHost(lambda: _real_rig(task), sys.stderr.write))
    device, rig = simulated(task)
    with device:
        return searched(task, InProcessHost(lambda: rig, sys.stderr.write))


def simulated(task: Task) -> tuple[LiveBytes, Rig]:
    """Return the simulated device, to be switched on, and the workload on it; between its ceiling and the next size lies its limit."""
    device = LiveBytes(scale=SCALE, context_bytes=CONTEXT_BYTES)
    watch = Watch(Path(task.log).with_suffix(".calibration"))
    rig = task.rig(watch, Meters(clock=DeviceClock(None), memory=device, energy=None, contention=measure_contention))
    rig.typical_batch(1)
    with device:
        used_bytes = [
            memory.attempt(rig, size, "touch", traced_bytes=0, limit_bytes=2**62).used_bytes or 0 for size in (task.value, task.value + 1)
        ]
    device.limit_bytes = sum(used_bytes) // 2
    watch.log = Path(task.log)
    limit_size(watch, task.value)
    return device, rig


def _real_rig(task: Task) -> Rig:
    rig = task.rig(Watch(Path(task.log)))
    if task.limit != "address space":
        return rig
    limit_address_space(task.value)
    return replace(rig, meters=meters_for(CPU))  # which look at what limits this process now


def searched(task: Task, host: Host) -> dict[str, object]:
    """Search on a host, and end it."""
    try:
        run = _search(task, host)
    finally:
        host.close()
    found = max((point.micro_batch_size for point in run.points if point.outcome is Outcome.RAN), default=0)
    proofs = [point for point in run.points if point.purpose == "proof"]
    return {
        "found": found,
        "probes": len(run.points),
        "out_of_memory_errors": sum(point.outcome in (Outcome.OUT_OF_MEMORY, Outcome.KILLED) for point in run.points)
        + (not run.trace.moments),
        "over_limit": sum(point.outcome is Outcome.OVER_LIMIT for point in run.points),
        "ever_ran": found > 0,
        "proved": bool(proofs) and proofs[-1].outcome is not Outcome.RAN,
        "limit": run.limit.model_dump(),
        "allocator": run.allocator,
        "points": [point.model_dump(mode="json", include={"micro_batch_size", "purpose", "outcome", "used_bytes"}) for point in run.points],
    }


def _search(task: Task, host: Host) -> MemoryMeasurements:
    workload = _value(host.call(Rig.describe))
    requested = task.value if task.limit == "resident" else None
    limit, allocator = _value(host.call(memory.limit, requested))
    if limit.once_a_process:
        host.renew()
        limit, allocator = _value(host.call(memory.limit, requested))
    request = Request(certify=OURS[task.tool], alternatives=False, limit_bytes=requested)
    search = MemorySearch(host=host, request=request, workload=workload, clock_s=time.perf_counter, ranks=SingleRank())
    return search.run(limit, allocator, SEARCH_S)


def _value(outcome: Any) -> Any:
    if not isinstance(outcome, Completed):
        raise SystemExit(f"a small probe must run within the limit; it ended with {outcome}: give a larger limit.")
    return outcome.value


def run_truth(task: Task) -> dict[str, object]:
    """Return the largest size up to which all run, to one in a hundred.

    Resident memory is measured here, after a first step has loaded the code of the kernels, and bisected. Within a limit on address space
    each size runs in a fork of this process, which has loaded everything and run nothing: as a user's own training begins. There a size may
    fail and a larger one run, once its tensors are large enough to be mapped one by one; so sizes ascend by a sixteenth until one fails.
    """
    rig = _real_rig(replace(task, limit="none"))
    is_resident = task.limit == "resident"
    if is_resident:
        memory.attempt(rig, 2, "touch", traced_bytes=0, limit_bytes=2**62)
    fits = partial(_fits_resident if is_resident else _runs_in_a_fork, rig, task.value)
    high = FIRST_TRUTH
    while fits(high):
        high *= 2
    low = 0 if is_resident else high // 4
    while not is_resident and fits(step := low + low // 16):
        low = step
    high = high if is_resident else step
    while high - low > max(1, TRUTH_RESOLUTION * low):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"found": low}


def _fits_resident(rig: Rig, budget_bytes: int, size: int) -> bool:
    return memory.attempt(rig, size, "approach", traced_bytes=0, limit_bytes=budget_bytes).outcome is Outcome.RAN


def _runs_in_a_fork(rig: Rig, budget_bytes: int, size: int) -> bool:
    child = os.fork()
    if child == 0:
        ran = False
        with contextlib.suppress(BaseException):  # whatever happens, this copy of the process ends here
            limit_address_space(budget_bytes)
            memory.attempt(rig, size, "approach", traced_bytes=0, limit_bytes=2**62)
            ran = True
        os._exit(0 if ran else 1)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    results = []
    for words in sys.argv[1:]:
        task = Task(**json.loads(words))
        Path(task.log).write_text("")
        start_s = time.perf_counter()
        result = run_truth(task) if task.tool == "truth" else run_ours(task) if task.tool in OURS else run_peer(task)
        sizes = [int(line.split()[0]) for line in Path(task.log).read_text().splitlines()]
        results.append({**result, "samples": sum(sizes), "passes": len(sizes), "seconds": round(time.perf_counter() - start_s, 1)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
