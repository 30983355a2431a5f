"""What ``find`` costs and what it brings: its seconds, those of its repetition and of the help, and the throughput of its choice.

Run: python benchmarks/find_speed.py [--workload FILE.py:FUNCTION]... [--json] [-- ARGUMENTS OF THE FUNCTION]

Throughputs come from the interleaved rounds of one run, so they can be compared; other processes change the seconds. Exit code 1: a goal
does not hold.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from rightbatch.records.plan import Findings
from rightbatch.units import format_number

DIGITS = f"{Path(__file__).resolve().parents[1] / 'examples' / 'digits.py'}:workload"
COMMON = 128
STARTS = 15
"""Starts of each of the two programs that the help is compared by."""
ANSWERED = {0, 5}
MODULES = "import sys; from rightbatch.cli import main; main(['--help']); print('torch' in sys.modules, file=sys.stderr)"

Goal = dict[str, object]


def timed(command: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a command; return its seconds and how it ended."""
    start_s = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return time.perf_counter() - start_s, ended


def find(workload: str, arguments: list[str], out: Path) -> tuple[float, Findings]:
    """Run ``find`` as a user does; return its seconds and what it found."""
    words = [sys.executable, "-m", "rightbatch", "find", workload, "--out", str(out), "--json", "--quiet"]
    seconds, ended = timed([*words, *(["--", *arguments] if arguments else [])])
    if ended.returncode not in ANSWERED:
        sys.exit(f"find must answer; it ended with {ended.returncode}: {ended.stderr.strip() or ended.stdout.strip()}")
    return seconds, Findings.model_validate_json(ended.stdout)


def throughputs(findings: Findings) -> list[tuple[str, int, float | None, str]]:
    """Return (label, global batch size, samples a second, evidence) of the choice, of the common size and of the largest timed."""
    by_size = {point.global_batch_size: point for point in findings.tradeoff.points} if findings.tradeoff else {}
    plan = findings.recommendation.plan
    sizes = [("chosen", plan.global_batch_size)] if plan else []
    sizes.append(("common", COMMON))
    if findings.step_time and findings.step_time.points:
        sizes.append(("largest timed", findings.step_time.points[-1].micro_batch_size))
    rows = []
    for label, size in sizes:
        point = by_size.get(size)
        rows.append((label, size, point.samples_per_s if point else None, point.evidence if point else "not timed"))
    return rows


def help_times_s() -> tuple[float, float]:
    """Median seconds of ``rightbatch --help`` and of an empty program, started in turns."""
    ours, empty = [], []
    for _ in range(STARTS):
        ours.append(timed([sys.executable, "-m", "rightbatch", "--help"])[0])
        empty.append(timed([sys.executable, "-c", "pass"])[0])
    return statistics.median(ours), statistics.median(empty)


def goal(name: str, value: float, unit: str, wanted: str, *, holds: bool) -> Goal:
    return {"name": name, "value": value, "unit": unit, "goal": wanted, "holds": holds}


def benchmark(workload: str, arguments: list[str], *, quiet: bool) -> tuple[list[Goal], Findings]:
    """Find, find again, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        first_s, findings = find(workload, arguments, Path(folder) / "run")
        second_s, again = find(workload, arguments, Path(folder) / "run")
    if not again.reused_parts:
        sys.exit(f"a second identical find must reuse the first; {workload} was measured again.")
    rates = throughputs(findings)
    name = findings.workload.name if workload != DIGITS else "digits"
    plan, ceiling = findings.recommendation.plan, findings.memory.ceiling if findings.memory else None
    if not quiet:
        print(f"{workload}: status {findings.recommendation.status}, find {first_s:.1f} s, repeated {second_s:.2f} s")
        for label, size, rate, evidence in rates:
            print(f"  {label:14}{size:>7}{'-' if rate is None else format_number(rate):>12} samples/s  {evidence}")
        rounds = findings.step_time.points[0].step_time_s.n if findings.step_time else 0
        print(f"  from {rounds} interleaved rounds, memory ceiling {ceiling}")
    largest_is_chosen = plan is not None and plan.global_batch_size == ceiling
    return [
        goal(f"find, {name}", round(first_s, 2), "s", "<= 60", holds=first_s <= 60),
        goal(f"second identical find, {name}", round(second_s, 2), "s", "< 1", holds=second_s < 1),
        goal(
            f"chosen is not simply the largest, {name}", not largest_is_chosen, "", "true", holds=plan is not None and not largest_is_chosen
        ),
    ], findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", action="append", help="FILE.py:FUNCTION; may be repeated; examples/digits.py by default")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    goals: list[Goal] = []
    for workload in options.workload or [DIGITS]:
        reached, findings = benchmark(workload, words[end + 1 :], quiet=options.json)
        goals += reached
    help_s, empty_s = help_times_s()
    imports_torch = timed([sys.executable, "-c", MODULES])[1].stderr.strip().endswith("True")
    goals.append(goal("rightbatch --help", round(help_s, 3), "s", "<= 0.2", holds=help_s <= 0.2))
    goals.append(goal("help imports torch", imports_torch, "", "false", holds=not imports_torch))
    place = findings.environment
    environment = {
        "device": place.device_name,
        "cpu_count": place.cpu_count,
        "threads": place.threads,
        "versions": dict(place.versions),
        "date": datetime.now(UTC).date().isoformat(),
        "n": STARTS,
        "help_over_empty_program": round(help_s / empty_s, 2),
        "contention": list(findings.step_time.reasons) if findings.step_time else [],
    }
    if options.json:
        print(json.dumps({"goals": goals, "environment": environment}, indent=2))
    else:
        for reached in goals:
            print(
                f"{'ok  ' if reached['holds'] else 'FAIL'} {reached['name']}: {reached['value']} {reached['unit']} (goal {reached['goal']})"
            )
        print(" · ".join(f"{key} {value}" for key, value in environment.items()))
    return 0 if all(reached["holds"] for reached in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
