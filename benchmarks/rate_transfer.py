"""What it costs to carry a learning rate of SGD from one batch size to another, by where the rule saturates.

Run: python benchmarks/rate_transfer.py [--data cifar10_jpeg.npz] [--only NAME ...]

The workloads of live_regret.py, and its kept trainings. At half, once, twice and four times the size that the rate was tuned at, five
rates half a doubling apart around the sweep's, eight seeds each. The best rate of every size is carried to every other by (1 + f B / b0) /
(1 + f B / b) with B the noise scale that `find` measures (median of three): how much more samples it takes there than that size's own best
rate, in the mean over all pairs. Outside the rates that were trained, the nearest of them counts. Then what every rate took, beside how
hot it is: rate over size, over that of the workload's own rate.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import permutations
from statistics import mean, median

import numpy as np
import torch

import live_regret
import rightbatch as rb
from live_regret import SCORED_SEEDS, Question
from live_regret_truth import MOST_OVER_FEWEST
from rightbatch.engine.provenance import environment
from rightbatch.fits.intervals import FloatArray
from rightbatch.fits.lr_scaling import saturating_gain

SEEDS = SCORED_SEEDS[:8]
SIZES = (0.5, 1, 2, 4)
RATES = tuple(2 ** (half / 2) for half in range(-2, 3))
FACTORS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, math.inf)
FINDS = 3
BUDGET = "10s"
_UNBOUNDED = 1e9


@dataclass(frozen=True)
class Rates:
    """Samples to the target by rate at one size."""

    log_rates: FloatArray
    log_samples: FloatArray
    missed: tuple[int, ...]
    """Seeds that did not reach the target, by rate."""

    @property
    def best(self) -> float:
        """Logarithm of the best rate: the vertex of the parabola through the least and its neighbours."""
        least = min(max(int(self.log_samples.argmin()), 1), len(self.log_rates) - 2)
        x, y = self.log_rates[least - 1 : least + 2], self.log_samples[least - 1 : least + 2]
        curvature, slope, _ = np.polyfit(x - x[1], y, 2)
        return float(np.clip(x[1] - slope / (2 * curvature), x[0], x[-1])) if curvature > 0 else float(x[y.argmin()])

    def loss(self, log_rate: float) -> float:
        """Logarithm of the samples over the least."""
        return float(np.interp(log_rate, self.log_rates, self.log_samples)) - float(self.log_samples.min())


def trained(question: Question) -> dict[int, Rates]:
    """Train every size at its rates; a seed that misses the target counts with all the samples it had."""
    tuned = {entry.size: entry for entry in question.sweep()}
    most = MOST_OVER_FEWEST * min(mean(entry.samples) for entry in tuned.values())
    found = {}
    for size in (int(share * question.base_size) for share in SIZES):
        if size in tuned:
            rates = [tuned[size].lr * factor for factor in RATES]
            ends = [
                [training.samples_to_target for seed in SEEDS for training in question.truth.seeds(size, rate, [seed], most)]
                for rate in rates
            ]
            samples = [mean(end or most for end in of_rate) for of_rate in ends]
            found[size] = Rates(np.log(rates), np.log(samples), tuple(of_rate.count(None) for of_rate in ends))
    return found


def losses(rates: Mapping[int, Rates], noise_scale: float, factor: float) -> dict[tuple[int, int], float]:
    """Loss of every size at the rate that is carried to it, by (from, to)."""
    saturation = min(factor * noise_scale, _UNBOUNDED)
    return {
        (base, size): rates[size].loss(rates[base].best + math.log(saturating_gain(saturation, base, size)))
        for base, size in permutations(rates, 2)
    }


def measured_noise(question: Question) -> float:
    """Median of what `find` measures."""
    found = [rb.find(question.workload, budget=BUDGET, device="cpu", threads=1, seed=seed).findings.noise_scale for seed in range(FINDS)]
    return median(noise.value for noise in found if noise is not None and noise.value is not None)


def main() -> int:
    torch.set_num_threads(1)
    asked = live_regret.questions(live_regret.parser_of(__doc__).parse_args())
    rates = {question.name: trained(question) for question in asked}
    noise = {question.name: measured_noise(question) for question in asked}
    for name, by_size in rates.items():
        best = ", ".join(f"{size} at {math.exp(entry.best):.4g}" for size, entry in by_size.items())
        print(f"{name}: noise scale {noise[name]:.0f}; best rates {best}")
    print("mean loss by where the rule saturates, over the noise scale\n  factor  to larger  to smaller    all  " + "  ".join(rates))
    for factor in FACTORS:
        by_name = {name: losses(by_size, noise[name], factor) for name, by_size in rates.items()}
        pairs = [(pair, loss) for found in by_name.values() for pair, loss in found.items()]
        up, down = (mean(loss for (base, size), loss in pairs if (size > base) is upwards) for upwards in (True, False))
        own = "  ".join(f"{mean(found.values()):{len(name)}.1%}" for name, found in by_name.items())
        print(f"  {factor:6.1f} {up:10.1%} {down:11.1%} {mean(loss for _, loss in pairs):6.1%}  {own}")
    print("samples over the size's least, and seeds that missed the target, by rate over size over the workload's own")
    for question in asked:
        own_heat = question.trainer.base_lr / question.base_size
        for size, entry in rates[question.name].items():
            heats, over = np.exp(entry.log_rates) / size / own_heat, np.exp(entry.log_samples - entry.log_samples.min())
            shown = "  ".join(f"{h:5.2f}: {o:.2f} {m or '-'}" for h, o, m in zip(heats, over, entry.missed, strict=True))
            print(f"  {question.name:13} {size:4}  {shown}")
    place = environment(asked[0].trainer.rig(), "in-process")
    where = f"device {place.device_name} · versions {dict(place.versions)} · date {datetime.now(UTC).date()} · threads {place.threads}"
    print(f"{where} · seeds {len(SEEDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
