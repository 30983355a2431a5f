"""NVML is asked about the very device that torch means, and a process does not count itself; the library and the device are fakes."""

import os
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from rightbatch.engine.nvml import nvml_energy_meter, other_gpu_processes

UUIDS = ("GPU-aaaa", "GPU-bbbb")
VISIBLE = 1
"""``CUDA_VISIBLE_DEVICES=1``: what torch calls device 0 is NVML's device 1."""
DEVICE = torch.device("cuda", 0)
ADDRESSES = ("00000000:3b:00.0", "00000000:af:00.0")


class FakeNvml(types.ModuleType):
    """Two devices; a handle is the device's number at NVML."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.energy_mj = {0: 1000, 1: 5000}
        self.pids: dict[int, list[int]] = {0: [], 1: []}
        self.counts_energy = True
        self.nvmlInit = lambda: None

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802  # NVML's own name
        return UUIDS.index(uuid)

    def nvmlDeviceGetHandleByPciBusId(self, address):  # noqa: N802  # NVML's own name
        return ADDRESSES.index(address)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802  # NVML's own name
        if not self.counts_energy:
            raise OSError("not supported")
        return self.energy_mj[handle]

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802  # NVML's own name
        return [SimpleNamespace(pid=pid) for pid in self.pids[handle]]


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUIDS[VISIBLE].removeprefix("GPU-")))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return fake


def test_energy_is_read_from_the_device_that_torch_sees_in_joules(nvml):
    meter = nvml_energy_meter(DEVICE)
    assert meter.energy_j() == 5.0
    nvml.energy_mj[VISIBLE] = 7500
    assert meter.energy_j() == 7.5


def test_a_uuid_that_has_its_prefix_already_keeps_it(nvml, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUIDS[VISIBLE]))
    assert nvml_energy_meter(DEVICE).energy_j() == 5.0


def test_without_a_uuid_the_pci_address_identifies_the_device(nvml, monkeypatch):
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xAF, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert nvml_energy_meter(DEVICE).energy_j() == 5.0


def test_a_device_that_cannot_be_identified_gives_no_meter_rather_than_anothers(nvml, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    nvml.pids[VISIBLE] = [1, 2, 3]
    assert nvml_energy_meter(DEVICE) is None
    assert other_gpu_processes(DEVICE) == 0


def test_a_device_that_does_not_count_energy_gives_no_meter(nvml):
    nvml.counts_energy = False
    assert nvml_energy_meter(DEVICE) is None


def test_without_the_library_there_is_no_meter_and_nobody_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_energy_meter(DEVICE) is None
    assert other_gpu_processes(DEVICE) == 0


def test_without_a_driver_there_is_no_meter_and_nobody_else(nvml):
    def no_driver():
        raise OSError("driver not loaded")

    nvml.nvmlInit = no_driver
    assert nvml_energy_meter(DEVICE) is None
    assert other_gpu_processes(DEVICE) == 0


FOREIGN = 10**8
"""More than any process id of this machine."""


@pytest.mark.parametrize(
    ("pids", "others"),
    [
        ([], 0),
        ([os.getpid()], 0),
        ([os.getpid(), os.getppid()], 0),
        ([os.getpid(), FOREIGN], 1),
        ([os.getpid(), FOREIGN, FOREIGN + 1], 2),
    ],
    ids=["nobody", "itself", "itself and its parent", "one other", "two others"],
)
def test_a_process_and_its_parent_are_not_others(nvml, pids, others):
    nvml.pids = {0: [FOREIGN, FOREIGN + 1, FOREIGN + 2], VISIBLE: pids}
    assert other_gpu_processes(DEVICE) == others


@pytest.mark.parametrize(("count", "others"), [(1, 0), (2, 1), (3, 2)])
def test_in_a_container_one_number_of_the_host_is_taken_for_its_own(nvml, count, others):
    nvml.pids[VISIBLE] = [FOREIGN + index for index in range(count)]
    assert other_gpu_processes(DEVICE) == others


def test_a_process_that_has_not_touched_the_device_counts_everyone_there(nvml, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    nvml.pids[VISIBLE] = [FOREIGN]
    assert other_gpu_processes(DEVICE) == 1
