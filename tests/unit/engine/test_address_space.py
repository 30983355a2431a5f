"""The meter of address space counts what was asked for, resident or not, from the marks that the kernel keeps."""

import mmap

import pytest
import torch

from rightbatch.engine import meters
from rightbatch.engine.address_space import AddressSpaceMeter
from rightbatch.engine.meters import CpuMemoryMeter, meters_for
from rightbatch.units import GIB


def test_the_meter_counts_what_is_mapped_and_never_touched():
    before = CpuMemoryMeter()
    before.start()
    meter = AddressSpaceMeter()
    meter.start()
    with mmap.mmap(-1, GIB):
        assert GIB <= meter.peak_bytes() < GIB + GIB // 8
        assert before.peak_bytes() < GIB // 4
    assert meter.peak_bytes() >= GIB


def test_the_meter_reads_the_kernels_marks(tmp_path):
    (tmp_path / "status").write_text("VmPeak:\t 9000 kB\nVmSize:\t 4000 kB\n")
    meter = AddressSpaceMeter(tmp_path)
    meter.start()
    assert meter.peak_bytes() == 5000 * 1024
    (tmp_path / "status").write_text("VmPeak:\t 3000 kB\nVmSize:\t 3000 kB\n")
    assert meter.peak_bytes() == 0


def test_the_meter_says_what_it_counts():
    assert AddressSpaceMeter().description.endswith("peak address space, each attempt in a process of its own")


@pytest.mark.parametrize(("binds", "kind"), [(True, AddressSpaceMeter), (False, CpuMemoryMeter)])
def test_the_tightest_limit_decides_what_is_counted(monkeypatch, binds, kind):
    monkeypatch.setattr(meters, "address_space_binds", lambda: binds)
    assert isinstance(meters_for(torch.device("cpu")).memory, kind)
