"""doctor finds what would spoil a measurement, says what to do, and never falls over."""

import json
import os
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from rightbatch.cli import doctor, main

GIB = 2**30


class BrokenTorch(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        raise OSError("libtorch_cpu.so: cannot open shared object file")


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which the slow checks were looked at and are fine."""
    for name in ("check_torch", "check_child", "check_gpus", "check_memory", "check_cpu", "check_folder"):
        monkeypatch.setattr(doctor, name, lambda: (doctor.Check(name="x", status="ok", detail="fine"),))
    return monkeypatch


def test_healthy_machine_is_exit_code_0(healthy, capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok      python: ")
    assert "->" not in out


def test_warning_is_no_failure_and_says_what_to_do(healthy, capsys) -> None:
    healthy.setattr(doctor, "check_cpu", lambda: (doctor.Check(name="cpu", status="warning", detail="busy", remedy="wait"),))
    assert main(["doctor"]) == 0
    assert "warning cpu: busy\n        -> wait\n" in capsys.readouterr().out


def test_something_broken_is_exit_code_1(healthy, capsys) -> None:
    healthy.setattr(doctor, "check_torch", lambda: (doctor.Check(name="torch", status="broken", detail="not there", remedy="install it"),))
    assert main(["doctor", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {"name": "torch", "status": "broken", "detail": "not there", "remedy": "install it"} in checks


def test_check_that_fails_itself_is_a_finding(healthy, capsys) -> None:
    def check_memory() -> None:
        raise KeyError("Mem")

    healthy.setattr(doctor, "check_memory", check_memory)
    assert main(["doctor"]) == 1
    assert "BROKEN  memory: could not be checked: KeyError: 'Mem'" in capsys.readouterr().out


def test_torch_that_cannot_be_imported_is_broken(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", BrokenTorch("torch"))
    (check,) = doctor.check_torch()
    assert check.status == "broken"
    assert "is installed but cannot be imported: OSError: libtorch_cpu.so" in check.detail


def test_torch_that_is_missing_is_broken(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    (check,) = doctor.check_torch()
    assert (check.status, check.detail) == ("broken", "not installed")


@pytest.mark.parametrize(("version", "status"), [("2.5.1+cpu", "broken"), ("2.6.0", "ok"), ("2.13.0+cpu", "ok"), ("3.0.0a1", "ok")])
def test_torch_that_is_too_old_is_broken(monkeypatch, version, status) -> None:
    fake = types.ModuleType("torch")
    fake.cuda = types.SimpleNamespace(is_available=lambda: False)
    fake.get_num_threads = lambda: 2
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(metadata, "version", lambda name: version)
    (check,) = doctor.check_torch()
    assert check.status == status


def fake_nvml(pids: tuple[int, ...]) -> types.ModuleType:
    fake = types.ModuleType("pynvml")
    fake.nvmlInit = fake.nvmlShutdown = lambda: None
    fake.nvmlDeviceGetCount = lambda: 1
    fake.nvmlDeviceGetHandleByIndex = lambda index: index
    fake.nvmlDeviceGetName = lambda handle: "Some GPU"
    fake.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(free=8 * GIB, total=16 * GIB)
    fake.nvmlDeviceGetComputeRunningProcesses = lambda handle: [types.SimpleNamespace(pid=pid) for pid in pids]
    return fake


def test_device_is_listed(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml((os.getpid(),)))
    assert doctor.check_gpus() == (doctor.Check(name="gpu 0", status="ok", detail="Some GPU, 8.00 GiB free of 16.0 GiB"),)


def test_device_that_others_use_is_a_warning(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml((1, 2)))
    (check,) = doctor.check_gpus()
    assert check.status == "warning"
    assert "used by 2 other processes" in check.detail


def test_machine_without_a_driver_is_fine(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (check,) = doctor.check_gpus()
    assert check.status == "ok"
    assert "measurements run on the CPU" in check.detail


@pytest.mark.parametrize(("load", "status"), [(0.1, "ok"), (1000.0, "warning")])
def test_busy_processors_are_a_warning(monkeypatch, load, status) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    assert doctor.check_cpu()[0].status == status


@pytest.mark.parametrize(("free", "status"), [(8 * GIB, "ok"), (GIB // 2, "warning")])
def test_every_limit_on_memory_is_named_and_little_is_a_warning(monkeypatch, free, status) -> None:
    fake = types.ModuleType("rightbatch.engine.memory_limits")
    fake.free_memory_bytes = lambda: {"MemAvailable": 16 * GIB, "cgroup /job": free}
    monkeypatch.setitem(sys.modules, "rightbatch.engine.memory_limits", fake)
    (check,) = doctor.check_memory()
    assert check.status == status
    assert "16.0 GiB free under MemAvailable" in check.detail
    assert "free under cgroup /job" in check.detail


def test_folder_that_can_be_written_is_left_as_it_was(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor.check_folder()[0].status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_is_broken(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: tmp_path / "gone")
    (check,) = doctor.check_folder()
    assert check.status == "broken"
    assert "No such file or directory" in check.detail


def test_full_disk_is_a_warning(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=1, f_frsize=4096))
    assert doctor.check_folder()[0].status == "warning"


def test_child_process_starts_and_answers() -> None:
    assert doctor.check_child()[0].status == "ok"


def test_child_process_that_cannot_start_is_broken(monkeypatch) -> None:
    context = doctor.multiprocessing.get_context("spawn")

    def refuse(process: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(context.Process, "start", refuse)
    (check,) = doctor.check_child()
    assert check.status == "broken"
    assert "Resource temporarily unavailable" in check.detail
    assert "--isolation in-process" in check.remedy
