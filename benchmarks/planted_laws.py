"""What the whole of ``find`` recovers from devices whose laws are known: the cases of tests/planted_cases.py, as a table.

Run: python benchmarks/planted_laws.py [--json]

The device and its clock are planted, the gradients are real; nothing depends on the machine's speed. Exit code 1: a goal does not hold.
"""

import argparse
import json
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from planted_cases import CASES, PlantedCase, find_planted, planted_device, planted_knee
from rightbatch.errors import NothingFitsError
from rightbatch.records.estimates import Status
from rightbatch.records.plan import Binding, Findings

MOST_MISSES = 3
"""Of 23 intervals at 95 %, so many may miss the truth by chance."""
TRACED_SAMPLES = 7
"""The trace runs up to so many samples; where fewer fit, it runs out of memory and is caught."""
LOWER_BOUNDS = ("noise swamps the signal",)
"""Cases whose noise cannot be bounded from above."""


@dataclass(frozen=True)
class Row:
    """One case: what was planted and what was found."""

    case: PlantedCase
    findings: Findings | None
    out_of_memory_errors: int
    largest_run: int

    @property
    def planted_ceiling(self) -> int:
        return 0 if self.case.out_of_memory_at_one else self.case.ceiling or self.case.train_size

    @property
    def found_ceiling(self) -> int:
        return 0 if self.findings is None else self.findings.memory.ceiling or 0

    @property
    def knees(self) -> tuple[int, int]:
        """Planted and found."""
        sizes = tuple(point.micro_batch_size for point in self.findings.step_time.points)
        return planted_knee(self.case, sizes), self.findings.step_time.knee

    @property
    def knee_is_near(self) -> bool:
        sizes = [point.micro_batch_size for point in self.findings.step_time.points]
        planted, found = self.knees
        return abs(sizes.index(planted) - sizes.index(found)) <= 1

    @property
    def noise_is_inside(self) -> bool:
        noise = self.findings.noise_scale
        return noise.low <= self.case.noise_scale and (noise.high is None or self.case.noise_scale <= noise.high)

    @property
    def status_is_right(self) -> bool:
        if self.findings is None:
            return self.case.out_of_memory_at_one
        noise, recommendation = self.findings.noise_scale, self.findings.recommendation
        if self.case.name in LOWER_BOUNDS:
            return noise.status is Status.AT_LEAST and recommendation.status == "inconclusive"
        is_loader_bound = recommendation.binding_constraint is Binding.LOADER
        return noise.status is Status.OK and recommendation.status == "ok" and is_loader_bound == (self.case.name == "loader-bound")

    @property
    def memory_was_respected(self) -> bool:
        return self.largest_run <= self.planted_ceiling and (self.out_of_memory_errors == 0 or self.planted_ceiling < TRACED_SAMPLES)


def measure(case: PlantedCase) -> Row:
    """Run one case."""
    try:
        findings, device = find_planted(case)
    except NothingFitsError:
        return Row(case, None, planted_device(case).out_of_memory_errors, 0)
    return Row(case, findings, device.out_of_memory_errors, device.largest_run)


def line(row: Row) -> str:
    """One line of the table."""
    start = f"{row.case.name:31}{row.planted_ceiling:>7}{row.found_ceiling:>7}"
    if row.findings is None:
        return f"{start}{'':55}nothing fits"
    noise = row.findings.noise_scale
    value = "-" if noise.value is None else f"{noise.value:.3g}"
    interval = f"[{noise.low:.3g}, {'-' if noise.high is None else format(noise.high, '.3g')}]"
    planted, found = row.knees
    status = row.findings.recommendation.status
    return (
        f"{start}{planted:>7}{found:>7}{row.case.noise_scale:>9g}{value:>10} {interval:21} {status:13}{row.out_of_memory_errors:>2}"
        f"  batch {row.findings.recommendation.plan.global_batch_size}"
    )


def goals(rows: list[Row]) -> list[dict[str, object]]:
    """Every goal, with its value and whether it holds."""
    fitting = [row for row in rows if row.findings is not None]
    counted = (
        ("ceilings found exactly", sum(row.planted_ceiling == row.found_ceiling for row in rows), len(rows)),
        ("knees found, or their neighbour", sum(row.knee_is_near for row in fitting), len(fitting)),
        ("noise scales inside their 95 % interval", sum(row.noise_is_inside for row in fitting), len(fitting) - MOST_MISSES),
        ("statuses and loader limits as planted", sum(row.status_is_right for row in rows), len(rows)),
        ("cases without a probe above the limit", sum(row.memory_was_respected for row in rows), len(rows)),
    )
    return [
        {"name": name, "value": value, "unit": "cases", "goal": f">= {least}", "holds": value >= least} for name, value, least in counted
    ]


def environment() -> dict[str, object]:
    return {
        "device": "planted device (gradients on the cpu)",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("rightbatch", "torch", "numpy", "scipy")},
        "date": datetime.now(UTC).date().isoformat(),
        "n": len(CASES),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    as_json = parser.parse_args().json
    rows = []
    if not as_json:
        print(
            f"{'case':31}{'ceiling':>7}{'found':>7}{'knee':>7}{'found':>7}{'noise':>9}{'found':>10} {'95 % interval':21} {'status':11} oom"
        )
    for case in CASES:
        rows.append(measure(case))
        if not as_json:
            print(line(rows[-1]), flush=True)
    reached = goals(rows)
    if as_json:
        print(json.dumps({"goals": reached, "environment": environment()}, indent=2))
    else:
        for goal in reached:
            print(f"{'ok  ' if goal['holds'] else 'FAIL'} {goal['name']}: {goal['value']} of {len(CASES)} (goal {goal['goal']})")
        print(" · ".join(f"{key} {value}" for key, value in environment().items()))
    return 0 if all(goal["holds"] for goal in reached) else 1


if __name__ == "__main__":
    sys.exit(main())
