"""Print the simulated figures that docs/theory quotes: ``PYTHONPATH=tests python tests/oracles/simulate_claims.py`` (about 20 s)."""

import math
import sys

import numpy as np

from oracles.oracle_memory import ceiling_by_counting, ceiling_of, peak_of, recorded, search, trace_of
from oracles.oracle_noise import gaussian_gradients, norms_of
from rightbatch.fits.intervals import median_estimate, student_quantile
from rightbatch.fits.noise_scale import fit_noise_scale, noise_moments
from rightbatch.records.estimates import Status
from rightbatch.records.measurements import GradientNoiseMeasurements, Outcome
from rightbatch.units import GIB, MIB

BATCH, SEEN, RUNS = 32, (0, 1000, 4000), 800
SHARES = np.array([0.125, 0.5, 0.375])


def delta_on_log(snapshots):
    """95 % interval of the run's noise scale by the delta method on its logarithm; none where G is not positive."""
    parts = [noise_moments(norms) for norms in snapshots]
    weights = SHARES / np.array([BATCH * max(p.sq_norm, 0.0) + p.trace for p in parts])
    trace, sq_norm = (float(weights @ np.array([getattr(p, name) for p in parts])) for name in ("trace", "sq_norm"))
    if sq_norm <= 0:
        return None
    variance = sum(
        w**2 * (p.var_trace / trace**2 - 2 * p.cov / (trace * sq_norm) + p.var_sq_norm / sq_norm**2)
        for w, p in zip(weights, parts, strict=True)
    )
    half_width = student_quantile(sum(p.dof for p in parts)) * math.sqrt(variance)
    return trace / sq_norm * math.exp(-half_width), trace / sq_norm * math.exp(half_width)


def compare_intervals(scales, rng):
    """Share of runs covered by Fieller and by the delta method, and share of half-lines."""
    weights = SHARES / (1 + np.array(scales) / BATCH)
    truth = weights @ np.array(scales) / weights.sum()
    by_fieller = by_delta = half_lines = 0
    for _ in range(RUNS):
        gradients = [gaussian_gradients(rng, samples=144, noise_scale=scale, dimension=40) for scale in scales]
        snapshots = tuple(
            norms_of(g, micro_batch_size=4, block_counts=(3,) * 12, samples_seen=seen) for g, seen in zip(gradients, SEEN, strict=True)
        )
        estimate = fit_noise_scale(
            GradientNoiseMeasurements(snapshots=snapshots, pilot_batch_size=BATCH, pilot_lr=0.1, pilot_samples=4000, batch_norm=False)
        )
        by_fieller += estimate.low is not None and estimate.low <= truth and (estimate.high is None or truth <= estimate.high)
        half_lines += estimate.status is Status.AT_LEAST
        interval = delta_on_log(snapshots)
        by_delta += interval is not None and interval[0] <= truth <= interval[1]
    return by_fieller / RUNS, by_delta / RUNS, half_lines / RUNS


def search_noisy_device(noise, rng, searches=300):
    """Search devices whose use is off by up to ``noise`` at random, recordings included.

    Returns the share of searches that met a size over the limit, the median ceiling over the largest size that fits without noise and over
    the largest that fits always, and the median and largest number of probes with a proof.
    """
    trace = trace_of((300 * MIB, 2 * MIB, 0), (100 * MIB, 5 * MIB, 0), (0, MIB, 2048))
    exact = ceiling_by_counting(lambda b: law(trace, b), 6 * GIB, 10**6)
    always = ceiling_by_counting(lambda b: law(trace, b) * (1 + noise), 6 * GIB, 10**6)
    over, ceilings, probes = 0, [], []
    for _ in range(searches):

        def used(size):
            return round(law(trace, size) * rng.uniform(1 - noise, 1 + noise))

        points = search(recorded(trace, used), used, 6 * GIB, 10**6)
        over += any(point.outcome is not Outcome.RAN for point in points)
        ceilings.append(ceiling_of(points))
        probes.append(len(points) + all(point.micro_batch_size != ceilings[-1] + 1 for point in points))
    found = float(np.median(ceilings))
    return over / searches, found / exact, found / always, float(np.median(probes)), max(probes)


def law(trace, size):
    """Bytes that the noisy device uses: 1.3 times the trace, and a context."""
    return 1.3 * peak_of(trace, size) + 80 * MIB


def median_coverage(rounds, rng, draws=2000):
    """Share of intervals of a median over so many rounds that hold the truth; rounds spread log-normally by 5 %."""
    found = (median_estimate(np.exp(0.05 * rng.standard_normal(rounds)).tolist(), rng) for _ in range(draws))
    return float(np.mean([estimate.low <= 1 <= estimate.high for estimate in found]))


def main():
    rng = np.random.default_rng(1)
    for scales in ((20.0, 60.0, 120.0), (50.0, 200.0, 400.0), (10.0, 10.0, 10.0)):
        fieller, delta, half_lines = compare_intervals(scales, rng)
        sys.stdout.write(f"{scales}: Fieller covers {fieller:.3f}, delta on log {delta:.3f}, half-lines {half_lines:.3f}\n")
    for noise in (0.0, 0.005, 0.02, 0.05, 0.1):
        over, of_exact, of_always, median, most = search_noisy_device(noise, np.random.default_rng(1))
        sys.stdout.write(
            f"use off by {noise:.1%}: over the limit in {over:.3f} of searches, median ceiling {of_exact:.3f} of the one without noise and "
            f"{of_always:.3f} of the one that always fits, probes with proof {median:g} in the median and {most} at most\n"
        )
    covered = ", ".join(f"{rounds}: {median_coverage(rounds, np.random.default_rng(1)):.3f}" for rounds in (3, 4, 5, 7, 10, 20))
    sys.stdout.write(f"intervals of a median that hold it, by rounds: {covered}\n")


if __name__ == "__main__":
    main()
