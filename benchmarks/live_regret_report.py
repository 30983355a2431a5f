"""The results of live_regret.py as text and as one document."""

from dataclasses import asdict
from statistics import mean, stdev

import live_regret_noise as noise
from live_regret_scoring import Row, Score, rate_saturation
from rightbatch.records.estimates import Estimate, NoiseScale

FOUND = {"recommendation", "step_time", "noise_scale", "tradeoff"}
"""Of the findings of `find`: what tells where it loses time."""


def show(row: Row) -> str:
    """Return one workload as tables."""
    best_s = row.scores[0].seconds or 1.0
    lines = [
        f"{row.name}, {row.target}; sweep {row.sweep_s:.0f} s of steps, budget of find {row.budget_s:.0f} s; times are over the best",
        "    size  best rate  samples to target: mean  standard error  us a sample  time",
    ]
    for entry in row.tuned:
        samples, rate = mean(entry.samples), row.sample_s[entry.size]
        error = stdev(entry.samples) / len(entry.samples) ** 0.5 if len(entry.samples) > 1 else 0.0
        lines.append(
            f"  {entry.size:6d}  {entry.lr:9.4g}  {samples:23.0f}  {error:14.0f}  {1e6 * rate:11.1f}  {samples * rate / best_s:4.2f}"
        )
    fit = row.hyperbola
    lines += [
        f"  critical batch size of the sweep {fit.critical_batch_size:.0f} [{fit.low:.0f}, {fit.high:.0f}], rms of log E {fit.error:.3f}",
        f"  the tuned rates stop growing at {rate_saturation(row.tuned):.0f}",
        "  policy                   size      rate    time   error  seconds  cost of the sweep",
        *(_policy(entry) for entry in row.scores),
        *(f"  {word}" for word in row.missing),
        *(f"  {word}" for word in noise_lines(row)),
    ]
    return "\n".join(lines)


def _policy(entry: Score) -> str:
    policy = entry.policy
    time = f"{'' if entry.reached else '>'}{entry.relative:.2f}"
    error = "never" if entry.standard_error is None else f"{entry.standard_error:.2f}"
    seconds = "-" if entry.seconds is None else f"{entry.seconds:.2f}"
    line = f"  {policy.name:21s} {policy.size:7d} {policy.lr:9.4g} {time:>7s} {error:>7s} {seconds:>8s} {entry.cost_share:8.1%}"
    return f"{line}  {policy.note}".rstrip()


def noise_lines(row: Row) -> list[str]:
    """Say how the noise scale grew along the runs, and what it has to do with the critical batch size."""
    if not row.noise:
        return []
    run = row.noise[0]
    fits = [noise.average_until(each, 1.0) for each in row.noise]
    lines = [f"noise scale along runs at batch {run.pilot_batch_size}, rate {run.pilot_lr or 0:g}; one column a seed:"]
    lines += [
        f"  at {points[0].samples_seen:7d}:" + "".join(f"  {_interval(point.noise_scale):>24s}" for point in points)
        for points in zip(*(fit.snapshots for fit in fits), strict=True)
    ]
    lines.append("  average:   " + "".join(f"  {_interval(fit):>24s}" for fit in fits))
    whole = noise.mean_until(row.noise, 1.0)
    if whole is None:
        return lines
    for share in noise.PILOT_SHARES:
        value = noise.mean_until(row.noise, share)
        if value is not None:
            lines.append(f"average over the first {share:.0%}: {value:.0f}; growth from there to the whole run {whole / value:.2f}")
    if row.findings is not None and row.findings.noise_scale is not None and row.findings.noise_scale.value:
        given = row.findings.noise_scale
        lines.append(f"pilot of find, {given.pilot_samples} samples: {_interval(given)}; growth {whole / (given.value or whole):.2f}")
    c = row.hyperbola.critical_batch_size / whole
    return [*lines, f"average over whole runs {whole:.0f}; calibration c = critical batch size of the sweep over it = {c:.2f}"]


def _interval(scale: Estimate | NoiseScale) -> str:
    low, value, high = (("-" if number is None else f"{number:.0f}") for number in (scale.low, scale.value, scale.high))
    return f"{value} [{low}, {high}]"


def document(row: Row) -> dict[str, object]:
    """Return one workload for a program to read."""
    return {
        "name": row.name,
        "target": row.target,
        "sweep": [{**asdict(entry), "seconds_per_sample": row.sample_s[entry.size]} for entry in row.tuned],
        "sweep_s": row.sweep_s,
        "find_budget_s": row.budget_s,
        "policies": [{**asdict(entry), "reached": entry.reached, "regret": entry.regret} for entry in row.scores],
        "missing": row.missing,
        "critical_batch_size": asdict(row.hyperbola),
        "rate_saturation": rate_saturation(row.tuned),
        "found": None if row.findings is None else row.findings.model_dump(mode="json", include=FOUND),
        "noise_along_runs": [noise.average_until(run, 1.0).model_dump(mode="json") for run in row.noise],
        "lines": noise_lines(row),
    }
