from dataclasses import dataclass, field

import pytest

from fakes import FakeDevice, GivenSource, planted_rig, planted_samples, planted_workload
from rightbatch.probes import memory, step_time
from rightbatch.records.measurements import MemoryLimit, MemoryMeasurements, MemoryPoint, Outcome
from rightbatch.tuner import find
from rightbatch.tuner.measuring import SHARES, Measuring
from rightbatch.tuner.request import STANDARD_PARTS, Part, Request, SilentProgress

BUDGET_S = 8.0
REQUEST = Request(isolation="in-process", save=False, budget_s=BUDGET_S)


@dataclass(frozen=True)
class SlowlyListed(GivenSource):
    """A source whose code takes a while to list, as it does where other processes have the cores."""

    device: FakeDevice = field(default_factory=FakeDevice)
    listing_s: float = 0.0

    def code_files(self):
        self.device.now += self.listing_s
        return ()


@dataclass
class Bench:
    device: FakeDevice = field(default_factory=lambda: FakeDevice(load_time_s=1e-5))

    def workload(self):
        return planted_workload(self.device, planted_samples(100.0, 4000, 0), lr=1e-3, lr_batch_size=128)

    def measuring(self):
        return Measuring(planted_rig(self.device, self.workload()), REQUEST, SilentProgress(), self.device.now_s)

    def find(self, listing_s):
        workload = self.workload()
        source = SlowlyListed(workload, device=self.device, listing_s=listing_s)
        build_rig = planted_rig(self.device, workload)
        return find.find(source, REQUEST, SilentProgress(), build_rig=build_rig, clock_s=self.device.now_s).findings


def test_budget_is_for_the_probes_however_long_getting_ready_takes():
    prompt, slow = Bench().find(listing_s=0.0), Bench().find(listing_s=10 * BUDGET_S)

    assert slow.noise_scale.pilot_samples == prompt.noise_scale.pilot_samples > 0
    assert slow.recommendation.plan == prompt.recommendation.plan
    assert slow.duration_s == pytest.approx(prompt.duration_s)


def test_noise_is_measured_along_a_pilot_after_parts_that_overran(monkeypatch):
    bench = Bench()
    timed = step_time.measure

    def disturbed(rig, sizes, **how):
        bench.device.now += 2 * BUDGET_S
        return timed(rig, sizes, **how)

    monkeypatch.setattr(step_time, "measure", disturbed)
    noise = bench.find(listing_s=0.0).noise_scale

    assert len(noise.snapshots) == 4
    assert noise.pilot_samples > 1000


def test_parts_that_begin_late_take_half_of_their_time_at_most():
    bench = Bench()
    measuring = bench.measuring()
    waiting = frozenset(STANDARD_PARTS)
    measuring.start_budget()
    intended_s = {part: measuring.share_s(part, waiting) for part in waiting}

    bench.device.now += 3 * BUDGET_S
    late_s = measuring.share_s(Part.GRADIENT_NOISE, frozenset({Part.GRADIENT_NOISE}))

    assert sum(intended_s.values()) == pytest.approx(0.95 * BUDGET_S)
    assert late_s == pytest.approx(intended_s[Part.GRADIENT_NOISE] / 2)
    assert intended_s[Part.MEMORY] / intended_s[Part.STEP_TIME] == pytest.approx(SHARES[Part.MEMORY] / SHARES[Part.STEP_TIME])


def test_parts_in_time_divide_what_is_left():
    bench = Bench()
    measuring = bench.measuring()
    measuring.start_budget()
    measuring.share_s(Part.MEMORY, frozenset(STANDARD_PARTS))

    bench.device.now += 0.1 * BUDGET_S

    assert measuring.share_s(Part.GRADIENT_NOISE, frozenset({Part.GRADIENT_NOISE})) == pytest.approx(0.85 * BUDGET_S)


def test_first_size_of_the_scan_held_up_keeps_no_other_from_being_timed(monkeypatch):
    bench = Bench()
    measuring = bench.measuring()
    summary, _ = measuring.describe()
    monkeypatch.setattr(step_time, "scan", lambda rig, **how: ((2, 5.0),))
    ran = tuple(
        MemoryPoint(micro_batch_size=size, purpose="touch", outcome=Outcome.RAN, traced_bytes=1, step_time_s=seconds)
        for size, seconds in ((500, 0.027), (4000, 0.202))
    )
    found = MemoryMeasurements(
        trace=memory.no_trace("Not asked."), limit=MemoryLimit(limit_bytes=2**40, source="device"), points=ran, largest_allowed=4000,
        largest_allowed_source="dataset", stopped_by="budget", allocator="planted",
    )  # fmt: skip

    timed = measuring.step_time(summary, found, 1.5)

    assert max(point.micro_batch_size for point in timed.points) == 2048
