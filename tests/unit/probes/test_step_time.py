"""Step times follow the planted law of a device, in interleaved rounds, until decided or out of budget."""

from dataclasses import replace

import pytest
import torch

from fakes import DIMENSION, FakeDevice, planted_workload
from rightbatch.engine.meters import Meters
from rightbatch.engine.rig import Rig
from rightbatch.probes import step_time
from rightbatch.records.measurements import Contention

QUIET = Contention(load_average_1m=0, cpu_count=2, other_processes_cpu=0)


def rig_on(device, *, energy=None, train_size=5000):
    meters: Meters = replace(device.meters(), energy=energy)
    workload = planted_workload(device, torch.zeros(train_size, DIMENSION), lr=1e-9)
    rig = Rig(workload=workload, device=torch.device("cpu"), meters=meters)
    assert not rig.loss_is_sum
    device.now = 0.0
    return rig


def law(device, size):
    return device.fixed_time_s + size / device.samples_per_s


def measure(rig, sizes=(2, 8, 32), *, is_decided=lambda measured: False, budget_s=5.0):
    return step_time.measure(rig, sizes, is_decided=is_decided, budget_s=budget_s, machine=QUIET, largest_affordable=None)


def test_a_scan_doubles_the_size_and_recovers_the_law():
    device = FakeDevice(fixed_time_s=0.1)
    found = step_time.scan(rig_on(device), largest=100, budget_s=60.0, affordable_step_s=10.0)
    assert [size for size, _ in found] == [2, 4, 8, 16, 32, 64, 100]
    assert [seconds for _, seconds in found] == pytest.approx([law(device, size) for size, _ in found])


def test_a_scan_stops_when_three_doublings_bring_no_throughput():
    device = FakeDevice(fixed_time_s=1e-6, samples_per_s=1000.0)
    found = step_time.scan(rig_on(device), largest=4096, budget_s=1e4, affordable_step_s=1e4)
    assert found[-1][0] == 2**7


def test_a_scan_tries_no_step_that_would_take_too_long():
    device = FakeDevice(fixed_time_s=0.0, samples_per_s=100.0)
    found = step_time.scan(rig_on(device), largest=4096, budget_s=1e4, affordable_step_s=0.3)
    assert found[-1][0] == 16
    assert device.largest_run == 16


def test_a_scan_ends_with_its_budget_but_times_one_size_at_least():
    device = FakeDevice(fixed_time_s=1.0)
    rig = rig_on(device)
    assert len(step_time.scan(rig, largest=4096, budget_s=0.1, affordable_step_s=10.0)) == 1
    assert [size for size, _ in step_time.scan(rig_on(device), largest=1, budget_s=9.0, affordable_step_s=10.0)] == [1]


def test_every_size_follows_the_law_in_every_round():
    device = FakeDevice()
    measured = measure(rig_on(device))
    assert [point.micro_batch_size for point in measured.points] == [2, 8, 32]
    for point in measured.points:
        assert len(point.step_times_s) == len(measured.optimizer_times_s) >= 3
        assert point.step_times_s == pytest.approx([law(device, point.micro_batch_size)] * len(point.step_times_s))
        assert point.energy_per_step_j == ()
    assert measured.optimizer_times_s == (0.0,) * len(measured.optimizer_times_s)


def test_rounds_are_interleaved_over_the_sizes(monkeypatch):
    device = FakeDevice(fixed_time_s=1.0)
    timed = []
    monkeypatch.setattr(step_time, "_mean_step_s", lambda rig, trainee, batch, *, steps: timed.append(len(batch[0])) or 0.1)
    measure(rig_on(device), (2, 4), is_decided=lambda measured: len(measured.optimizer_times_s) == 3)
    assert timed[-6:] == [2, 4, 2, 4, 2, 4]


def test_rounds_stop_when_they_decide():
    asked = []
    measured = measure(rig_on(FakeDevice()), is_decided=lambda so_far: asked.append(so_far) or len(asked) == 5, budget_s=1e6)
    assert len(measured.optimizer_times_s) == 5
    assert asked[-1] == measured


@pytest.mark.parametrize(("budget_s", "rounds"), [(1e-9, 3), (1e9, 60)])
def test_rounds_number_three_at_least_and_sixty_at_most(budget_s, rounds):
    device = FakeDevice(fixed_time_s=0.2)
    assert len(measure(rig_on(device), (2,), budget_s=budget_s).optimizer_times_s) == rounds


def test_no_round_is_begun_that_the_budget_does_not_hold():
    device = FakeDevice(fixed_time_s=1.0, samples_per_s=1e9)
    rig = rig_on(device)
    measured = measure(rig, (2,), budget_s=11.0)
    # A round takes a second for the step and another for the backward pass whose update is timed apart.
    assert len(measured.optimizer_times_s) == 5


class Wattmeter:
    """A device that draws 50 watts."""

    def __init__(self, device):
        self.device = device

    def energy_j(self):
        return 50.0 * self.device.now


def test_energy_of_a_step_is_power_times_its_time():
    device = FakeDevice()
    measured = measure(rig_on(device, energy=Wattmeter(device)))
    for point in measured.points:
        assert point.energy_per_step_j == pytest.approx([50.0 * seconds for seconds in point.step_times_s])


def test_a_meter_too_coarse_to_see_a_step_gives_no_energy():
    device = FakeDevice()
    stuck = Wattmeter(FakeDevice())
    assert all(point.energy_per_step_j == () for point in measure(rig_on(device, energy=stuck)).points)


def test_contention_and_the_affordable_size_are_kept_beside_the_times():
    rig = rig_on(FakeDevice(busy_reasons=("A game is running.",)))
    machine = step_time.contention(rig)
    assert machine.reasons == ("A game is running.",)
    measured = step_time.measure(rig, (2,), is_decided=lambda m: True, budget_s=1.0, machine=machine, largest_affordable=64)
    assert (measured.contention, measured.largest_affordable) == (machine, 64)


@pytest.mark.parametrize(("budget_s", "rounds"), [(1e-9, 5), (1e9, 15)])
def test_neighbours_are_timed_in_five_to_fifteen_rounds(budget_s, rounds):
    device = FakeDevice()
    points = step_time.measure_neighbours(rig_on(device), (15, 16, 17, 24), budget_s=budget_s)

    assert [point.micro_batch_size for point in points] == [15, 16, 17, 24]
    for point in points:
        assert point.step_times_s == pytest.approx([law(device, point.micro_batch_size)] * rounds)
