"""Kill the driver of a sweep at random moments, and see whether the sweep that is gone on with loses or repeats a trial.

Run: python benchmarks/sweep_kills.py [--kills 20] [--wait 0.5] [--jobs 2] [--seed 0] [--json]

Trials train nothing: they wait, and come to what a planted law says. After every SIGKILL, of which no process hears, all processes of
trials must end by themselves, and the same command is run again. At the end every trial of an undisturbed sweep must be there once, with
the same result. Exit code 1: a goal does not hold.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import optuna
import psutil

from goals import Goal, exit_code, goal, print_goals
from planted_sweeps import SIZES, TARGET, Law, summary, sweep
from rightbatch import __version__
from rightbatch.records.sweep import TrialResult
from rightbatch.records.sweep_folder import JOURNAL_FILE
from rightbatch.sweeps.request import SweepRequest
from rightbatch.sweeps.settings import scaling_rule, settings_of
from sweep_noop import MARK

SCRIPT = Path(__file__).with_name("sweep_noop.py")
ORPHANS_END_WITHIN_S = 10.0
SHARE_WHILE_STARTING, LONGEST_START_S = 0.25, 5.0
"""So many kills come while the driver starts, within so many seconds; the others at a random line of its progress."""


def undisturbed(options: argparse.Namespace) -> dict[str, TrialResult]:
    """What a sweep that nobody kills comes to, computed without any process."""
    sizes = SIZES[: options.sizes]
    request = SweepRequest(target=TARGET, sizes=sizes, seeds=options.seeds)
    settings = settings_of(request, summary(), None, slots=options.jobs)
    return {result.spec.model_dump_json(): result for result in sweep(Law(noise=0.1), settings, scaling_rule(summary(), None))}


def started(out: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    words = [sys.executable, str(SCRIPT), "--out", str(out), "--wait", str(options.wait), "--jobs", str(options.jobs)]
    return subprocess.Popen(
        [*words, "--sizes", str(options.sizes), "--seeds", str(options.seeds)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, MARK: str(out)},
    )


def killed_at_random(driver: subprocess.Popen[str], options: argparse.Namespace, rng: np.random.Generator) -> str | None:
    """Kill a driver while it starts, or some time after a random line of its progress; return when that was, none when it was quicker."""
    if rng.random() < SHARE_WHILE_STARTING:
        delay_s = float(rng.uniform(0, LONGEST_START_S))
        try:
            driver.wait(delay_s)
        except subprocess.TimeoutExpired:
            return _killed(driver, f"{delay_s:.2f} s after its start")
        return None
    lines, delay_s = int(rng.integers(1, options.lines)), float(rng.uniform(0, options.wait))
    for _ in range(lines):
        if not driver.stderr.readline():
            driver.wait()
            return None
    time.sleep(delay_s)
    return _killed(driver, f"{delay_s:.2f} s after line {lines} of its progress")


def _killed(driver: subprocess.Popen[str], when: str) -> str:
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    return when


def orphans(out: Path) -> list[psutil.Process]:
    """Processes of trials, and their template, that a killed driver left."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(out) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def orphans_end(out: Path) -> float:
    """Seconds until no process is left; infinite when some do not end."""
    start_s = time.monotonic()
    while time.monotonic() - start_s < ORPHANS_END_WITHIN_S:
        if not orphans(out):
            return time.monotonic() - start_s
        time.sleep(0.05)
    return float("inf")


def told(out: Path) -> Counter[str]:
    """How often each trial's result was told to the journal, from its raw lines; the last one may be half written."""
    file = out / JOURNAL_FILE
    counts: Counter[str] = Counter()
    for line in file.read_bytes().split(b"\n")[:-1] if file.exists() else ():
        result = json.loads(line).get("user_attr", {}).get("result")
        if result is not None:
            counts[TrialResult.model_validate(result).spec.model_dump_json()] += 1
    return counts


def kept(out: Path) -> dict[str, TrialResult]:
    """Results as Optuna itself reads them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / JOURNAL_FILE)))
    study = optuna.load_study(study_name="sweep", storage=storage)
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and "result" in trial.user_attrs]
    results = [TrialResult.model_validate(trial.user_attrs["result"]) for trial in finished]
    return {result.spec.model_dump_json(): result for result in results}


def kill_often(out: Path, options: argparse.Namespace, rng: np.random.Generator, kills: int) -> tuple[list[float], int]:
    """Kill the driver until the kills are used up or the sweep is complete; return the orphans' seconds after each, and lost results."""
    ends, lost = [], 0
    while len(ends) < kills:
        known = set(told(out))
        with started(out, options) as driver:
            when = killed_at_random(driver, options, rng)
        if when is None:
            break
        ends.append(orphans_end(out))
        after = set(told(out))
        lost += len(known - after)
        if not options.json:
            print(f"killed {when}: {len(after)} trials kept, orphans ended within {ends[-1]:.2f} s", flush=True)
    return ends, lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--wait", type=float, default=0.5, help="seconds that a trial takes")
    parser.add_argument("--lines", type=int, default=12, help="most lines of progress that a driver lives")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="batch sizes")
    parser.add_argument("--seeds", type=int, default=3, help="trainings at the best rate of each size")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args()
    goals, environment = benchmark(options)
    if options.json:
        print(json.dumps({"goals": goals, "environment": environment}, indent=2))
    else:
        print_goals(goals, environment)
    return exit_code(goals)


def benchmark(options: argparse.Namespace) -> tuple[list[Goal], dict[str, object]]:
    """Kill, go on, compare; sweep after sweep until the kills are used up."""
    rng = np.random.default_rng(options.seed)
    expected = undisturbed(options)
    sweeps, lost, missing, changed, twice = 0, 0, 0, 0, 0
    ends: list[float] = []
    start_s = time.monotonic()
    while len(ends) < options.kills:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "sweep"
            waits, gone = kill_often(out, options, rng, options.kills - len(ends))
            lost, ends, sweeps = lost + gone, ends + waits, sweeps + 1
            with started(out, options) as driver:
                driver.communicate()
            found, counts = kept(out), told(out)
            missing += len(expected.keys() ^ found.keys())
            changed += sum(expected[key] != found[key] for key in expected.keys() & found.keys())
            twice += sum(count > 1 for count in counts.values())
    goals: list[Goal] = [
        goal("kills of the driver", len(ends), "", f"{options.kills}", holds=len(ends) == options.kills),
        goal("trials missing or too many after going on", missing, "", "0", holds=missing == 0),
        goal("trials with another result", changed, "", "0", holds=changed == 0),
        goal("results lost by a kill", lost, "", "0", holds=lost == 0),
        goal("trials completed twice", twice, "", "0", holds=twice == 0),
        goal("longest life of an orphan", round(max(ends), 2), "s", f"< {ORPHANS_END_WITHIN_S:g}", holds=max(ends) < ORPHANS_END_WITHIN_S),
    ]
    environment = {
        "trials": len(expected),
        "sweeps": sweeps,
        "seconds": round(time.monotonic() - start_s, 1),
        "cpu_count": os.cpu_count(),
        "versions": {"rightbatch": __version__, "python": platform.python_version(), "optuna": optuna.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
    return goals, environment


if __name__ == "__main__":
    sys.exit(main())
