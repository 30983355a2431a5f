"""Peak live bytes predicted from recordings at a few samples against the peak recorded at larger sizes, on many architectures.

Run: python benchmarks/memory_exact.py [--workloads FILE.py] [--json]

Every public function of the file that returns a ``rightbatch.Workload`` when called without arguments is one row. An optional
``ACCUMULATION_STEPS`` of the file maps names to micro-batches a step. All on the CPU with one thread. Beside ours: the peak of torch's own
``MemTracker`` on the same two steps, which needs the compared sizes to run. A workload that allocates other bytes at the same size when
samples and random numbers are others has no law of the size: it is counted apart and must be flagged. Exit code 1: a goal does not hold.
"""

import argparse
import contextlib
import gc
import io
import json
import platform
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from torch.distributed._tools.mem_tracker import MemTracker

import rightbatch as rb
from goals import Goal, exit_code, print_goals
from rightbatch.engine.memory_trace import AllocationLog
from rightbatch.engine.meters import meters_for
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import train_step
from rightbatch.fits.memory import traced_peak_bytes
from rightbatch.probes import memory
from rightbatch.probes.absent_device import record_without_memory
from rightbatch.records.measurements import MemoryTrace
from rightbatch.workload.ingredients import tensors_of
from workload_files import workloads_of

ARCHITECTURES = (Path(__file__).with_name("architectures.py"), Path(__file__).with_name("hard_architectures.py"))
SIZES = (1, 4, 7, 32, 100, 256, 1024)
PEER_SIZES = (7, 32)
DRAWN_SIZES = (7, 32)
"""Sizes that are recorded on two draws of samples and random numbers, to see whether the bytes depend on these."""
CURVE_S_WANTED = 1.0
LARGEST_SHARE = 0.4
"""Of the memory that is available: no size is recorded that is expected to need more."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture: its recorded peaks, and the predictions that were made without them."""

    name: str
    curve_s: float
    """Seconds of the processor: one thread, whatever else the machine does."""
    has_law: bool
    """Whether the bytes follow from the size alone."""
    trace: MemoryTrace
    without_memory: MemoryTrace
    peaks: Mapping[int, int]
    """Bytes recorded at each size that runs at all."""
    peer_peaks: Mapping[int, int]
    not_applicable: Mapping[int, str] = field(default_factory=dict)

    def bytes_off(self, trace: MemoryTrace) -> dict[int, int]:
        """Predicted minus recorded bytes at each size."""
        return {size: traced_peak_bytes(trace, size) - peak for size, peak in self.peaks.items()} if trace.moments else {}

    def silently_off(self, trace: MemoryTrace) -> int:
        """Sizes at which a trace that claims to be exact is not."""
        return sum(off != 0 for off in self.bytes_off(trace).values()) if trace.consistent else 0


def recorded_peak_bytes(log: AllocationLog) -> int:
    """Most bytes that live at once, replayed allocation by allocation."""
    live, peak = 0, 0
    dying: dict[int, int] = defaultdict(int)
    for index, allocation in enumerate(log.allocations):
        live += allocation.size_bytes - dying.pop(index, 0)
        dying[allocation.death] += allocation.size_bytes
        peak = max(peak, live)
    return peak


def peer_peak_bytes(rig: Rig, size: int, accumulation_steps: int) -> int:
    """The same two steps under torch's MemTracker."""
    trainee, batch = rig.new_trainee(compiled=False), rig.typical_batch(size)
    tracker = MemTracker()
    averages = [] if trainee.average is None else [trainee.average]
    tracker.track_external(trainee.model, trainee.optimizer, *averages, *tensors_of(batch))
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()  # it refuses a second step otherwise
            train_step(trainee, [batch] * accumulation_steps)
    return int(tracker.get_tracker_snapshot("peak")[CPU]["Total"])


def follows_from_the_size(rig: Rig) -> bool:
    """Whether another draw of samples and random numbers leaves every allocation as it is."""

    def allocated(drawn: Rig, size: int) -> list[tuple[str, int]]:
        return [(allocation.operation, allocation.size_bytes) for allocation in memory.record_step(drawn, size).allocations]

    return all(allocated(rig, size) == allocated(rig.redrawn(), size) for size in DRAWN_SIZES)


def recorded_peaks(rig: Rig, trace: MemoryTrace, accumulation_steps: int) -> tuple[dict[int, int], dict[int, str]]:
    """Record every size that runs and is expected to fit; also return why the others were left out."""
    peaks: dict[int, int] = {}
    not_applicable = {}
    for size in SIZES:
        grown = peaks[max(peaks)] * (size / max(peaks)) if peaks else 0
        expected = max(traced_peak_bytes(trace, size), grown)
        if expected > LARGEST_SHARE * psutil.virtual_memory().available:
            not_applicable[size] = f"expected to need {expected / 2**30:.1f} GiB"
            continue
        try:
            peaks[size] = recorded_peak_bytes(memory.record_step(rig, size, accumulation_steps=accumulation_steps))
        except ValueError as error:  # batch normalisation refuses a single value a channel
            not_applicable[size] = str(error).splitlines()[0]
    return peaks, not_applicable


def measure(name: str, workload: rb.Workload, accumulation_steps: int) -> Row:
    rig = Rig(workload=workload, device=CPU, meters=meters_for(CPU))
    rig.typical_batch(1)  # reading the samples is not part of the trace
    gc.collect()
    gc.freeze()  # as the child process does, or every reading of memory walks through all of torch
    start_s = time.process_time()
    trace = memory.trace(rig, accumulation_steps=min(accumulation_steps, 2))
    curve_s = time.process_time() - start_s
    without_memory = record_without_memory(rig) if accumulation_steps == 1 else trace
    peaks, not_applicable = recorded_peaks(rig, trace, accumulation_steps)
    peer_peaks = {}
    for size in PEER_SIZES:
        with contextlib.suppress(RuntimeError, AttributeError, KeyError, AssertionError), contextlib.redirect_stdout(io.StringIO()):
            peer_peaks[size] = peer_peak_bytes(rig, size, accumulation_steps)
    return Row(
        name=name,
        curve_s=curve_s,
        has_law=follows_from_the_size(rig),
        trace=trace,
        without_memory=without_memory,
        peaks=peaks,
        peer_peaks=peer_peaks,
        not_applicable=not_applicable,
    )


def cell(row: Row, trace: MemoryTrace, size: int) -> str:
    if size in row.not_applicable:
        return "n/a"
    if not trace.moments:
        return "no trace"
    return f"{row.bytes_off(trace)[size]}{'' if trace.consistent else ' (said)'}"


def print_row(row: Row) -> None:
    cells = "".join(f"{cell(row, row.trace, size):>15}" for size in SIZES)
    largest = max(row.peaks)
    print(f"{row.name:25}{row.curve_s:8.3f}{row.peaks[largest] / 2**20:9.1f}{cells}   {where(row)}{peer(row)}", flush=True)
    for remark in dict.fromkeys((row.trace.remark, row.without_memory.remark)):
        if remark:
            print(f"{'':25}  {remark}")
    if not row.has_law:
        print(f"{'':25}  Other samples or random numbers allocate other bytes at the same size: there is no law of the size.")


def where(row: Row) -> str:
    return f"{row.without_memory.recorded_on}: {row.silently_off(row.without_memory)} silently off"


def peer(row: Row) -> str:
    return "; MemTracker " + (", ".join(f"{peak - row.peaks[size]:+d} B at {size}" for size, peak in row.peer_peaks.items()) or "failed")


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    lawful = [row for row in rows if row.has_law]
    lawless = [row for row in rows if not row.has_law]
    compared = sum(len(row.peaks) for row in lawful)
    exact = sum(off == 0 for row in lawful for off in row.bytes_off(row.trace).values())
    flagged = sum(not row.trace.consistent for row in lawless)
    silent = sum(row.silently_off(row.trace) for row in rows)
    silent_meta = sum(row.silently_off(row.without_memory) for row in rows)
    slowest = max(row.curve_s for row in rows[1:] or rows)  # the first one pays for torch's own late imports
    return [
        {"name": "sizes predicted to the byte", "value": exact, "unit": f"of {compared}", "goal": "all", "holds": exact == compared},
        {
            "name": "workloads flagged of those whose bytes depend on samples or random numbers, so that no law of the size is exact",
            "value": flagged,
            "unit": f"of {len(lawless)}",
            "goal": "all",
            "holds": flagged == len(lawless),
        },
        {"name": "sizes silently off, recorded on the CPU", "value": silent, "unit": "", "goal": "0", "holds": silent == 0},
        {"name": "sizes silently off, recorded without memory", "value": silent_meta, "unit": "", "goal": "0", "holds": silent_meta == 0},
        {
            "name": "slowest curve, processor time",
            "value": round(slowest, 3),
            "unit": "s",
            "goal": f"<= {CURVE_S_WANTED:g}",
            "holds": slowest <= CURVE_S_WANTED,
        },
    ]


def document_of(row: Row) -> dict[str, object]:
    return {
        "name": row.name,
        "recorded_sizes": row.trace.batch_sizes,
        "curve_s": round(row.curve_s, 4),
        "has_law": row.has_law,
        "consistent": row.trace.consistent,
        "remark": row.trace.remark,
        "peak_bytes": row.peaks,
        "bytes_off": row.bytes_off(row.trace),
        "not_applicable": row.not_applicable,
        "without_memory": {
            "recorded_on": row.without_memory.recorded_on,
            "consistent": row.without_memory.consistent,
            "remark": row.without_memory.remark,
            "bytes_off": row.bytes_off(row.without_memory),
        },
        "mem_tracker_peak_bytes": row.peer_peaks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=Path, help="file of functions that return a Workload")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    start_s = time.perf_counter()
    workloads: dict[str, rb.Workload] = {}
    accumulation_steps: dict[str, int] = {}
    for path in [options.workloads] if options.workloads else ARCHITECTURES:
        made, module = workloads_of(path)
        workloads |= made
        accumulation_steps |= getattr(module, "ACCUMULATION_STEPS", {})
    rows = []
    if not options.json:
        print(
            f"{'architecture':25}{'curve s':>8}{'max MiB':>9}"
            + "".join(f"{f'off at {size}':>15}" for size in SIZES)
            + "   without memory; peer"
        )
    for name, workload in workloads.items():
        rows.append(measure(name, workload, accumulation_steps.get(name, 1)))
        if not options.json:
            print_row(rows[-1])
    goals = goals_of(rows)
    environment = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "rightbatch": rb.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "n": len(rows),
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    if options.json:
        print(json.dumps({"goals": goals, "rows": [document_of(row) for row in rows], "environment": environment}, indent=2))
    else:
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
