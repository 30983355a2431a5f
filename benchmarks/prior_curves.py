"""Fit E(b) to our own trainings: where the curve bends at both ends, over the size at which the rate is customary.

Run: python benchmarks/prior_curves.py [--own FOLDER]

For every workload, regime and target of ``traces.csv`` (prior_traces.py), by least squares on the mean log epochs of the sizes at which all
seeds arrived,

    log E(b) = log E_min + log(1 + (b / B_c)**a) + log(1 + b_lo / b),   b_lo <= B_c.

Beside it, without a law: E(b0 / 8) / E(b0), what an eighth of the customary size b0 costs. A bend that lies outside the ladder is
written as the bound of the search, a quarter of the smallest size or four times the largest.
"""

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OWN = Path(__file__).parent / "records" / "2026-11-25_cpu_prior-traces"
FEWEST_SIZES = 4
REACH = 4.0
"""How far outside the ladder a bend is looked for."""
STEPS = 113
SHARPNESS = np.geomspace(0.5, 2.0, 13)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fitted curve; sizes over the size at which the rate is customary."""

    workload: str
    regime: str
    target: str
    low: float
    critical: float
    sharpness: float
    residual: float
    """Root mean square of the logarithm."""
    run_log_sd: float
    """Standard deviation of log E between seeds, pooled over sizes."""
    eighth: float | None
    """E(b0 / 8) / E(b0); none where either did not arrive."""


def fit(sizes: Sequence[float], log_epochs: Sequence[float]) -> tuple[float, float, float, float]:
    """Return b_lo, B_c, a and the residual of least squares, by search over a grid; the level is solved for.

    Without b_lo <= B_c the two bends could cancel where they overlap, and neither would say where the curve turns.

    Args:
        sizes: Ascending.
        log_epochs: Mean over seeds.
    """
    b, y = np.asarray(sizes, dtype=float), np.asarray(log_epochs, dtype=float)
    places = np.geomspace(b[0] / REACH, b[-1] * REACH, STEPS)
    low = np.log1p(places[:, None] / b)[:, None, None, :]
    rising = np.log1p((b / places[:, None, None]) ** SHARPNESS[:, None])[None, :, :, :]
    off = y - low - rising
    squares = ((off - off.mean(axis=-1, keepdims=True)) ** 2).mean(axis=-1)
    squares[places[:, None] > places[None, :]] = math.inf
    i, j, k = np.unravel_index(int(np.argmin(squares)), squares.shape)
    return float(places[i]), float(places[j]), float(SHARPNESS[k]), math.sqrt(float(squares[i, j, k]))


def curves(path: Path) -> list[Curve]:
    """Fit every workload, regime and target of a file of traces that has sizes enough."""
    groups: dict[tuple[str, str, str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            epochs = float(row["epochs_to_target"]) if row["epochs_to_target"] else math.inf
            groups[row["workload"], row["regime"], row["target"], int(row["lr_batch_size"])][int(row["batch_size"])].append(epochs)
    found = []
    for (workload, regime, target, base), runs in groups.items():
        logs = {size: np.log(runs[size]) for size in sorted(runs) if all(map(math.isfinite, runs[size]))}
        if len(logs) < FEWEST_SIZES:
            continue
        means = {size: float(values.mean()) for size, values in logs.items()}
        low, critical, sharpness, residual = fit(list(means), list(means.values()))
        found.append(
            Curve(
                workload=workload,
                regime=regime,
                target=target,
                low=low / base,
                critical=critical / base,
                sharpness=sharpness,
                residual=residual,
                run_log_sd=math.sqrt(float(np.mean([values.var(ddof=1) for values in logs.values()]))),
                eighth=math.exp(means[base // 8] - means[base]) if base // 8 in means and base in means else None,
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--own", type=Path, default=OWN, help="folder with the traces.csv of prior_traces.py")
    options = parser.parse_args()
    names = ("b_lo/b0", "B_c/b0", "a", "residual", "seeds", "E(b0/8)/E(b0)")
    print(f"{'workload':36}{'regime':9}{'target':>8}" + "".join(f"{name:>14}" for name in names))
    found = curves(options.own / "traces.csv")
    for one in found:
        eighth = "" if one.eighth is None else f"{one.eighth:.2f}"
        figures = (one.low, one.critical, one.sharpness, one.residual, one.run_log_sd)
        print(f"{one.workload:36}{one.regime:9}{one.target:>8}" + "".join(f"{value:14.3g}" for value in figures) + f"{eighth:>14}")
    for regime in sorted({one.regime for one in found}):
        of = [one for one in found if one.regime == regime]
        print(f"\n{regime}: {len(of)} curves; median and spread of the logarithm, as a factor")
        for name in ("low", "critical", "sharpness", "residual", "run_log_sd"):
            values = [getattr(one, name) for one in of]
            print(f"  {name:12}{np.median(values):8.3g}  x/ {math.exp(float(np.std(np.log(values)))):.3g}")
        eighths = [one.eighth for one in of if one.eighth is not None]
        if eighths:
            print(f"  E(b0/8)/E(b0): quartiles {np.round(np.quantile(eighths, (0.25, 0.5, 0.75)), 2)} of {len(eighths)}")


if __name__ == "__main__":
    main()
