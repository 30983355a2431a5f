"""What a noise-adaptive batch gains over the best fixed size: the forecast before the training, and real trainings.

Run: nice python benchmarks/dynamic_gain.py [--only digits fashion_mnist] [--seeds 12] [--data DIR] [--course 2] [--json]

Two small CNNs train to a loss on their training set. Each is judged by `find`'s own measurements on this CPU, and on devices that are
simulated: the training is real, only the clock is a stated law t(b) = (b_half + b) / rate. For each device the forecast is made from what
`find` measured (a pilot of four epochs at most) with the device's step times; then the noise-adaptive schedule that is proposed trains, or
in one case growth instead of a decay of the rate, and so does every fixed size, with the rate coupled by the same rule and the same seeds.
Realised: mean log seconds over that of the best fixed size. Seconds are steps times step time, so they do not depend on how busy the
machine is. What `find` measured and every training are kept in the folder of --data (the record by default), and only what is missing is
measured or trained. Exit code 1: a goal does not hold.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import live_regret_workloads as workloads
import rightbatch as rb
from dynamic_gain_training import ScheduleTrainer, Trained, to_loss
from goals import Goal, exit_code, goal, goal_line
from live_regret_noise import along_a_run
from live_regret_policies import ProcessorClock
from live_regret_training import Trainer
from rightbatch.engine.meters import meters_for
from rightbatch.engine.provenance import environment
from rightbatch.engine.rig import Rig
from rightbatch.fits.noise_scale import fit_noise_scale
from rightbatch.fits.schedule_forecast import forecast_schedule
from rightbatch.fits.schedule_text import schedule_text
from rightbatch.fits.step_time import is_decided
from rightbatch.probes import step_time
from rightbatch.recommend.judgement import judge
from rightbatch.recommend.schedule import coupling_of, propose
from rightbatch.records.environment import Environment
from rightbatch.records.estimates import StepTimeCurve
from rightbatch.records.measurements import Contention, Measurements, StepTimeMeasurements, StepTimePoint
from rightbatch.records.plan import Constraints, Findings, Objective
from rightbatch.records.run import RunFolder
from rightbatch.records.schedule import BatchSchedule, ConstantSize, GrowthForDecay, ScheduleForecast, SizeCoupling
from rightbatch.training.batch_schedule import DynamicBatch

RECORD = Path(__file__).parent / "records" / "2026-11-25_cpu_dynamic-gain"
TIMED_SIZES = tuple(sorted({step << power for power in range(2, 9) for step in (2, 3)} | {1024}))
"""Of a simulated device."""
CPU_SIZES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Timed on this CPU."""
TIMING_S = 10.0
"""Processor seconds of the rounds."""
RATE = 10_000.0
"""Saturated samples a second of a simulated device: it drops out of every ratio."""
MOST_OFF, SMALL_GAIN = 0.05, 0.05
MOST_OVER_EXPECTED = 3.0
"""A training that takes so many times the expected samples is given up."""
FIND_BUDGET = "90s"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload with what it has to reach.

    Attributes:
        name: Of the case.
        workload: Builds it.
        target_loss: On the training set.
        expected_samples: That a user would plan for: what one training at the plan's size on this CPU takes, about.
        half_saturations: b_half of the simulated devices; none is this CPU.
        sizes: Fixed sizes.
        seeds: Trainings of each schedule and each fixed size.
        grow: Growth instead of decay: the fixed sizes divide their rate at the same samples. None: the noise-adaptive schedule.
    """

    name: str
    workload: Callable[[], rb.Workload]
    target_loss: float
    expected_samples: int
    half_saturations: tuple[int | None, ...]
    sizes: tuple[int, ...]
    seeds: int
    grow: GrowthForDecay | None = None


CASES = (
    Case(
        name="digits",
        workload=workloads.digits,
        target_loss=0.004,
        expected_samples=20_000,
        half_saturations=(None, 300),
        sizes=(32, 64, 96, 128, 192, 256, 384),
        seeds=10,
    ),
    Case(
        name="fashion_mnist",
        workload=workloads.fashion_mnist,
        target_loss=0.45,
        expected_samples=60_000,
        half_saturations=(None, 300),
        sizes=(64, 128, 192, 256),
        seeds=6,
    ),
    Case(
        name="fashion_mnist-decay",
        workload=workloads.fashion_mnist,
        target_loss=0.425,
        expected_samples=53_000,
        half_saturations=(300,),
        sizes=(48, 64, 96),
        seeds=5,
        grow=GrowthForDecay(start=64, factor=5.0, at_samples=(40_000, 60_000), largest=1024),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One workload on one device."""

    workload: str
    device: str
    schedule: str
    forecast: ScheduleForecast
    best_size: int
    realised: float
    standard_error: float
    fixed: dict[int, float]
    """Seconds of every fixed size over the best's."""
    ends: tuple[int, int]
    """First size, and median last size, of the schedule in use."""

    @property
    def predicted(self) -> float:
        """Forecast ratio of times."""
        return self.forecast.relative_time.value or float("nan")


class Trainings:
    """Trainings of one case, kept in a file.

    Args:
        path: The file.
        case: What is trained.
        findings: Of `find`, which the rates follow.
    """

    def __init__(self, path: Path, case: Case, findings: Findings) -> None:
        plan = findings.recommendation.plan
        assert plan is not None, "judge was asked for one"  # noqa: S101
        self._path, self._case = path, case
        workload, noise = findings.workload, coupling_of(findings).noise_scale_samples
        self._train = ScheduleTrainer(to_loss(case.workload()), case.target_loss, plan.lr or 0.0)
        self._kept: dict[str, dict] = json.loads(path.read_text()) if path.is_file() else {}
        self._most = MOST_OVER_EXPECTED * case.expected_samples
        self._rate = f"rate {workload.lr:g} at {workload.lr_batch_size} saturating at {noise:.4g}"

    def __call__(self, schedule: BatchSchedule, seeds: int) -> list[Trained]:
        """Return a training for each seed."""
        return [self._one(schedule, seed) for seed in range(seeds)]

    def _one(self, schedule: BatchSchedule, seed: int) -> Trained:
        key = f"{self._rate} {schedule_text(schedule)} loss {self._case.target_loss:g} seed {seed}"
        if key not in self._kept:
            made = self._train(DynamicBatch(schedule), seed, self._most)
            self._kept[key] = {"steps": made.steps, "samples": made.samples}
            self._path.write_text(json.dumps(self._kept, indent=0) + "\n")
            print(f"{self._case.name}: {key}: {made.samples and round(made.samples)} samples", file=sys.stderr, flush=True)
        kept = self._kept[key]
        return Trained(steps=tuple((size, count) for size, count in kept["steps"]), samples=kept["samples"])


def measured(case: Case, folder: Path) -> Measurements:
    """What `find` measures of a case, or what is in the folder; step times in processor seconds, because others use the machine."""
    file = folder / f"{case.name}_measurements.json"
    if not file.is_file():
        workload = case.workload()
        with tempfile.TemporaryDirectory() as out:
            rb.find(workload, budget=FIND_BUDGET, device="cpu", threads=1, isolation="in-process", out=Path(out) / "run")
            found = RunFolder.open(Path(out) / "run").read_measurements()
        assert found is not None, "find wrote it"  # noqa: S101
        file.write_text(found.model_copy(update={"step_time": timed(workload)}).model_dump_json() + "\n")
    return Measurements.model_validate_json(file.read_text())


def timed(workload: rb.Workload) -> StepTimeMeasurements:
    """Processor seconds of a step on this CPU, in interleaved rounds."""
    rig = Rig(workload=workload, device=torch.device("cpu"), meters=meters_for(torch.device("cpu")))
    rig.meters = replace(rig.meters, clock=ProcessorClock())
    idle = Contention(load_average_1m=0.0, cpu_count=1, other_processes_cpu=0.0)
    return step_time.measure(rig, CPU_SIZES, is_decided=is_decided, budget_s=TIMING_S, machine=idle, largest_affordable=None)


def simulated(half_saturation: int) -> StepTimeMeasurements:
    """Step times of the affine law."""
    return StepTimeMeasurements(
        points=tuple(StepTimePoint(micro_batch_size=b, step_times_s=((half_saturation + b) / RATE,) * 5) for b in TIMED_SIZES),
        optimizer_times_s=(0.0,),
        contention=Contention(load_average_1m=0.0, cpu_count=1, other_processes_cpu=0.0),
    )


def here() -> Environment:
    """Where this runs."""
    return environment(Rig(workload=workloads.digits(), device=torch.device("cpu"), meters=meters_for(torch.device("cpu"))), "in-process")


def findings_on(measurements: Measurements, half_saturation: int | None) -> Findings:
    """The verdict from the measurements, with the step times of a simulated device if one is named; memory and loader do not limit."""
    curve = measurements.step_time if half_saturation is None else simulated(half_saturation)
    return judge(
        measurements.model_copy(update={"step_time": curve, "memory": None, "loader": None}),
        environment=here(),
        objective=Objective(),
        constraints=Constraints(),
        measured_at=datetime.now(UTC).isoformat(),
        duration_s=0.0,
    )


def clock(curve: StepTimeCurve) -> Callable[[float], float]:
    """Seconds of a step at any size: the medians, interpolated in logarithms; beyond them the last throughput and the first step."""
    points = [(point.micro_batch_size, point.step_time_s.value or 0.0) for point in curve.points]
    sizes, times_s = np.log(np.array(points)).T

    def step_time_s(size: float) -> float:
        beyond = max(size / points[-1][0], 1.0)
        return beyond * float(np.exp(np.interp(np.log(size), sizes, times_s)))

    return step_time_s


def fixed_schedule(case: Case, size: int, coupling: SizeCoupling) -> BatchSchedule:
    """A fixed size; with the rate divided where the case has growth instead."""
    if case.grow is None:
        return ConstantSize(global_batch_size=size, coupling=coupling)
    return case.grow.model_copy(update={"start": size, "largest": size, "coupling": coupling})


def compare(case: Case, half_saturation: int | None, measurements: Measurements, folder: Path, seeds: int) -> Row:
    """Forecast and train one workload on one device."""
    findings = findings_on(measurements, half_saturation)
    assert findings.step_time is not None, "it was timed"  # noqa: S101
    coupling = coupling_of(findings)
    schedule = propose(findings, "noise", case.expected_samples)
    if case.grow is not None:
        schedule = case.grow.model_copy(update={"coupling": coupling})
    forecast = forecast_schedule(findings, schedule, case.expected_samples)
    device = "this CPU" if half_saturation is None else f"b_half {half_saturation}"
    train = Trainings(folder / f"{case.name}_trainings.json", case, findings)
    step_time_s = clock(findings.step_time)
    log_s = {size: np.log([one.seconds(step_time_s) for one in train(fixed_schedule(case, size, coupling), seeds)]) for size in case.sizes}
    dynamic = train(schedule, seeds)
    dynamic_log_s = np.log([one.seconds(step_time_s) for one in dynamic])
    best = min(log_s, key=lambda size: float(log_s[size].mean()))
    differences = dynamic_log_s - log_s[best]
    return Row(
        workload=case.name,
        device=device,
        schedule=schedule_text(schedule),
        forecast=forecast,
        best_size=best,
        realised=float(np.exp(differences.mean())),
        standard_error=float(differences.std(ddof=1) / np.sqrt(seeds)),
        fixed={size: float(np.exp(values.mean() - log_s[best].mean())) for size, values in log_s.items()},
        ends=(dynamic[0].steps[0][0], round(float(np.median([one.steps[-1][0] for one in dynamic])))),
    )


def course(case: Case, seeds: int) -> str:
    """The noise scale along whole runs at the workload's own size and rate, a line a run: what the forecast has to guess."""
    workload = case.workload()
    trainer = Trainer(workload, 1.0)
    lines = []
    for seed in range(seeds):
        found = along_a_run(trainer, workload.lr_batch_size or 1, trainer.base_lr, case.expected_samples, batch_norm=False, seed=seed)
        snapshots = fit_noise_scale(found).snapshots
        scales = ", ".join(f"{snapshot.noise_scale.value or float('nan'):.0f} at {snapshot.samples_seen}" for snapshot in snapshots)
        lines.append(f"{case.name}, seed {seed}, noise scale: {scales}")
    return "\n".join(lines)


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Forecast near what was realised, and right about what is worth it, with both answers among the rows."""
    found = [
        goal(
            f"predicted less realised ratio, {row.workload} on {row.device}",
            round(row.predicted - row.realised, 3),
            "ratio",
            f"within {MOST_OFF:g}",
            holds=abs(row.predicted - row.realised) <= MOST_OFF,
        )
        for row in rows
    ]
    small = [row for row in rows if not row.forecast.worth_it]
    most = max((1 - row.realised for row in small), default=None)
    found.append(
        goal(
            "largest gain realised where the forecast says not worth it",
            "no such row" if most is None else round(most, 3),
            "ratio",
            f"< {SMALL_GAIN:g}",
            holds=most is not None and most < SMALL_GAIN,
        )
    )
    worth = [row for row in rows if row.forecast.worth_it]
    least = min((1 - row.realised for row in worth), default=None)
    found.append(
        goal(
            "smallest gain realised where the forecast says worth it",
            "no such row" if least is None else round(least, 3),
            "ratio",
            "> 0",
            holds=least is not None and least > 0,
        )
    )
    return found


def show(row: Row) -> str:
    """Say one row in a paragraph."""
    estimate = row.forecast.relative_time
    fixed = "  ".join(f"{size}: {ratio:.3f}" for size, ratio in row.fixed.items())
    growth = row.forecast.noise_growth.value
    return "\n".join(
        (
            f"{row.workload} on {row.device}: {row.schedule}",
            f"  predicted {row.predicted:.3f} [{estimate.low:.3f}, {estimate.high:.3f}], best fixed {row.forecast.best_fixed_size}, "
            f"sizes {row.forecast.first_size} to {row.forecast.last_size}, "
            f"noise grows {'unknown' if growth is None else round(growth, 1)}-fold",
            f"  realised  {row.realised:.3f} (standard error {row.standard_error:.3f}), best fixed {row.best_size}, "
            f"sizes {row.ends[0]} to {row.ends[1]}",
            f"  fixed sizes over the best: {fixed}",
            *(f"  {reason}" for reason in row.forecast.reasons),
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="names of workloads")
    parser.add_argument("--seeds", type=int, help="trainings of each schedule and each fixed size; each workload's own number by default")
    parser.add_argument("--data", type=Path, default=RECORD, help="folder of measurements and trainings; the record by default")
    parser.add_argument("--course", type=int, default=0, help="show the noise scale along so many runs of each workload instead")
    parser.add_argument("--json", action="store_true", help="print one JSON document; the text goes to standard error")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.data.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        if options.course:
            print(course(case, options.course), flush=True)
            continue
        measurements = measured(case, options.data)
        for half_saturation in case.half_saturations:
            rows.append(compare(case, half_saturation, measurements, options.data, options.seeds or case.seeds))
            print(show(rows[-1]), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.course:
        return 0
    checked = goals(rows)
    place = here()
    where = {
        "device": place.device_name,
        "versions": dict(place.versions),
        "date": datetime.now(UTC).date().isoformat(),
        "n": {case.name: options.seeds or case.seeds for case in CASES},
        "threads": place.threads,
    }
    text = "\n".join((*map(goal_line, checked), " · ".join(f"{key} {value}" for key, value in where.items())))
    print(text, file=sys.stderr if options.json else sys.stdout)
    if options.json:
        listed = [asdict(row) | {"forecast": row.forecast.model_dump(mode="json")} for row in rows]
        print(json.dumps({"goals": checked, "rows": listed, "environment": where}, indent=2))
    return exit_code(checked)


if __name__ == "__main__":
    sys.exit(main())
