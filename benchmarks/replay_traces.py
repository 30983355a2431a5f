"""Recorded trainings, read from the files of one folder: how many epochs (or samples) each batch size needed, and how long they took.

Formats, each optional: ``zeus.csv`` (measured times, rates not tuned at each size), ``rcp.csv`` (tuned rates, no times),
``pollux_progress.csv`` (metric and gradient noise along one run a size, no times that fit it), and ``traces.csv`` (our own trainings, no
times; prior_traces.py).
"""

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np

from rightbatch.fits.samples_curve import LrRegime

HALF_SATURATIONS = 6
WINDOW = 5
"""Sizes of a part of a ladder: memory at its upper end, or a habit at its lower, leaves people no more."""
TARGET_SHARE = 0.97
"""A run's target, as a share of the worst run's best metric."""


@dataclass(frozen=True)
class Cell:
    """One workload on one device with one target.

    Attributes:
        workload: Cells of a workload are averaged before workloads are.
        label: Names the cell.
        regime: How the learning rate went with the size.
        sizes: Batch sizes, ascending.
        seconds: Seconds of one unit of work (an epoch, or a sample) at each size.
        work: Units of work to the target at each size, one a seed; infinite where it was never reached.
    """

    workload: str
    label: str
    regime: LrRegime
    sizes: np.ndarray
    seconds: np.ndarray
    work: tuple[np.ndarray, ...]

    @property
    def network(self) -> str:
        """What is trained, whatever the optimizer and the rates: the middle of dataset/network/optimizer."""
        return self.workload.split("/")[1] if "/" in self.workload else self.workload

    @property
    def time_s(self) -> np.ndarray:
        """Mean seconds to the target over the seeds that reached it; infinite where none did."""
        means = [float(runs[np.isfinite(runs)].mean()) if np.isfinite(runs).any() else math.inf for runs in self.work]
        return np.array(means) * self.seconds

    @property
    def failing_share(self) -> np.ndarray:
        """Share of the seeds that never reached the target."""
        return np.array([float((~np.isfinite(runs)).mean()) for runs in self.work])

    @cached_property
    def resolution(self) -> float:
        """Work from one evaluation to the next, as far as the runs show: the least difference between two of them; 0 when all are alike."""
        known = np.unique(np.concatenate([runs[np.isfinite(runs)] for runs in self.work]))
        return float(np.diff(known).min()) if len(known) > 1 else 0.0

    @property
    def longest_work(self) -> float:
        """Most work that any run took: where a run without hope of a target ends."""
        return max(float(runs[np.isfinite(runs)].max()) for runs in self.work if np.isfinite(runs).any())


@dataclass(frozen=True)
class NoiseTrace:
    """The run at the smallest size, as far as its target, with its gradient noise.

    Attributes:
        batch_size: Samples of a step of that run.
        shares: Samples between one record and the next.
        sq_norm: Squared norm of the gradient at each record.
        trace: Trace of the covariance of a sample's gradient at each record.
    """

    batch_size: float
    shares: np.ndarray
    sq_norm: np.ndarray
    trace: np.ndarray


def read_zeus(folder: Path) -> list[Cell]:
    """Cells with measured seconds an epoch; the rate is ``fixed`` where it is the same at all sizes, else ``coupled``.

    They come from ``zeus.csv``, and from ``tidy.csv``, which `rightbatch sweep` writes in the same form.
    """
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for row in (*_rows(folder / "zeus.csv"), *_rows(folder / "tidy.csv")):
        groups[row["workload"], row["device"], row["target"]].append(row)
    cells = []
    for (workload, device, target), rows in groups.items():
        work, seconds = defaultdict(list), {}
        for row in rows:
            size = int(row["batch_size"])
            work[size].append(_work(row["epochs_to_target"]))
            seconds[size] = float(row["epoch_time_s"])
        sizes = sorted(work)
        if len(sizes) < 2 or not any(math.isfinite(value) for runs in work.values() for value in runs):
            continue
        rates = {row["lr"] for row in rows}
        regime: LrRegime = "fixed" if len(rates) == 1 and rates != {""} else "coupled"
        cells.append(
            Cell(
                workload=workload,
                label=f"{workload} {device} {target}",
                regime=regime,
                sizes=np.array(sizes, dtype=float),
                seconds=np.array([seconds[size] for size in sizes]),
                work=tuple(np.array(work[size]) for size in sizes),
            )
        )
    return cells


def read_rcp(folder: Path) -> list[Cell]:
    """Cells with t(b) = b_half + b at six half-saturation sizes, from a quarter of the smallest size to the largest."""
    work: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder / "rcp.csv"):
        work[row["workload"]][int(row["batch_size"])].append(_work(row["epochs_to_target"]))
    cells = []
    for workload, runs in work.items():
        sizes = np.array(sorted(runs), dtype=float)
        if len(sizes) < 2:
            continue
        cells += [
            Cell(
                workload=workload,
                label=f"{workload} b_half {half:.0f}",
                regime="tuned",
                sizes=sizes,
                seconds=(half + sizes) / sizes,
                work=tuple(np.array(runs[int(size)]) for size in sizes),
            )
            for half in np.geomspace(sizes[0] / 4, sizes[-1], HALF_SATURATIONS)
        ]
    return cells


def read_own(folder: Path) -> list[Cell]:
    """Cells with t(b) = b_half + b, of whole ladders of sizes and of both ends of them alone.

    A whole ladder is scored at half-saturation sizes equal to its smallest, middle and largest size; a part of it, of the smallest or the
    largest sizes, at its middle and its largest.
    """
    groups: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder / "traces.csv"):
        groups[row["workload"], row["regime"], row["target"]][int(row["batch_size"])].append(_work(row["epochs_to_target"]))
    cells = []
    for (workload, regime, target), runs in groups.items():
        ladder = sorted(runs)
        parts = {"all": (ladder, (0.0, 0.5, 1.0))}
        if len(ladder) > WINDOW:
            parts |= {"smallest": (ladder[:WINDOW], (0.5, 1.0)), "largest": (ladder[-WINDOW:], (0.5, 1.0))}
        for part, (kept, shares) in parts.items():
            sizes = np.array(kept, dtype=float)
            work = tuple(np.array(runs[size]) for size in kept)
            if len(sizes) < 2 or not any(np.isfinite(of_size).any() for of_size in work):
                continue
            cells += [
                Cell(
                    workload=workload,
                    label=f"{workload} {regime} {target} {part} b_half {half:.0f}",
                    regime=cast("LrRegime", regime),
                    sizes=sizes,
                    seconds=(half + sizes) / sizes,
                    work=work,
                )
                for half in (sizes[0] ** (1 - share) * sizes[-1] ** share for share in shares)
            ]
    return cells


def read_pollux(folder: Path) -> list[tuple[Cell, NoiseTrace]]:
    """Cells with t(b) = b_half + b at five half-saturation sizes, each with the noise along the run at the smallest size."""
    groups: dict[str, dict[int, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(folder / "pollux_progress.csv"):
        groups[row["workload"]][int(row["batch_size"])].append(row)
    found = []
    for workload, runs in groups.items():
        sizes = np.array(sorted(runs), dtype=float)
        if len(sizes) < 2:
            continue
        sign = 1 if next(iter(runs.values()))[0]["higher_is_better"] in ("True", "true", "1") else -1
        target = _target(runs, sign)
        steps = np.array([_steps_to(runs[int(size)], sign, target) for size in sizes])
        noise = _noise_until(runs[int(sizes[0])], float(sizes[0]), float(steps[0]))
        for half in (sizes[0] / 4, sizes[0], 4 * sizes[0], 16 * sizes[0], sizes[-1]):
            cell = Cell(
                workload=workload,
                label=f"{workload} b_half {half:.0f}",
                regime="coupled",
                sizes=sizes,
                seconds=(half + sizes) / sizes,
                work=tuple(np.array([count * size]) for count, size in zip(steps, sizes, strict=True)),
            )
            found.append((cell, noise))
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _work(text: str) -> float:
    return float(text) if text else math.inf


def _target(runs: dict[int, list[dict[str, str]]], sign: int) -> float:
    """97 % of the worst run's best metric, where larger is better; that metric over 97 % where smaller is."""
    best = [max(sign * float(row["metric"]) for row in rows) for rows in runs.values()]
    return min(best) * (TARGET_SHARE if sign > 0 else 1 / TARGET_SHARE)


def _steps_to(rows: list[dict[str, str]], sign: int, target: float) -> float:
    return next((float(row["iteration"]) for row in rows if sign * float(row["metric"]) >= target), math.inf)


def _noise_until(rows: list[dict[str, str]], batch_size: float, steps: float) -> NoiseTrace:
    kept = [row for row in rows if float(row["iteration"]) <= steps]
    at = np.array([float(row["iteration"]) for row in kept]) * batch_size
    return NoiseTrace(
        batch_size=batch_size,
        shares=np.diff(at, prepend=0.0),
        sq_norm=np.array([float(row["grad_sq_norm"]) for row in kept]),
        trace=np.array([float(row["grad_noise_trace"]) for row in kept]),
    )
