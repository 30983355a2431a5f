"""Hand-made ``Findings`` for tests of the report.

``good()`` is one consistent story: a CNN with 10 M parameters on a CPU, trained with Adagrad, whose optimizer step is so dear (11 ms) that
accumulating pays until 512. Its step times follow t(b) = (t0**p + (b / tau)**p)**(1/p) and its costs (1 + B_crit / b) * t(b).
"""

from rightbatch.records.devices import DeviceCurve, DevicePoint, Interconnect
from rightbatch.records.environment import Environment
from rightbatch.records.estimates import (
    Certificate,
    Estimate,
    LoaderCurve,
    LoaderThroughput,
    MemoryAlternative,
    MemoryCurve,
    MemoryHolder,
    MemoryShare,
    NoiseScale,
    NoiseSnapshot,
    PowerOfTwo,
    Status,
    StepTimeCurve,
    ThroughputPoint,
    Tradeoff,
    TradeoffPoint,
)
from rightbatch.records.lr_range import LrRange, LrVerdict
from rightbatch.records.measurements import MemoryLimit, MemoryPoint, Outcome, WorkloadSummary
from rightbatch.records.plan import BatchPlan, Binding, Comparison, Findings, LrCoupling, Objective, Recommendation, Sensitivity

MIB = 2**20
FIXED_TIME_S, SATURATED_SAMPLES_PER_S, EXPONENT, OPTIMIZER_TIME_S, CRITICAL_BATCH_SIZE = 0.012, 3750.0, 3.0, 0.011, 2400.0
HOSTILE_NAME = "</script><script>alert(1)</script>"
HOSTILE_MARKUP = "[red]x[/red] <img src=x onerror=alert(2)> \x1b[31m\u202e {{ 7*7 }}"


def _step_time_s(micro_batch_size: int, accumulation_steps: int = 1) -> float:
    micro = (FIXED_TIME_S**EXPONENT + (micro_batch_size / SATURATED_SAMPLES_PER_S) ** EXPONENT) ** (1 / EXPONENT)
    return accumulation_steps * (micro - OPTIMIZER_TIME_S) + OPTIMIZER_TIME_S


def _around(value: float, spread: float, n: int = 9) -> Estimate:
    return Estimate(value=value, low=value / (1 + spread), high=value * (1 + spread), n=n)


def _shares(*sizes_bytes: int) -> tuple[MemoryShare, ...]:
    names = ("parameters", "gradients", "optimizer state", "inputs", "activations and temporaries")
    return tuple(MemoryShare(name=name, size_bytes=size) for name, size in zip(names, sizes_bytes, strict=True))


def workload(name: str = "train.py:workload") -> WorkloadSummary:
    return WorkloadSummary(
        name=name,
        train_size=60_000,
        valid_size=10_000,
        parameter_count=10_021_642,
        trainable_parameter_count=10_021_642,
        batch_norm=False,
        loss_reduction="mean",
        optimizer="Adagrad",
        optimizer_given=True,
        weight_decay=0.0,
        lr=0.1,
        lr_batch_size=128,
        num_workers=None,
        precision="fp32",
        channels_last=False,
        compiled=False,
    )


def environment() -> Environment:
    return Environment(
        device="cpu",
        device_name="Example processor with 8 cores",
        device_total_bytes=16 * 2**30,
        cpu_count=8,
        threads=8,
        operating_system="Linux 6.1",
        versions=(("rightbatch", "0.1.0"), ("torch", "2.13.0"), ("python", "3.11.9")),
        precision="fp32",
        isolation="child",
        seed=0,
        flags=(("mkldnn", "on"),),
    )


def memory() -> MemoryCurve:
    fixed, per_sample = 150 * MIB, 1.21 * MIB

    def used(size: int) -> int:
        return round(fixed + per_sample * size)

    sizes = (2, 64, 512, 1480, 1640)
    points = tuple(
        MemoryPoint(
            micro_batch_size=size,
            purpose="touch" if size <= 64 else "approach",
            outcome=Outcome.RAN,
            traced_bytes=round(used(size) * 0.93),
            used_bytes=round(used(size) * wobble),
            step_time_s=_step_time_s(size),
        )
        for size, wobble in zip(sizes, (1.004, 0.997, 1.006, 0.998, 1.001), strict=True)
    )
    proof = MemoryPoint(
        micro_batch_size=1700,
        purpose="proof",
        outcome=Outcome.OVER_LIMIT,
        traced_bytes=round(used(1700) * 0.93),
        used_bytes=used(1700),
        step_time_s=_step_time_s(1700),
        detail="used 2.16 GiB of 2.09 GiB",
    )
    return MemoryCurve(
        status=Status.OK,
        ceiling=1640,
        ceiling_is_limit=True,
        predicted_ceiling=1646,
        stopped_by="limit",
        largest_allowed=60_000,
        largest_allowed_source="dataset",
        limit=MemoryLimit(limit_bytes=2140 * MIB, source="--limit", headroom_bytes=107 * MIB),
        calibration_scale=1.075,
        calibration_offset_bytes=3.2 * MIB,
        calibration_error=0.006,
        bytes_at_one=used(1),
        points=(*points, proof),
        curve=tuple((size, used(size)) for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1640, 2000)),
        shares=_shares(38 * MIB, 38 * MIB, 38 * MIB, 5 * MIB, used(1640) - 119 * MIB),
        peak_module="features.3",
        peak_operation="aten.convolution_backward",
        recorded_on="device",
        allocator="cpu, glibc malloc (default arenas), peak resident set",
    )


def step_time() -> StepTimeCurve:
    wobbles = {8: 1.01, 32: 0.99, 64: 1.02, 128: 1.0, 256: 1.002, 512: 1.005, 1024: 0.996, 1640: 1.003}
    points = tuple(
        ThroughputPoint(
            micro_batch_size=size,
            step_time_s=_around(_step_time_s(size) * wobble, 0.02),
            samples_per_s=_around(size / (_step_time_s(size) * wobble), 0.02),
            fitted_step_time_s=_step_time_s(size),
        )
        for size, wobble in wobbles.items()
    )
    return StepTimeCurve(
        status=Status.OK,
        reasons=(),
        points=points,
        fixed_time_s=FIXED_TIME_S,
        saturated_samples_per_s=SATURATED_SAMPLES_PER_S,
        exponent=EXPONENT,
        fit_error=0.02,
        half_saturation=FIXED_TIME_S * SATURATED_SAMPLES_PER_S,
        knee=128,
        best=1024,
        optimizer_time_s=OPTIMIZER_TIME_S,
        power_of_two=PowerOfTwo(
            size=128,
            relative_time=Estimate(value=0.969, low=0.956, high=0.98, n=9),
            multiple_of_eight=136,
            multiple_relative_time=Estimate(value=1.004, low=0.991, high=1.013, n=9),
        ),
    )


def loader() -> LoaderCurve:
    points = tuple(
        LoaderThroughput(num_workers=count, samples_per_s=_around(rate, 0.03)) for count, rate in ((0, 5200.0), (2, 9100.0), (4, 9300.0))
    )
    return LoaderCurve(points=points, num_workers=2, samples_per_s=_around(9100.0, 0.03))


def _snapshot(samples_seen: int, value: float | None, low: float | None, high: float | None, status: Status = Status.OK) -> NoiseSnapshot:
    return NoiseSnapshot(
        samples_seen=samples_seen,
        noise_scale=Estimate(value=value, low=low, high=high, n=4096, status=status),
        grad_sq_norm=_around(0.21, 0.2),
        grad_noise_trace=_around(101.0, 0.1),
        micro_batch_size=32,
        micro_batch_count=128,
    )


def noise_scale() -> NoiseScale:
    snapshots = (_snapshot(0, 95.0, 71.0, 130.0), _snapshot(8192, 310.0, 220.0, 450.0), _snapshot(16384, 640.0, 410.0, 1080.0))
    return NoiseScale(
        value=480.0,
        low=350.0,
        high=690.0,
        n=12_288,
        status=Status.OK,
        snapshots=snapshots,
        pilot_samples=16_384,
        remarks=("Early probes underestimate the noise of a whole run; the decision allows for growth.",),
    )


_SPLITS = ((8, 8, 1), (32, 32, 1), (64, 64, 1), (128, 128, 1), (256, 128, 2), (512, 128, 4), (1024, 128, 8), (2048, 128, 16))


def _cost(global_batch_size: int, step_time_s: float) -> float:
    return (1 + CRITICAL_BATCH_SIZE / global_batch_size) * step_time_s


def tradeoff() -> Tradeoff:
    best = min(_cost(size, _step_time_s(micro, steps)) for size, micro, steps in _SPLITS)
    points = []
    for size, micro, steps in _SPLITS:
        step_s = _step_time_s(micro, steps)
        relative = _cost(size, step_s) / best
        points.append(
            TradeoffPoint(
                global_batch_size=size,
                micro_batch_size=micro,
                accumulation_steps=steps,
                evidence="measured" if steps == 1 else "composed",
                step_time_s=step_s,
                samples_per_s=size / step_s,
                loader_bound=False,
                relative_time=_around(relative, 0.03 + 0.12 * (relative - 1), n=400),
                relative_samples=_around(1 + size / CRITICAL_BATCH_SIZE, 0.02 + 0.1 * size / CRITICAL_BATCH_SIZE, n=400),
                regret=relative - 1 + (0.011 if size == 512 else 0.016),
            )
        )
    critical = Estimate(value=CRITICAL_BATCH_SIZE, low=760.0, high=6900.0, n=400)
    return Tradeoff(status=Status.OK, critical_batch_size=critical, points=tuple(points))


def _comparison(label: str, size: int, accumulation_steps: int = 1) -> Comparison:
    chosen = _cost(512, _step_time_s(128, 4))
    relative = _cost(size, _step_time_s(size // accumulation_steps, accumulation_steps)) / chosen
    samples = (1 + size / CRITICAL_BATCH_SIZE) / (1 + 512 / CRITICAL_BATCH_SIZE)
    return Comparison(
        label=label,
        global_batch_size=size,
        relative_time=_around(relative, 0.03 + 0.12 * abs(relative - 1), n=400),
        relative_samples=_around(samples, 0.1, n=400),
        evidence="measured" if accumulation_steps == 1 else "composed",
    )


def devices() -> DeviceCurve:
    """Five numbers of devices under the same laws, each at its best of a few batches, with a fast link."""
    link = Interconnect(bytes_per_s=10 * 2**30, latency_s=2e-5)
    gradient_bytes = 4 * workload().trainable_parameter_count
    points: list[DevicePoint] = []
    for ranks in (1, 2, 4, 8, 16):
        exchange_s = 2 * (ranks - 1) * (link.latency_s + gradient_bytes / (ranks * link.bytes_per_s))
        costs = {m: (1 + CRITICAL_BATCH_SIZE / (m * ranks)) * (_step_time_s(m) + exchange_s) for m in (64, 128, 256, 512)}
        micro = min(costs, key=costs.__getitem__)
        alone = min(_cost(size, _step_time_s(size)) for size in (64, 128, 256, 512))
        points.append(
            DevicePoint(
                ranks=ranks,
                global_batch_size=micro * ranks,
                micro_batch_size=micro,
                accumulation_steps=1,
                exchange_time_s=exchange_s,
                relative_time=_around(costs[micro] / alone, 0.1, n=400),
                efficiency=_around(alone / costs[micro] / ranks, 0.1, n=400),
                evidence="measured" if ranks == 1 else "extrapolated",
            )
        )
    pays = max(point.ranks for point in points if (point.efficiency.value or 0) >= 0.5)
    return DeviceCurve(
        points=tuple(points),
        pays_up_to=Estimate(value=pays, low=pays / 2, high=pays * 2, n=400),
        interconnect=link,
        gradient_bytes=gradient_bytes,
    )


def recommendation() -> Recommendation:
    return Recommendation(
        status="ok",
        plan=BatchPlan(global_batch_size=512, micro_batch_size=128, accumulation_steps=4, lr=0.2, num_workers=2),
        objective=Objective(),
        binding_constraint=Binding.OPTIMUM,
        evidence_level=1,
        expected_regret=0.011,
        equivalent_batch_sizes=(256, 512),
        lr=LrCoupling(
            rule="square root",
            factor=2.0,
            base_lr=0.1,
            base_batch_size=128,
            validity="The square-root rule holds for adaptive optimizers while the batch is below the critical batch size.",
            companions=(
                ("warm-up", "keep the number of samples: a quarter of the steps"),
                ("schedule", "index it by samples, not by steps"),
            ),
        ),
        comparisons=(
            _comparison("32", 32),
            _comparison("64", 64),
            _comparison("128", 128),
            _comparison("256", 256, 2),
            _comparison("largest that fits", 1640),
            _comparison("best throughput", 1024),
        ),
        sensitivities=(
            Sensitivity(change="noise scale 4x larger", global_batch_size=1024),
            Sensitivity(change="noise scale 4x smaller", global_batch_size=128),
            Sensitivity(change="twice the memory", global_batch_size=512),
        ),
        advice=("60000 samples leave a last batch of 96: drop it or keep it as a smaller step.",),
        devices=devices(),
    )


def good() -> Findings:
    """Everything was measured and the answer is clear."""
    return Findings(
        workload=workload(),
        environment=environment(),
        recommendation=recommendation(),
        memory=memory(),
        step_time=step_time(),
        loader=loader(),
        noise_scale=noise_scale(),
        tradeoff=tradeoff(),
        reused_parts=("memory",),
        measured_at="2026-03-02T09:15:00Z",
        duration_s=74.0,
    )


def _no_coupling() -> LrCoupling:
    return LrCoupling(rule="none", factor=1.0, base_lr=None, base_batch_size=None, validity="The workload names no rate to start from.")


def _without_plan(status: str) -> Recommendation:
    return Recommendation(
        status=status,
        plan=None,
        objective=Objective(),
        binding_constraint=None,
        evidence_level=0,
        expected_regret=None,
        equivalent_batch_sizes=(),
        lr=_no_coupling(),
        comparisons=(),
        sensitivities=(),
        advice=(),
    )


def memory_only() -> Findings:
    """Only the memory was asked for."""
    missing = {"step_time": None, "loader": None, "noise_scale": None, "tradeoff": None, "reused_parts": ()}
    everything_known = {
        "predicted_ceiling": 1640,
        "certificate": Certificate(micro_batch_size=1641, outcome=Outcome.OVER_LIMIT, holds=True),
        "accumulation_ceiling": 1604,
        "evaluation_ceiling": 6180,
        "smooth_ceiling": 1590,
        "holders": (
            MemoryHolder(module="features.0", operation="aten.convolution", size_bytes=610 * MIB),
            MemoryHolder(module="features.3", operation="aten.native_batch_norm", size_bytes=305 * MIB),
            MemoryHolder(module="", operation="held", size_bytes=38 * MIB),
        ),
        "alternatives": (
            MemoryAlternative(change="bf16", peak_bytes=1150 * MIB, predicted_ceiling=3010),
            MemoryAlternative(change="checkpointing", peak_bytes=820 * MIB, predicted_ceiling=4720),
            MemoryAlternative(change="adam", peak_bytes=2179 * MIB, predicted_ceiling=None),
        ),
    }
    curve = memory().model_copy(update=everything_known)
    return good().model_copy(
        update={"recommendation": _without_plan("inconclusive"), **missing, "memory": curve, "duration_s": 9.0},
    )


def inconclusive() -> Findings:
    """The gradient's signal was below its noise: the plan rests on the hardware alone."""
    noise = NoiseScale(
        value=None,
        low=None,
        high=None,
        n=12_288,
        status=Status.INDETERMINATE,
        pilot_samples=0,
        snapshots=(_snapshot(0, None, None, None, Status.INDETERMINATE),),
        remarks=("The gradient's signal is below its noise after 12288 samples; about 98000 more would decide. Try --budget 15m.",),
    )
    advice = Recommendation.model_validate(
        _without_plan("inconclusive").model_dump()
        | {
            "plan": BatchPlan(global_batch_size=128, micro_batch_size=128, lr=0.1, num_workers=2),
            "binding_constraint": Binding.OPTIMUM,
            "lr": LrCoupling(
                rule="none", factor=1.0, base_lr=0.1, base_batch_size=128, validity="The size is the one the rate was tuned at."
            ),
            "advice": ("Measure longer: rightbatch find train.py:workload --budget 15m.",),
        }
    )
    return good().model_copy(update={"recommendation": advice, "noise_scale": noise, "tradeoff": None, "reused_parts": ()})


def nothing_fits() -> Findings:
    """Not even one sample fits."""
    tight = memory().model_copy(
        update={
            "status": Status.NOTHING_FITS,
            "ceiling": None,
            "predicted_ceiling": None,
            "bytes_at_one": 3174 * MIB,
            "stopped_by": "failure",
            "calibration_error": None,
            "limit": MemoryLimit(limit_bytes=2048 * MIB, source="cgroup"),
            "curve": ((1, 3174 * MIB), (2, 3300 * MIB)),
            "points": (
                MemoryPoint(
                    micro_batch_size=1, purpose="touch", outcome=Outcome.OUT_OF_MEMORY, traced_bytes=3174 * MIB, detail="out of memory"
                ),
            ),
            "shares": _shares(900 * MIB, 900 * MIB, 0, 0, 1374 * MIB),
        }
    )
    return memory_only().model_copy(update={"memory": tight, "recommendation": _without_plan("nothing_fits")})


def unstable() -> Findings:
    """Something else used the machine while the steps were timed."""
    busy = step_time().model_copy(
        update={
            "status": Status.UNSTABLE,
            "reasons": ("Other processes keep 6.2 of 8 cores busy.", "Step times at 128 differ by 41 % between rounds."),
        }
    )
    again = f"The timings are not reliable, so measure again on a quiet machine. {' '.join(busy.reasons)}"
    shaky = recommendation().model_copy(
        update={"status": "unstable", "expected_regret": None, "equivalent_batch_sizes": (), "advice": (again, *recommendation().advice)}
    )
    return good().model_copy(update={"step_time": busy, "recommendation": shaky})


def at_least() -> Findings:
    """Only a lower bound of the noise scale is known, and the dataset, not the memory, ended the search for the ceiling."""
    noise = NoiseScale(
        value=None,
        low=200.0,
        high=None,
        n=4096,
        status=Status.AT_LEAST,
        pilot_samples=0,
        snapshots=(_snapshot(0, None, 200.0, None, Status.AT_LEAST),),
        remarks=("At least 200 samples; 16384 more would give an upper bound.",),
    )
    capped = memory().model_copy(
        update={"ceiling_is_limit": False, "stopped_by": "cap", "largest_allowed": 1640, "points": memory().points[:-1]}
    )
    return good().model_copy(update={"memory": capped, "noise_scale": noise})


def lr_range() -> LrRange:
    """Five rates at batch 64: two tie, the largest diverged."""
    losses = {0.025: 1.42, 0.05: 1.31, 0.1: 1.22, 0.2: 1.215, 0.4: 1.35, 0.8: None}
    verdicts = tuple(
        LrVerdict(
            lr=lr,
            loss=loss,
            excess=None if loss is None else Estimate(value=loss - 1.215, low=loss - 1.235, high=loss - 1.195, n=12),
            is_tied=lr in {0.1, 0.2},
        )
        for lr, loss in losses.items()
    )
    return LrRange(
        value=0.2,
        low=0.0707,
        high=0.283,
        n=76_800,
        status=Status.OK,
        batch_size=64,
        optimizer="SGD",
        divergence_edge=0.8,
        verdicts=verdicts,
    )


def untuned() -> Findings:
    """The workload does not say where its rate was tuned, so rates were tested."""
    work = workload().model_copy(update={"optimizer": "SGD", "momentum": 0.9, "lr_batch_size": None})
    plan = recommendation().plan
    tested = recommendation().model_copy(
        update={
            "plan": plan and plan.model_copy(update={"lr": 1.2}),
            "lr": LrCoupling(
                rule="saturating linear",
                factor=6.0,
                base_lr=0.2,
                base_batch_size=64,
                base_is_tested=True,
                validity="Linear well below the noise scale, 2400, and saturating above it; keep momentum and warm up.",
                companions=(("warm-up", "the same number of samples: 0.125 times the steps"),),
            ),
        }
    )
    return good().model_copy(update={"workload": work, "recommendation": tested, "lr_range": lr_range()})


def hostile_names() -> Findings:
    """Names that try to leave the place they are written in."""
    nasty = memory().model_copy(update={"peak_module": HOSTILE_MARKUP, "peak_operation": HOSTILE_NAME, "allocator": HOSTILE_NAME})
    place = environment().model_copy(update={"device_name": HOSTILE_NAME, "versions": ((HOSTILE_NAME, HOSTILE_MARKUP),)})
    answer = recommendation()
    answer = answer.model_copy(
        update={
            "advice": (HOSTILE_NAME, HOSTILE_MARKUP),
            "comparisons": (answer.comparisons[0].model_copy(update={"label": HOSTILE_NAME}), *answer.comparisons[1:]),
            "sensitivities": (Sensitivity(change=HOSTILE_MARKUP, global_batch_size=256),),
        }
    )
    return good().model_copy(update={"workload": workload(HOSTILE_NAME), "memory": nasty, "environment": place, "recommendation": answer})


ALL = {sample.__name__: sample for sample in (good, memory_only, inconclusive, nothing_fits, unstable, at_least, untuned, hostile_names)}
"""Every sample, by name."""
