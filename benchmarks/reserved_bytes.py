"""What PyTorch's caching allocator reserves over what is live, replayed without a GPU: by size, and with scratch memory for convolutions.

Run: python benchmarks/reserved_bytes.py [--workloads FILE.py] [--data PATH] [--json]

Every public function of the file that returns a ``rightbatch.Workload`` when called without arguments is one row; without a file, the CNN
of examples/cifar10.py and a ResNet-18 for images of its shape. Each is recorded once on the CPU, and its allocations are replayed at sizes
an eighth of an octave apart over five octaves up to the smooth ceiling in 24 GiB, and at 200 successive sizes from the smallest of them.
It is a description of the allocator's rules as they are written here, with no goal: nothing of it has been compared with a GPU.
"""

import sys
import time

import numpy as np
import torch

import rightbatch as rb
from gpu_checks_nets import cifar10_resnet18
from overhead import FAILURES, Row, conclude, first_line, parser_of, rig_of, sayer, workloads_asked
from rightbatch.fits.caching_allocator import Recording, smooth_ceiling
from rightbatch.fits.forecast import with_workspaces
from rightbatch.probes.absent_device import record
from rightbatch.records.measurements import AllocationTable
from rightbatch.units import GIB

CAPACITY_BYTES = 24 * GIB
OCTAVES, PER_OCTAVE = 5, 8
SUCCESSIVE = 200
SCRATCH = (0, 1, 2)
"""Scratch memory of a convolution, in multiples of its result."""
RESNET_WIDTH, RESNET_SAMPLES = 64, 50_000


def described(name: str, table: AllocationTable) -> Row:
    """Ratios of reserved to live bytes over sizes, falls from one size to the next, and ceilings by scratch memory."""
    plain, expandable = Recording(table), Recording(table, expandable_segments=True)
    ceiling = smooth_ceiling(plain, CAPACITY_BYTES) or 1
    sizes = np.unique(np.geomspace(max(1, ceiling / 2**OCTAVES), ceiling, 1 + OCTAVES * PER_OCTAVE).round().astype(int)).tolist()
    successive = range(sizes[0], sizes[0] + SUCCESSIVE + 1)
    reserved = np.array([plain.at(size).peak_reserved_bytes for size in successive], dtype=np.float64)
    change = reserved[1:] / reserved[:-1] - 1
    return {
        "workload": name,
        "sizes": [sizes[0], sizes[-1]],
        "reserved_over_live": _ends(plain, sizes),
        "expandable_over_live": _ends(expandable, sizes),
        "falls": float((change < 0).mean()),
        "largest_fall": float(-change.min()),
        "largest_rise": float(change.max()),
        "smooth_ceilings": {factor: smooth_ceiling(with_workspaces(table, factor), CAPACITY_BYTES) for factor in SCRATCH},
    }


def _ends(recording: Recording, sizes: list[int]) -> list[float]:
    """Least, median and largest ratio."""
    ratios = [recording.at(size).peak_reserved_bytes / recording.live_bytes(size) for size in sizes]
    return [min(ratios), float(np.median(ratios)), max(ratios)]


def in_words(row: Row) -> str:
    plain, expandable = (", ".join(f"{value:.2f}" for value in row[key]) for key in ("reserved_over_live", "expandable_over_live"))
    ceilings = ", ".join(f"{ceiling} with {factor} times" for factor, ceiling in row["smooth_ceilings"].items())
    return (
        f"{row['workload']}, b = {row['sizes'][0]} to {row['sizes'][1]}: reserved over live {plain} (least, median, largest), "
        f"with expandable segments {expandable};\n  over {SUCCESSIVE} successive sizes it falls at {row['falls']:.0%} of steps, by "
        f"{max(row['largest_fall'], 0):.2%} at most, and rises by {row['largest_rise']:.2%} at most;\n"
        f"  smooth ceiling in 24 GiB by scratch memory of a convolution over its result: {ceilings}"
    )


def main() -> int:
    options = parser_of(__doc__).parse_args()
    torch.set_num_threads(1)
    start_s, say = time.perf_counter(), sayer(as_json=options.json)
    workloads: dict[str, rb.Workload] = workloads_asked(options)
    if options.workloads is None:
        workloads["ResNet-18"] = cifar10_resnet18(RESNET_WIDTH, RESNET_SAMPLES, options.data)
    rows: list[Row] = []
    for name, workload in workloads.items():
        rig = rig_of(name, workload, say)
        if rig is None:
            continue
        try:
            trace = record(rig)
        except FAILURES as error:
            say(f"{name}: left out, {first_line(error)}")
            continue
        if trace.allocations is None:
            say(f"{name}: left out, {trace.remark}")
            continue
        rows.append(described(name, trace.allocations))
        say(in_words(rows[-1]))
    return conclude([], {"rows": rows}, start_s=start_s, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
