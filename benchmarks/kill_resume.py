"""Kill -9 at random moments: does ``rightbatch train --resume`` always go on, and end with the very weights of a run that nobody killed?

Run: python benchmarks/kill_resume.py [--kills 50] [--workloads FILE.py] [--seed 0] [--json]

Every session is ``rightbatch train`` in a process forked from this one, which has imported torch but run nothing, so that a session costs
no import. It writes a checkpoint after every step, so that many kills hit a write. A killed training is resumed until it ends, then its
last checkpoint is compared bit by bit with that of a run that nobody killed; then the next begins. CPU, one thread; without and with two
loader workers; at a constant size, along a geometric schedule, and following the noise. The network has dropout, batch normalisation and
random transforms, a moving average and a scheduler. Exit code 1: a goal does not hold.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import torch
import torch.utils.tensorboard
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rightbatch as rb
from goals import exit_code, goal, print_goals
from rightbatch.cli import main as rightbatch
from rightbatch.cli import stored, train  # noqa: F401  # what a session needs is imported before it is forked
from rightbatch.report import training  # noqa: F401
from rightbatch.training import session  # noqa: F401

HERE = Path(__file__).resolve()
SAMPLES = 2000
MOST_KILLS = 5
"""Of one training; then it is left to end."""
CASES = {
    "constant, 0 workers": ("--plan", "32"),
    "constant, 2 workers": ("--plan", "32", "--", "--workers", "2"),
    "geometric, 0 workers": ("--plan", "32", "--schedule", f"geometric:8..64@{SAMPLES}"),
    "by the noise, 2 workers": ("--plan", "32", "--schedule", "noise:16,8..256,half=200,c=1", "--noise-every", "4", "--", "--workers", "2"),
}
LONGEST_S = 120


class Jittered(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random images, moved and disturbed at random whenever one is read."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 4, (size,), generator=generator)
        self.images = torch.randn(size, 1, 8, 8, generator=generator) + self.labels.view(-1, 1, 1, 1) * 0.5

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].roll(random.randint(-1, 1), -1)  # noqa: S311
        return image + 0.1 * torch.randn(1, 8, 8), int(self.labels[index])


def average(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=True)


def workload(workers: int = 0) -> rb.Workload:
    """A small network with everything that has a state."""
    return rb.Workload(
        model=lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 4)
        ),
        train=Jittered(600, 0),
        valid=Jittered(100, 1),
        loss=cross_entropy,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.003),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.003, total_steps=2 * SAMPLES // 32),
        average=average,
        metric=lambda scores, labels: (scores.argmax(1) == labels).float().mean().item(),
        num_workers=workers,
    )


def start(spec: str, words: tuple[str, ...], folder: Path, *, resume: bool) -> int:
    """Fork a session; return its process."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    os.setsid()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "output.txt").open("ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    end = words.index("--") if "--" in words else len(words)
    options = ("--samples", str(SAMPLES), "--out", str(folder), "--checkpoint-every", "1ms", "--threads", "1", "--device", "cpu")
    given = ("train", spec, *words[:end], *options, *(("--resume",) if resume else ()), *words[end:])
    code = 70
    try:
        code = rightbatch(given)
    finally:
        os._exit(code)


def ended(process: int, within_s: float) -> int | None:
    """Wait for a session; return its exit code, or none when it still runs."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def final_state(folder: Path) -> dict[str, object]:
    """What must be the same: weights, average and optimizer of the last checkpoint."""
    last = max(folder.glob("checkpoint-*.pt"))
    state = torch.load(last, weights_only=True)["state"]
    return {key: state[key] for key in ("model", "average", "optimizer")} | {"step": int(last.name.split("-")[1])}


def is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def steps_in_log(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "step"]


class Tally:
    """What came of the kills."""

    def __init__(self) -> None:
        self.kills = self.in_a_write = self.resumes = self.failed = 0
        self.same: list[bool] = []
        self.log_is_whole: list[bool] = []


def reference(spec: str, words: tuple[str, ...], folder: Path) -> tuple[dict[str, object], float]:
    """Run a case without a kill; return what it came to, and its seconds."""
    start_s = time.monotonic()
    code = ended(start(spec, words, folder, resume=False), LONGEST_S)
    if code != 0:
        sys.exit(f"the run that nobody kills must end well; it ended with {code}:\n{(folder.parent / 'output.txt').read_text()[-2000:]}")
    return final_state(folder), time.monotonic() - start_s


def killed_until_done(
    spec: str,
    words: tuple[str, ...],
    folder: Path,
    wanted: dict[str, object],
    duration_s: float,
    draw: random.Random,
    tally: Tally,
    most: int,
) -> None:
    """Start a training, kill and resume it until it ends or the kills are used up, then let it end; compare what it came to."""
    resume = False
    while True:
        process = start(spec, words, folder, resume=resume)
        tally.resumes += resume
        code = ended(process, draw.uniform(0.05, 0.5) * duration_s if tally.kills < most else LONGEST_S)
        if code is not None:
            break
        kill(process)
        tally.kills += 1
        tally.in_a_write += any(folder.glob(".checkpoint.*.tmp"))
        resume = True
    tally.failed += code != 0
    tally.same.append(code == 0 and is_same(final_state(folder), wanted))
    steps = steps_in_log(folder) if code == 0 else [1, 1]
    tally.log_is_whole.append(steps == sorted(set(steps)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many sessions are killed")
    parser.add_argument("--workload", default=f"{HERE}:workload", help="another FILE.py:FUNCTION, with a parameter `workers`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # the first optimizer of a process imports most of torch
    draw, start_s, tally = random.Random(options.seed), time.monotonic(), Tally()  # noqa: S311  # moments, not secrets
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        wanted = {name: reference(options.workload, words, root / f"reference {name}") for name, words in CASES.items()}
        for number, (name, words) in enumerate(cycle(CASES.items())):
            if tally.kills >= options.kills:
                break
            before = tally.kills
            killed_until_done(
                options.workload, words, root / f"{number} {name}", *wanted[name], draw, tally, min(options.kills, before + MOST_KILLS)
            )
            rows[f"{number} {name}"] = {"kills": tally.kills - before, "same": tally.same[-1]}
            if not options.json:
                print(
                    f"{name}: {tally.kills - before} kills, ended {'with the same weights' if tally.same[-1] else 'DIFFERENTLY'}",
                    flush=True,
                )
    goals = [
        goal("kills", tally.kills, "", f">= {options.kills}", holds=tally.kills >= options.kills),
        goal("of these in the middle of writing a checkpoint", tally.in_a_write, "", "> 0", holds=tally.in_a_write > 0),
        goal("resumed sessions that failed", tally.failed, f"of {tally.resumes}", "0", holds=tally.failed == 0),
        goal("trainings that ended bit by bit as without a kill", sum(tally.same), f"of {len(tally.same)}", "all", holds=all(tally.same)),
        goal("logs with every step once", sum(tally.log_is_whole), f"of {len(tally.log_is_whole)}", "all", holds=all(tally.log_is_whole)),
    ]
    environment = {
        "device": platform.processor() or platform.machine(),
        "threads": 1,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "rightbatch": rb.__version__},
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.monotonic() - start_s, 1),
        "uninterrupted_s": {name: round(duration_s, 2) for name, (_, duration_s) in wanted.items()},
    }
    if options.json:
        print(json.dumps({"goals": goals, "trainings": rows, "environment": environment}, indent=2))
    else:
        print_goals(goals, environment)
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
