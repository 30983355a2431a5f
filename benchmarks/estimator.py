"""Is the noise scale unbiased, do its intervals cover, what do other libraries say on the same gradients, and is it exact on a network.

Run: python benchmarks/estimator.py [--json]

Gradients are isotropic and Gaussian in 64 dimensions, drawn without replacement from finite populations whose noise scale is known
exactly. One thread, fixed seeds. Exit code 1: a goal does not hold.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np
import torch
from scipy.signal import lfilter
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import rightbatch as rb
from goals import Goal, exit_code, goal, print_goals
from noise_recipes import RECIPES, Floats
from rightbatch.engine.gradients import GradientBlocks, flat_gradient
from rightbatch.engine.step import Trainee, backward_mean, clear_gradients
from rightbatch.fits.noise_scale import fit_snapshot, noise_moments
from rightbatch.fits.noise_stream import StepWeights, fit_noise_stream, step_moments
from rightbatch.records.estimates import Estimate, NoiseScale, Status
from rightbatch.records.gradient_norms import GradientNorms
from rightbatch.records.measurements import NoiseStream
from rightbatch.training.noise_blocks import MeasuredStep, NoiseBlocks
from rightbatch.workload.objective import Objective

DIMENSION = 64
MICRO_SIZE, MICRO_COUNT = 2, 4
BATCH = MICRO_SIZE * MICRO_COUNT
EQUAL = StepWeights(total=MICRO_COUNT, squares=MICRO_COUNT, squares_per_sample=MICRO_COUNT / MICRO_SIZE)
RATIOS = (1, 10, 100, 1000)
"""Noise scale over micro-batch size."""
SHARES_DRAWN = (0.25, 0.8)
FROZEN_DRAWS, STREAM_RUNS, PEER_RUNS = 1500, 400, 200
CORRELATION_STEPS, STREAM_STEPS, SPREAD = 20, 1280, 0.4
MULTIPLES = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
"""Samples over the noise scale."""
FEW = 0.35
"""So few noise scales of samples that many an interval is a half-line."""
FACTOR_WANTED, SHARE_WITHIN = 1.3, 0.68
Row = dict[str, object]


def population(rng: np.random.Generator, noise_scale: float, size: int) -> Floats:
    """Per-sample gradients whose mean has length 1 and whose covariance has trace ``noise_scale``, exactly."""
    samples = rng.standard_normal((size, DIMENSION))
    samples -= samples.mean(axis=0)
    samples *= math.sqrt(noise_scale * (size - 1) / (samples**2).sum())
    samples[:, 0] += 1.0
    return samples


def norms_of(micro: Floats, dataset_size: int) -> GradientNorms:
    """Norms of micro-batch gradients (micro, parameters), in at most 64 blocks as the probe records them."""
    length = 2 ** max(0, math.ceil(math.log2(len(micro) / 64)))
    starts = np.arange(0, len(micro), length)
    sums = np.add.reduceat(micro, starts)
    return GradientNorms(
        samples_seen=0,
        micro_batch_size=MICRO_SIZE,
        dataset_size=dataset_size,
        block_counts=tuple(np.diff(np.append(starts, len(micro))).tolist()),
        block_sq_norm_sums=tuple(np.add.reduceat((micro**2).sum(axis=1), starts).tolist()),
        block_gram=tuple(map(tuple, (sums @ sums.T).tolist())),
    )


def streamed(trace: Floats, sq_norm: Floats) -> NoiseScale:
    """What the monitor says after steps with these estimates of tr Sigma and |G|**2."""
    blocks = NoiseBlocks()
    for index, (s, g) in enumerate(zip(trace, sq_norm, strict=True)):
        blocks.add(MeasuredStep(np.array([s]), np.array([g]), MICRO_COUNT, BATCH, BATCH * (index + 1)))
    return fit_noise_stream(NoiseStream(layers=("all",), blocks=blocks.records(), samples_seen=BATCH * len(trace), batch_norm=False))


def covers(estimate: Estimate | NoiseScale, truth: float) -> bool:
    return estimate.low is not None and estimate.low <= truth and (estimate.high is None or truth <= estimate.high)


def frozen(ratio: int, share_drawn: float, multiple: float = 4) -> Row:
    """Bias and coverage of a snapshot of so many noise scales of samples, and of 32 micro-batches at least."""
    rng = np.random.default_rng(ratio)
    truth = float(ratio * MICRO_SIZE)
    samples = max(round(multiple * ratio), 32) * MICRO_SIZE
    size = round(samples / share_drawn)
    everyone = population(rng, truth, size)
    values, covered, half_lines = [], 0, 0
    for _ in range(FROZEN_DRAWS):
        micro = everyone[rng.permutation(size)[:samples]].reshape(-1, MICRO_SIZE, DIMENSION).mean(axis=1)
        fit = fit_snapshot(norms_of(micro, size))
        values.append((fit.grad_noise_trace.value, fit.grad_sq_norm.value))
        covered += covers(fit.noise_scale, truth)
        half_lines += fit.noise_scale.status is Status.AT_LEAST
    trace, sq_norm = np.mean(values, axis=0)
    return {
        "noise scale / micro-batch": ratio,
        "share drawn": share_drawn,
        "samples": samples,
        "draws": FROZEN_DRAWS,
        "bias of tr Sigma": trace / truth - 1,
        "bias of |G|^2": sq_norm - 1,
        "bias of the ratio of sums": trace / sq_norm / truth - 1,
        "standard error": float(np.std(values, axis=0)[1] / math.sqrt(FROZEN_DRAWS)),
        "covered": covered / FROZEN_DRAWS,
        "half-lines": half_lines / FROZEN_DRAWS,
    }


def wandering(rng: np.random.Generator, spread: float) -> Floats:
    """A positive process of mean 1 whose logarithm is autoregressive over 20 steps."""
    keep = math.exp(-1 / CORRELATION_STEPS)
    shocks = rng.standard_normal(STREAM_STEPS) * math.sqrt(1 - keep**2)
    shocks[0] = rng.standard_normal()
    return np.asarray(np.exp(spread * lfilter([1.0], [1.0, -keep], shocks) - spread**2 / 2))


def streaming(ratio: int, spread: float) -> Row:
    """Coverage of the long-run noise scale by runs whose true gradient and noise wander, each step drawn from its exact distribution."""
    rng = np.random.default_rng(ratio)
    truth, covered, half_lines = float(ratio * MICRO_SIZE), 0, 0
    traces, sq_norms = 0.0, 0.0
    for _ in range(STREAM_RUNS):
        true_trace, true_sq_norm = truth * wandering(rng, spread), wandering(rng, spread)
        freedom = DIMENSION * (MICRO_COUNT - 1)
        trace = true_trace * rng.chisquare(freedom, STREAM_STEPS) / freedom
        variance = true_trace / DIMENSION / BATCH
        along = np.sqrt(true_sq_norm) + rng.standard_normal(STREAM_STEPS) * np.sqrt(variance)
        sq_norm = along**2 + variance * rng.chisquare(DIMENSION - 1, STREAM_STEPS) - trace / BATCH
        fit = streamed(trace, sq_norm)
        traces, sq_norms = traces + trace.sum(), sq_norms + sq_norm.sum()
        covered += covers(fit, truth)
        half_lines += fit.status is Status.AT_LEAST
    return {
        "noise scale / micro-batch": ratio,
        "spread of the logarithms": spread,
        "steps": STREAM_STEPS,
        "runs": STREAM_RUNS,
        "bias of the ratio of sums": traces / sq_norms / truth - 1,
        "covered": covered / STREAM_RUNS,
        "half-lines": half_lines / STREAM_RUNS,
    }


def by_steps(gradients: Floats, dataset_size: int) -> float:
    """Ours, from steps as the monitor sees them."""
    micro = gradients.mean(axis=2)
    trace, sq_norm = step_moments((micro**2).sum(axis=(1, 2)), (micro.sum(axis=1) ** 2).sum(axis=1), EQUAL, dataset_size=dataset_size)
    value = streamed(trace, sq_norm).value
    return math.inf if value is None else value


def at_once(gradients: Floats, dataset_size: int) -> float:
    """Ours, from all micro-batches at frozen parameters."""
    moments = noise_moments(norms_of(gradients.mean(axis=2).reshape(-1, DIMENSION), dataset_size))
    return math.inf if moments is None or moments.sq_norm <= 0 else moments.trace / moments.sq_norm


METHODS: dict[str, Callable[[Floats, int], float]] = {"rightbatch, frozen": at_once, "rightbatch, streaming": by_steps} | {
    name: lambda gradients, _size, recipe=recipe: recipe(gradients) for name, recipe in RECIPES.items()
}


def same_draws(ratio: int, multiple: float, share_drawn: float) -> dict[str, Floats]:
    """What each method says over the truth, run by run, on the same runs of so many noise scales of samples."""
    rng = np.random.default_rng(7)
    truth = float(ratio * MICRO_SIZE)
    steps = max(10, math.ceil(multiple * truth / BATCH))
    size = round(steps * BATCH / share_drawn)
    everyone = population(rng, truth, size)
    said: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(PEER_RUNS):
        gradients = everyone[rng.permutation(size)[: steps * BATCH]].reshape(steps, MICRO_COUNT, MICRO_SIZE, DIMENSION)
        for name, method in METHODS.items():
            said[name].append(method(gradients, size) / truth)
    return {name: np.array(values) for name, values in said.items()}


def within(values: Floats) -> float:
    """Share of runs within the factor wanted."""
    return float(((values > 1 / FACTOR_WANTED) & (values < FACTOR_WANTED)).mean())


def compare(ratio: int) -> list[Row]:
    return [
        {
            "noise scale / micro-batch": ratio,
            "method": name,
            "runs": PEER_RUNS,
            "median over truth": float(np.median(values)),
            "within a factor 1.3": within(values),
            "not positive or infinite": float((~((values > 0) & np.isfinite(values))).mean()),
        }
        for name, values in same_draws(ratio, 4, 0.8).items()
    ]


def samples_needed() -> dict[str, float | None]:
    """Fewest samples, in noise scales, at which 68 % of runs are within a factor 1.3, at a noise scale of 100 micro-batches."""
    needed: dict[str, float | None] = dict.fromkeys(METHODS)
    for multiple in MULTIPLES:
        for name, values in same_draws(100, multiple, 0.25).items():
            if needed[name] is None and within(values) >= SHARE_WITHIN:
                needed[name] = multiple
    return needed


def difference_on_network() -> dict[str, float]:
    """Largest relative difference to per-sample gradients by torch.func, of a CNN without normalisation in float64."""
    torch.manual_seed(0)
    count, size = 16, 4
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 10))
    model.double()
    images, labels = torch.randn(count * size, 3, 16, 16).double(), torch.randint(0, 10, (count * size,))
    weights = dict(model.named_parameters())
    per_sample = vmap(grad(lambda w, x, y: cross_entropy(functional_call(model, w, (x[None],)), y[None])), (None, 0, 0))
    rows = torch.cat(
        [g.detach().flatten(1) for g in per_sample({k: v.detach() for k, v in weights.items()}, images, labels).values()], dim=1
    )
    micro = rows.numpy().reshape(count, size, -1).mean(axis=1)
    trace = size * micro.var(axis=0, ddof=1).sum()
    products = micro @ micro.T
    sq_norm = (products.sum() - np.trace(products)) / count / (count - 1) + trace / len(images)
    parts = list(zip(images.split(size), labels.split(size), strict=True))

    trainee = Trainee(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        scaler=None,
        objective=Objective(loss=cross_entropy),
    )
    blocks = GradientBlocks()
    for part in parts:
        clear_gradients(trainee)
        backward_mean(trainee, [part])
        blocks.add(flat_gradient(trainee.parameters))
    clear_gradients(trainee)
    norms = GradientNorms(
        samples_seen=0,
        micro_batch_size=size,
        dataset_size=len(images),
        block_counts=blocks.counts(),
        block_sq_norm_sums=blocks.sq_norm_sums(),
        block_gram=blocks.gram(),
    )
    moments = noise_moments(norms)
    with rb.NoiseMonitor(model, trainee.optimizer, dataset_size=len(images)) as monitor:
        for x, y in parts:
            with monitor.micro_batch(size):
                cross_entropy(model(x), y).backward()
        trainee.optimizer.step()
        (step,) = monitor.stream.blocks
    said = {"frozen": (moments.trace, moments.sq_norm), "streaming": (sum(step.trace_sums), sum(step.sq_norm_sums))}
    return {name: max(abs(s / trace - 1), abs(g / sq_norm - 1)) for name, (s, g) in said.items()}


def goals_of(
    frozen_rows: Sequence[Row],
    weak_rows: Sequence[Row],
    stream_rows: Sequence[Row],
    needed: dict[str, float | None],
    network: dict[str, float],
) -> list[Goal]:
    bias = max(abs(row[name]) for row in frozen_rows for name in ("bias of tr Sigma", "bias of |G|^2", "bias of the ratio of sums"))
    covered = [row["covered"] for row in frozen_rows]
    mean, low, high = float(np.mean(covered)), min(covered), max(covered)
    weak_low = min(row["covered"] for row in weak_rows)
    half_lines = float(np.mean([row["half-lines"] for row in weak_rows]))
    stream_low = min(row["covered"] for row in stream_rows)
    ours = needed["rightbatch, frozen"]
    off = max(network.values())
    return [
        goal("largest bias, frozen", round(100 * bias, 2), "%", "<= 2", holds=bias <= 0.02),
        goal("95 % intervals covering, frozen, all rows", round(100 * mean, 1), "%", "93 to 97", holds=0.93 <= mean <= 0.97),
        goal("the row that covers least, frozen", round(100 * low, 1), "%", ">= 93", holds=low >= 0.93),
        goal("the row that covers most, frozen", round(100 * high, 1), "%", "<= 97", holds=high <= 0.97),
        goal(f"covering where {half_lines:.0%} are half-lines, frozen", round(100 * weak_low, 1), "%", ">= 93", holds=weak_low >= 0.93),
        goal("the row that covers least, streaming", round(100 * stream_low, 1), "%", ">= 92", holds=stream_low >= 0.92),
        goal("samples for a factor 1.3, frozen", ours, "noise scales", "<= 2", holds=ours is not None and ours <= 2),
        goal("largest difference to per-sample gradients", float(off), "relative", "<= 1e-10", holds=off <= 1e-10),
    ]


def text_of(rows: Sequence[Row]) -> str:
    lines = ["  ".join(f"{name:>{max(len(name), 9)}}" for name in rows[0])]
    lines += ["  ".join(f"{_cell(value):>{max(len(name), 9)}}" for name, value in row.items()) for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    frozen_rows = [frozen(ratio, share) for ratio in RATIOS for share in SHARES_DRAWN]
    weak_rows = [frozen(ratio, SHARES_DRAWN[0], FEW) for ratio in RATIOS[2:]]
    stream_rows = [streaming(ratio, spread) for ratio in (10, 100) for spread in (0.0, SPREAD)]
    peer_rows = [row for ratio in RATIOS for row in compare(ratio)]
    needed, network = samples_needed(), difference_on_network()
    goals = goals_of(frozen_rows, weak_rows, stream_rows, needed, network)
    environment = {
        "device": platform.processor() or platform.machine(),
        "threads": 1,
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "rightbatch": rb.__version__,
        },
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    rows = {"frozen": frozen_rows, "frozen_few_samples": weak_rows, "streaming": stream_rows, "same_draws": peer_rows}
    if options.json:
        parts = {"goals": goals, **rows, "noise_scales_of_samples_for_1.3": needed, "difference_on_network": network}
        print(json.dumps(parts | {"environment": environment}, indent=2))
    else:
        for name, part in rows.items():
            print(f"{name}\n{text_of(part)}\n")
        print("noise scales of samples for a factor 1.3 in 68 % of runs: " + ", ".join(f"{k} {v or 'more'}" for k, v in needed.items()))
        print("difference to per-sample gradients: " + ", ".join(f"{name} {value:.1e}" for name, value in network.items()) + "\n")
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
