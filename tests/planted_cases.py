"""Seeded cases of planted laws, and what the whole of ``find`` must recover from each."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fakes import DIMENSION, FakeDevice, GivenSource, planted_rig, planted_samples, planted_workload
from rightbatch.engine.rig import Rig
from rightbatch.probes.memory import trace
from rightbatch.records.plan import Findings
from rightbatch.tuner.find import find
from rightbatch.tuner.request import Request, SilentProgress


@dataclass(frozen=True)
class PlantedCase:
    """One set of laws.

    Attributes:
        ceiling: Largest size that fits; none when nothing does; the dataset's size when memory does not bind.
        noise_scale: B_simple of the data at the frozen parameters.
        half_saturation: t0 * tau, in samples.
    """

    name: str
    seed: int
    train_size: int = 20_000
    ceiling: int | None = None
    noise_scale: float = 300.0
    half_saturation: float = 40.0
    saturated_samples_per_s: float = 20_000.0
    loader_samples_per_s: float = 4e4
    jitter: float = 0.0
    out_of_memory_at_one: bool = False


CASES = (
    *(PlantedCase(f"ceiling {ceiling}", seed, ceiling=ceiling, train_size=3000) for seed, ceiling in enumerate((7, 37))),
    *(PlantedCase(f"ceiling {ceiling}", 2 + seed, ceiling=ceiling) for seed, ceiling in enumerate((200, 1000, 3000, 10_000))),
    *(PlantedCase(f"noise scale {scale:g}", 10 + seed, noise_scale=scale) for seed, scale in enumerate((3.0, 30.0, 300.0, 1500.0, 5000.0))),
    *(PlantedCase(f"half saturation {half:g}", 20 + seed, half_saturation=half) for seed, half in enumerate((0.5, 5.0, 200.0, 2000.0))),
    PlantedCase("jittered timings", 30, jitter=0.02, half_saturation=60.0),
    PlantedCase("jittered timings and a ceiling", 31, jitter=0.02, ceiling=513, noise_scale=100.0),
    PlantedCase("saturated throughput", 32, half_saturation=0.01, noise_scale=50.0),
    PlantedCase("never saturated", 33, half_saturation=2e4, noise_scale=50.0),
    PlantedCase("loader-bound", 34, loader_samples_per_s=1500.0, noise_scale=1000.0),
    PlantedCase("noise swamps the signal", 35, noise_scale=3e6, train_size=2000),
    PlantedCase("out of memory at one sample", 36, out_of_memory_at_one=True),
    PlantedCase("one sample fits, two do not", 37, ceiling=1, train_size=600, noise_scale=20.0),
    PlantedCase("small dataset", 38, train_size=300, noise_scale=20.0),
)


def traced_bytes_per_sample() -> int:
    """Bytes a sample that the trace of the planted net finds, so that planted laws have a scale a real device could have."""
    device = FakeDevice()
    rig = Rig(workload=planted_workload(device, torch.zeros(64, DIMENSION)), device=torch.device("cpu"), meters=device.meters())
    return max(moment.per_sample_bytes for moment in trace(rig).moments)


def planted_device(case: PlantedCase) -> FakeDevice:
    """Make the device of a case. Its memory law is 1.25 times the traced bytes a sample, and a fixed part."""
    device = FakeDevice(
        fixed_bytes=9000,
        bytes_per_sample=traced_bytes_per_sample() * 5 // 4,
        fixed_time_s=case.half_saturation / case.saturated_samples_per_s,
        samples_per_s=case.saturated_samples_per_s,
        load_time_s=1 / case.loader_samples_per_s,
        jitter=case.jitter,
    )
    fitting = 0 if case.out_of_memory_at_one else case.ceiling
    if fitting is not None:
        device = replace(device, capacity_bytes=device.fixed_bytes + device.bytes_per_sample * fitting + device.bytes_per_sample // 2)
    return device


def find_planted(case: PlantedCase, out: Path | None = None) -> tuple[Findings, FakeDevice]:
    """Run the whole of ``find`` on the device of a case."""
    device = planted_device(case)
    samples = planted_samples(case.noise_scale, case.train_size, case.seed)
    workload = planted_workload(device, samples, lr=1e-9, lr_batch_size=64)
    request = Request(isolation="in-process", out=out, save=out is not None, seed=case.seed, budget_s=600)
    found = find(GivenSource(workload), request, SilentProgress(), build_rig=planted_rig(device, workload), clock_s=device.now_s)
    return found.findings, device


def planted_knee(case: PlantedCase, sizes: tuple[int, ...]) -> int:
    """The smallest of some sizes within 3 % of the best throughput, by the planted law."""
    rates = {size: size / (case.half_saturation + size) for size in sizes}
    return min(size for size, rate in rates.items() if rate >= 0.97 * max(rates.values()))
