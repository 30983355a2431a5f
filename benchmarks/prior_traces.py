"""Train small networks at a ladder of batch sizes, with the rate left as it is or scaled with the size: what priors are set on.

Run: nice python benchmarks/prior_traces.py --data cifar10_jpeg.npz [--only NAME ...] [--out FOLDER]

Each training runs its epochs through, and its metric is kept along the way (``curves.json``: only what that file lacks is trained).
From the curves come several targets at no further cost, and one file, ``traces.csv``: the epochs to the first evaluation at the target,
empty where it was never reached. Regimes: ``fixed``, the customary rate at all sizes; ``coupled``, with the square root of the size, for
SGD with the size itself, from the size at which the rate is customary; ``tuned``, the sweeps of live_regret.py, which are kept already.
Targets, by workload and regime: 97 % of what the worst size comes to, as the loose one; what three quarters of the sizes come to, as the
usual one; what half of them come to, as the hard one. One thread, on the CPU.
"""

import argparse
import ast
import csv
import hashlib
import json
import math
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

import prior_traces_workloads as workloads
from live_regret_training import Trainer
from live_regret_truth import read_kept, write_kept
from prior_traces_workloads import Ladder
from rightbatch.fits.lr_scaling import SGD_FAMILY

RECORD = Path(__file__).parent / "records" / "2026-11-25_cpu_prior-traces"
SWEEPS = Path(__file__).parent / "records" / "2026-11-24_cpu_live-regret" / "truth.json"
SEEDS = 3
PROTOCOL = 1
"""Raised when a change here alters how a training goes: curves of another protocol are not used."""
HEADER = ("workload", "regime", "optimizer", "batch_size", "lr", "lr_batch_size", "seed", "target", "epochs_to_target")
TUNED = {
    "digits": ("digits/wide-cnn/sgd", 1200, 64, 0.1),
    "fashion_mnist": ("fashion-mnist/cnn/sgd", 20_000, 32, 0.02),
    "cifar10": ("cifar10/bn-cnn/sgd", 20_000, 128, 0.05),
}
"""Name, training samples, ``lr_batch_size`` and rate of the workloads of live_regret.py."""
LOOSE_SHARE = 0.97


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The metric at every evaluation of one training, ``evaluations`` in an epoch; shorter where the training diverged."""

    size: int
    lr: float
    seed: int
    metric: tuple[float, ...]


def train(trainer: Trainer, ladder: Ladder, size: int, lr: float, seed: int) -> Curve:
    """Train through all epochs; the seed sets weights and order."""
    train_size = len(ladder.workload.train)
    every = train_size / ladder.evaluations
    metric: list[float] = []
    decay = ladder.decay
    for trainee, seen, loss in trainer.steps(size, lr, seed):
        if decay is not None and seen >= decay[0] * train_size:
            for group in trainee.optimizer.param_groups:
                group["lr"] *= decay[1]
            decay = None
        while seen >= (len(metric) + 1) * every:
            metric.append(round(trainer.metric(trainee), 4))
        if len(metric) >= ladder.epochs * ladder.evaluations or not math.isfinite(float(loss)):
            break
    return Curve(size=size, lr=lr, seed=seed, metric=tuple(metric))


def rate(ladder: Ladder, regime: str, base_lr: float, size: int) -> float:
    """The rate at a size, as people set it."""
    tuned_at = ladder.workload.lr_batch_size or size
    kappa = 1.0 if regime == "fixed" else size / tuned_at
    return float(f"{base_lr * (kappa if optimizer_name(ladder) in SGD_FAMILY else math.sqrt(kappa)):.6g}")


def optimizer_name(ladder: Ladder) -> str:
    return type(ladder.workload.optimizer([torch.nn.Parameter(torch.zeros(1))])).__name__ if ladder.workload.optimizer else ""


class Curves:
    """The curves of one ladder, written to a file after every new one.

    Args:
        path: The file, which other ladders share.
        name: The ladder.
        key: Of everything that decides how its trainings go; curves of another one are dropped.
    """

    def __init__(self, path: Path, name: str, key: str) -> None:
        self._path, self._name, self._key = path, name, key
        kept = read_kept(path).get(name, {})
        rows = kept["curves"] if kept.get("fingerprint") == key else []
        self._known = {(row["size"], row["lr"], row["seed"]): Curve(**{**row, "metric": tuple(row["metric"])}) for row in rows}

    def get(self, size: int, lr: float, seed: int, make: Callable[[int, float, int], Curve]) -> Curve:
        """Return a curve from the file, or make and keep it."""
        if (size, lr, seed) not in self._known:
            start_s = time.thread_time()
            self._known[size, lr, seed] = curve = make(size, lr, seed)
            self._write()
            words = f"best {max(curve.metric, default=0)}, {time.thread_time() - start_s:.1f} s"
            print(
                f"{self._name}: batch {size}, lr {lr:g}, seed {seed}: {words}",
                file=sys.stderr,
                flush=True,
            )
        return self._known[size, lr, seed]

    def _write(self) -> None:
        document = dict(read_kept(self._path))
        document[self._name] = {"fingerprint": self._key, "curves": [vars(self._known[key]) for key in sorted(self._known)]}
        text = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in document.items())
        write_kept(self._path, f"{{{text}}}\n")


def fingerprint(name: str) -> str:
    """Hash the workload's function and all that the ladders share, without comments and layout, to sixteen hexadecimal digits."""
    tree = ast.parse(Path(workloads.__file__).read_text())
    others = {*workloads.LADDERS, *workloads.NEED_DATA} - {name}
    nodes = [ast.dump(node) for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name in others)]
    return hashlib.sha256(json.dumps([nodes, PROTOCOL, platform.python_version()]).encode()).hexdigest()[:16]


def targets(curves: Sequence[Curve]) -> tuple[float, ...]:
    """The loose, the usual and the hard target of one workload with one way to set its rate, ascending."""
    sizes = sorted({curve.size for curve in curves})
    best = sorted(median(max(curve.metric, default=0.0) for curve in curves if curve.size == size) for size in sizes)
    found = (LOOSE_SHARE * best[0], best[len(best) // 4], best[len(best) // 2])
    return tuple(sorted({round(value, 4) for value in found}))


def epochs_to(curve: Curve, target: float, evaluations: int) -> float | None:
    """Epochs to the first evaluation at the target; none when there is none."""
    return next(((index + 1) / evaluations for index, value in enumerate(curve.metric) if value >= target), None)


def rows_of(ladder: Ladder, curves: Mapping[str, Sequence[Curve]]) -> Iterator[tuple[object, ...]]:
    """The lines of the file, by regime."""
    workload = ladder.workload
    for regime, of_regime in curves.items():
        for target in targets(of_regime):
            for curve in of_regime:
                epochs = epochs_to(curve, target, ladder.evaluations)
                start = (workload.name, regime, optimizer_name(ladder), curve.size, curve.lr, workload.lr_batch_size)
                yield (*start, curve.seed, target, "" if epochs is None else f"{epochs:g}")


def tuned_rows(path: Path) -> Iterator[tuple[object, ...]]:
    """The lines of the sweeps that are kept: every size at the rate of fewest samples that all seeds reached the target with.

    Sweeps try a rate times powers of two; other rates are those of plans that were trained beside them.
    """
    for name, kept in read_kept(path).items():
        workload, train_size, base_size, base_lr = TUNED[name]
        samples: dict[tuple[int, float], dict[int, float | None]] = defaultdict(dict)
        for row in kept["trainings"]:
            if math.log2(row["lr"] / base_lr).is_integer():
                samples[row["size"], row["lr"]][row["seed"]] = row["samples_to_target"]
        whole = {key: list(of.values()) for key, of in samples.items() if len(of) >= SEEDS and None not in of.values()}
        for size in sorted({size for size, _ in whole if size & (size - 1) == 0}):
            lr = min((lr for other, lr in whole if other == size), key=lambda lr: mean(whole[size, lr]))
            for seed, needed in sorted(samples[size, lr].items()):
                yield (workload, "tuned", "SGD", size, lr, base_size, seed, "", f"{needed / train_size:.4g}")


def trained(name: str, ladder: Ladder, path: Path) -> dict[str, list[Curve]]:
    """All curves of one ladder by regime, trained where the file lacks them."""
    store, trainer = Curves(path, name, fingerprint(name)), Trainer(ladder.workload, 1.0)

    def make(size: int, lr: float, seed: int) -> Curve:
        return train(trainer, ladder, size, lr, seed)

    return {
        regime: [
            store.get(size, rate(ladder, regime, trainer.base_lr, size), seed, make)
            for size in reversed(ladder.sizes)
            for seed in range(SEEDS)
        ]
        for regime in ladder.regimes
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 in one of the forms of examples/cifar10.py")
    parser.add_argument("--only", nargs="+", default=[], help="names of ladders to train; traces.csv is written only when all are there")
    parser.add_argument("--out", type=Path, default=RECORD, help="folder of curves.json and traces.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = {**workloads.LADDERS, **{name: lambda make=make: make(options.data) for name, make in workloads.NEED_DATA.items()}}
    chosen = options.only or list(made)
    lines: list[tuple[object, ...]] = []
    for name in chosen:
        ladder = made[name]()
        lines += rows_of(ladder, trained(name, ladder, options.out / "curves.json"))
    if chosen == list(made):
        lines += tuned_rows(SWEEPS)
        with (options.out / "traces.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER, *lines])


if __name__ == "__main__":
    main()
