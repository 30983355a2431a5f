"""What every run is asked: where the workload runs, and where what comes out is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What the requests for a measurement, a sweep and a training have in common; each adds its own questions."""

    device: str = "auto"
    """``auto`` takes an accelerator if there is one; else ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] | None = None
    """Overrides the workload's own precision."""
    threads: int | None = None
    """Threads torch computes with; none leaves torch's default, and lets the trials of a sweep share the cores."""
    out: Path | None = None
    """Folder of what comes out; without one a training keeps nothing, and everything else derives its own below ``rightbatch-runs``."""
    fresh: bool = False
    """Whether to do again what the folder holds."""
