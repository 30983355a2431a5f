"""The truth that a choice is scored against: a sweep with the rate tuned at every size, kept training by training."""

import ast
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

REACH = 2
"""Doublings or halvings of the seeded rate that are tried while none reaches the target."""
MOST_EPOCHS = 100
"""Of a training when nothing has reached the target yet."""
MOST_OVER_FEWEST = 6.0
"""A training that takes so many times the fewest samples known is stopped: it counts as never."""
CONTENDS = 1.25
"""A rate within this factor of the best on the first seed is tried on all of them; one beyond it is stopped."""
EXTRA_RATES = 2
"""Smaller rates that are tried when every contender fails on some seed."""
SLACK_OF_SEEDS = 3.0
"""A seed that takes so many times the fewest samples of the first one fails."""
SLACK_OF_NEIGHBOUR = 3.0
"""Half or twice the size may take so many times the samples: twice is the worst that the law of the trade-off allows."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a training ended: the samples at which it reached the target, or none; the samples it took in any case."""

    samples_to_target: float | None
    samples_seen: int
    diverged: bool = False


Train = Callable[[int, float, int, float], Ending]
"""(size, rate, seed, most samples) -> ending."""


@dataclass(frozen=True, kw_only=True)
class Training(Ending):
    """One training as the cache keeps it."""

    size: int
    lr: float
    seed: int

    def answers(self, most_samples: float) -> bool:
        """Whether training again could not say more."""
        return self.samples_to_target is not None or self.diverged or self.samples_seen >= most_samples


class Truth:
    """The trainings of one workload, written to a file after every new one.

    Args:
        path: The file, which other workloads share.
        name: The workload.
        fingerprint: Of everything that decides how its trainings end; trainings of another one are dropped.
        train: Trains.
        say: Receives a line for every training.
    """

    def __init__(self, path: Path, name: str, fingerprint: str, train: Train, say: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._name, self._fingerprint, self._train, self._say = path, name, fingerprint, train, say
        kept = read_kept(path).get(name, {})
        rows = kept["trainings"] if kept.get("fingerprint") == fingerprint else []
        self._trainings = {(row["size"], row["lr"], row["seed"]): Training(**row) for row in rows}
        self._asked: set[tuple[int, float, int]] = set()

    @property
    def asked(self) -> tuple[Training, ...]:
        """Every training that was asked for until now, made or remembered."""
        return tuple(self._trainings[key] for key in sorted(self._asked))

    def training(self, size: int, lr: float, seed: int, most_samples: float) -> Training:
        """Return a training from the cache, or train."""
        lr = rounded(lr)
        self._asked.add((size, lr, seed))
        known = self._trainings.get((size, lr, seed))
        if known is not None and known.answers(most_samples):
            return known
        ending = self._train(size, lr, seed, most_samples)
        made = Training(size=size, lr=lr, seed=seed, **asdict(ending))
        self._trainings[size, lr, seed] = made
        self._write()
        words = "diverged" if made.diverged else "stopped" if made.samples_to_target is None else f"reached at {made.samples_to_target:.0f}"
        self._say(f"{self._name}: batch {size}, lr {lr:g}, seed {seed}: {words} after {made.samples_seen} samples")
        return made

    def seeds(self, size: int, lr: float, seeds: Iterable[int], most_samples: float, most_in_all: float = math.inf) -> tuple[Training, ...]:
        """Return the trainings of these seeds, up to the first that fails or with which all take more than ``most_in_all`` samples."""
        found: list[Training] = []
        left = most_in_all
        for seed in seeds:
            found.append(self.training(size, lr, seed, min(most_samples, left)))
            reached = found[-1].samples_to_target
            if reached is None or reached >= left:
                break
            left -= reached
        return tuple(found)

    def _write(self) -> None:
        document = dict(read_kept(self._path))
        rows = [asdict(self._trainings[key]) for key in sorted(self._trainings)]
        document[self._name] = {"fingerprint": self._fingerprint, "trainings": rows}
        write_kept(self._path, json.dumps(document, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The best rate at one size, and the samples to the target of every seed."""

    size: int
    lr: float
    samples: tuple[float, ...]


def sweep(truth: Truth, sizes: Sequence[int], base: tuple[int, float], train_size: int, seeds: int) -> tuple[Tuned, ...]:
    """Tune the rate at every size, from the base size outwards; sizes that never reach the target are left out, and end their direction.

    Args:
        truth: Trains, or remembers.
        sizes: Ascending.
        base: Size and rate to begin with.
        train_size: Samples of the training set.
        seeds: Trainings at the best rate.
    """
    base_size, base_lr = base
    first = min(sizes, key=lambda size: abs(size - base_size))
    tuned: dict[int, tuple[int, Tuned]] = {}
    upwards = [size for size in sizes if size >= first]
    downwards = [size for size in reversed(sizes) if size <= first]
    for way, shift in ((upwards, 1), (downwards, -1)):
        exponent, most = 0, float(MOST_EPOCHS * train_size)
        for size in way:
            if size not in tuned:
                found = _tune(truth, size, base_lr, exponent, most, seeds)
                if found is None:
                    break
                tuned[size] = found
            exponent = tuned[size][0] + shift
            fewest = min(mean(entry.samples) for _, entry in tuned.values())
            most = min(MOST_OVER_FEWEST * fewest, SLACK_OF_NEIGHBOUR * mean(tuned[size][1].samples))
    return tuple(tuned[size][1] for size in sorted(tuned))


def _tune(truth: Truth, size: int, base_lr: float, start: int, most: float, seeds: int) -> tuple[int, Tuned] | None:
    """Climb on the first seed; then every rate that came near its best is trained with all seeds, and the least mean wins."""

    def samples_at(exponent: int, most_samples: float) -> float | None:
        return truth.training(size, base_lr * 2.0**exponent, 0, most_samples).samples_to_target

    reached = hill_climb(samples_at, start, most)
    if not reached:
        return None
    order = sorted(reached, key=lambda exponent: reached[exponent])
    fewest = reached[order[0]]
    contenders = [exponent for exponent in order if reached[exponent] <= CONTENDS * fewest]
    best: tuple[int, Tuned] | None = None
    incumbent = SLACK_OF_SEEDS * fewest
    for exponent in (*contenders, *range(min(contenders) - 1, min(contenders) - 1 - EXTRA_RATES, -1)):
        if best is not None and exponent not in contenders:
            break
        lr = base_lr * 2.0**exponent
        found = truth.seeds(size, lr, range(seeds), SLACK_OF_SEEDS * fewest, incumbent * seeds)
        samples = tuple(training.samples_to_target for training in found if training.samples_to_target is not None)
        if len(samples) == seeds and mean(samples) < incumbent:
            best, incumbent = (exponent, Tuned(size=size, lr=rounded(lr), samples=samples)), mean(samples)
    return best


def hill_climb(samples_at: Callable[[int, float], float | None], start: int, most_samples: float, reach: int = REACH) -> dict[int, float]:
    """Walk from the start while the samples to the target become fewer; return them for every exponent that reached it in time.

    Args:
        samples_at: (exponent, most samples) -> samples to the target, or none when it was not reached within so many.
        start: Where to begin.
        most_samples: Of the first attempts; later ones are stopped once they are clearly worse than the best so far.
        reach: Steps from the start in each direction while nothing has reached the target.
    """
    reached: dict[int, float] = {}
    tried: set[int] = set()

    def improves(exponent: int) -> bool:
        tried.add(exponent)
        fewest = min(reached.values(), default=math.inf)
        samples = samples_at(exponent, min(most_samples, CONTENDS * fewest))
        if samples is not None:
            reached[exponent] = samples
        return samples is not None and samples < fewest

    for direction in (1, -1) if improves(start) else (-1, 1):
        at = min(reached, key=lambda exponent: reached[exponent]) if reached else start
        while at + direction not in tried and (reached or abs(at + direction - start) <= reach):
            at += direction
            if not improves(at) and reached:
                break
    return reached


def fingerprint(source: Path, *settings: object) -> str:
    """Hash a workload file without its comments and layout, and the settings of its trainings, to sixteen hexadecimal digits."""
    tree = ast.dump(ast.parse(source.read_text()))
    return hashlib.sha256(json.dumps([tree, *map(repr, settings)]).encode()).hexdigest()[:16]


def rounded(lr: float) -> float:
    """A rate to six digits, so that the cache finds it again."""
    return float(f"{lr:.6g}")


def write_kept(path: Path, text: str) -> None:
    """Put a text in the place of a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def read_kept(path: Path) -> Mapping[str, dict]:
    """Return the trainings that a file keeps by workload; nothing without the file."""
    return json.loads(path.read_text()) if path.is_file() else {}
