"""Whether torchdata's StatefulDataLoader and BatchLoader go on as if nothing had happened, where sizes are decided while training.

Run: pip install --no-deps --target DIR torchdata==0.11.0; PYTHONPATH=DIR python benchmarks/loader_torchdata.py [--json]

An epoch of 61 samples whose transforms draw random numbers; each step decides the size of later batches. It is run once whole and once
with an interruption after 5 steps, after which a new loader goes on from the state, read with ``weights_only``. StatefulDataLoader gets
a sampler that saves how far it has drawn; BatchLoader one of its own. Exit code 1: BatchLoader does not go on as if nothing had happened.
"""

import argparse
import io
import json
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rightbatch as rb
from goals import exit_code, goal, print_goals
from rightbatch.records.schedule import BatchSetting

SAMPLES, STOP, DECIDED = 61, 5, (3, 9, 4, 17, 2, 6)


class Transformed:
    """The index of each sample beside a draw of each global generator."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.randrange(10**9), np.random.randint(10**9), torch.randint(10**9, ()).item()])  # noqa: NPY002, S311


class Decided:
    """The size that was decided last."""

    size = DECIDED[0]

    def setting_at(self, samples_seen: int) -> BatchSetting:  # noqa: ARG002
        return BatchSetting(global_batch_size=self.size)


class DrawnPosition:
    """A batch sampler as torchdata's documentation has one: its state is how far it has drawn."""

    def __init__(self, schedule: Decided) -> None:
        self.schedule, self.drawn = schedule, 0
        self.order = np.random.default_rng(0).permutation(SAMPLES).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        if self.drawn >= SAMPLES:
            raise StopIteration
        start, self.drawn = self.drawn, self.drawn + self.schedule.setting_at(self.drawn).global_batch_size
        return self.order[start : self.drawn]

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def stateful(schedule: Decided, workers: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Transformed(), batch_sampler=DrawnPosition(schedule), num_workers=workers)


def ours(schedule: Decided, workers: int) -> rb.BatchLoader:
    plan = rb.BatchPlan(global_batch_size=DECIDED[0], micro_batch_size=DECIDED[0])
    return rb.BatchLoader(Transformed(), plan, schedule=schedule, num_workers=workers)


def epoch(make: Any, workers: int, *, stop: int | None) -> tuple[list[Tensor], int]:
    """Batches of an epoch, interrupted or not, and the bytes of the saved state."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    schedule, batches, file = Decided(), [], io.BytesIO()
    loader = make(schedule, workers)
    for batch in loader:
        schedule.size = DECIDED[len(batches) % len(DECIDED)]
        batches.append(batch)
        if len(batches) == stop:
            torch.save(loader.state_dict(), file)
            break
    else:
        return batches, 0
    file.seek(0)
    loader = make(schedule, workers)
    loader.load_state_dict(torch.load(file, weights_only=True))
    for batch in loader:
        schedule.size = DECIDED[len(batches) % len(DECIDED)]
        batches.append(batch)
    return batches, len(file.getvalue())


def row_of(name: str, make: Any, workers: int) -> dict[str, object]:
    whole, _ = epoch(make, workers, stop=None)
    resumed, state_bytes = epoch(make, workers, stop=STOP)
    return {
        "loader": name,
        "num_workers": workers,
        "each sample once": sorted(torch.cat(resumed)[:, 0].tolist()) == list(range(SAMPLES)),
        "same sizes": [len(batch) for batch in resumed] == [len(batch) for batch in whole],
        "same samples and draws": len(resumed) == len(whole) and all(map(torch.equal, resumed, whole)),
        "state_bytes": state_bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # StatefulDataLoader calls what torch deprecates
        try:
            rows = [row_of(n, make, w) for n, make in (("StatefulDataLoader", stateful), ("BatchLoader", ours)) for w in (0, 2)]
        except ImportError as error:
            sys.exit(f"torchdata must be importable: {error}; see the top of {__file__}.")
    goals = [
        goal(f"BatchLoader, {row['num_workers']} workers: goes on as if nothing had happened", value, "", "True", holds=value)
        for row in rows
        if row["loader"] == "BatchLoader"
        for value in [row["each sample once"] and row["same sizes"] and row["same samples and draws"]]
    ]
    environment = {"torch": torch.__version__}
    if options.json:
        print(json.dumps({"goals": goals, "rows": rows, "environment": environment}, indent=2))
    else:
        for row in rows:
            print(", ".join(f"{key} {value}" for key, value in row.items()))
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
