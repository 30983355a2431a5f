"""The command that checks a machine for everything that measuring needs, and says what to do about what is missing."""

import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from rightbatch._version import __version__
from rightbatch.cli.options import OutputOptions
from rightbatch.cli.output import answer
from rightbatch.units import GIB, MIB, format_bytes

BROKEN = 1
OLDEST_TORCH = (2, 6)

_BUSY_LOAD_PER_CPU = 0.5
_LITTLE_MEMORY_BYTES = GIB
_LITTLE_DISK_BYTES = 100 * MIB
_CHILD_START_LIMIT_S = 60.0
_MARKS = {"ok": "ok     ", "warning": "warning", "broken": "BROKEN "}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "warning", "broken"]
    detail: str
    remedy: str = ""
    """What to do; empty when there is nothing to do."""


def doctor(output: OutputOptions) -> int:
    """Look at everything, print what was found, and return 1 when something is broken."""
    checks = run_checks()
    if output.json:
        from rightbatch.records.record import SCHEMA_VERSION

        answer(json.dumps({"schema_version": SCHEMA_VERSION, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        answer("\n".join(_line(check) for check in checks))
    return BROKEN if any(check.status == "broken" for check in checks) else 0


def run_checks() -> tuple[Check, ...]:
    """Look at everything; a check that fails itself is a finding, not an end."""
    every: tuple[Callable[[], tuple[Check, ...]], ...] = (
        check_python,
        check_torch,
        check_gpus,
        check_cpu,
        check_memory,
        check_folder,
        check_child,
    )
    return tuple(check for look in every for check in _guarded(look))


def check_python() -> tuple[Check, ...]:
    """Name the interpreter and this package."""
    detail = f"{platform.python_version()} at {sys.executable}, rightbatch {__version__}, {platform.platform()}"
    return (Check(name="python", status="ok", detail=detail),)


def check_torch() -> tuple[Check, ...]:
    """Import torch and see what it can compute on."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return (Check(name="torch", status="broken", detail="not installed", remedy="pip install torch"),)
    try:
        import torch

        cuda = torch.cuda.is_available()
        count = torch.get_num_threads()
        threads = "1 thread" if count == 1 else f"{count} threads"
        found = f"{version}, {threads}, " + (f"CUDA {torch.version.cuda}" if cuda else "no CUDA device")
    except Exception as error:  # noqa: BLE001  # a broken installation fails in any way
        detail = f"{version} is installed but cannot be imported: {type(error).__name__}: {error}"
        return (Check(name="torch", status="broken", detail=detail, remedy="reinstall torch: pip install --force-reinstall torch"),)
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        return (Check(name="torch", status="broken", detail=found, remedy="pip install --upgrade torch (2.6 or newer is needed)"),)
    return (Check(name="torch", status="ok", detail=found),)


def check_gpus() -> tuple[Check, ...]:
    """List the devices that the NVIDIA driver knows, and who else uses them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return tuple(_gpu(pynvml.nvmlDeviceGetHandleByIndex(index), index) for index in range(pynvml.nvmlDeviceGetCount()))
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # noqa: BLE001  # no library, no driver, no permission: all mean that there is no device to list
        return (Check(name="gpu", status="ok", detail=f"none found ({error}); measurements run on the CPU"),)


def _gpu(handle: object, index: int) -> Check:
    import pynvml

    name = pynvml.nvmlDeviceGetName(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    detail = f"{name}, {format_bytes(memory.free)} free of {format_bytes(memory.total)}"
    others = [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if process.pid != os.getpid()]
    if others:
        remedy = "wait for them to end, or take another device with --device; timings beside other work cannot be trusted"
        return Check(name=f"gpu {index}", status="warning", detail=f"{detail}, used by {len(others)} other processes", remedy=remedy)
    return Check(name=f"gpu {index}", status="ok", detail=detail)


def check_cpu() -> tuple[Check, ...]:
    """Count the processors and see how busy they are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    load, _, _ = os.getloadavg()
    detail = f"{count} usable of {os.cpu_count()}, load average {load:.2f}"
    if load > _BUSY_LOAD_PER_CPU * count:
        return (
            Check(name="cpu", status="warning", detail=detail, remedy="end other work first; timings on a busy machine come out UNSTABLE"),
        )
    return (Check(name="cpu", status="ok", detail=detail),)


def check_memory() -> tuple[Check, ...]:
    """List every limit on memory that is in force, and what is free under it."""
    from rightbatch.engine.memory_limits import free_memory_bytes

    limits = sorted(free_memory_bytes().items(), key=lambda item: item[1])
    least = limits[0][1]
    detail = ", ".join(f"{format_bytes(free)} free under {name}" for name, free in limits)
    if least < _LITTLE_MEMORY_BYTES:
        remedy = f"end other work or raise the limit {limits[0][0]}; less than {format_bytes(_LITTLE_MEMORY_BYTES)} holds few models"
        return (Check(name="memory", status="warning", detail=detail, remedy=remedy),)
    return (Check(name="memory", status="ok", detail=detail),)


def check_folder() -> tuple[Check, ...]:
    """See whether a run folder can be written here."""
    here = Path.cwd()
    try:
        with tempfile.NamedTemporaryFile(dir=here, prefix=".rightbatch-doctor-"):
            pass
        statistics = os.statvfs(here)
    except OSError as error:
        detail = f"cannot write into {here}: {error.strerror or error}"
        return (Check(name="run folder", status="broken", detail=detail, remedy="change to another folder, or pass --out"),)
    free = statistics.f_bavail * statistics.f_frsize
    detail = f"{here} can be written, {format_bytes(free)} free"
    if free < _LITTLE_DISK_BYTES:
        return (Check(name="run folder", status="warning", detail=detail, remedy="make room, or pass --out on another disk"),)
    return (Check(name="run folder", status="ok", detail=detail),)


def check_child() -> tuple[Check, ...]:
    """Start a child process as the measurements do, and hear from it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_greet, args=(theirs,), daemon=True)
    remedy = "see whether a limit on processes or memory is in force (ulimit -u, ulimit -v); --isolation in-process needs no child"
    try:
        child.start()
        theirs.close()
        heard = ours.poll(_CHILD_START_LIMIT_S) and ours.recv() == "here"
    except (OSError, EOFError) as error:
        return (Check(name="child process", status="broken", detail=f"could not be started: {error}", remedy=remedy),)
    finally:
        if child.pid is not None:
            child.kill()
            child.join()
        ours.close()
    if not heard:
        detail = f"did not answer within {_CHILD_START_LIMIT_S:.0f} s"
        return (Check(name="child process", status="broken", detail=detail, remedy=remedy),)
    return (Check(name="child process", status="ok", detail="starts and answers"),)


def _greet(pipe: Connection) -> None:
    pipe.send("here")
    pipe.recv()  # stay until the parent has read and ends this process


def _guarded(look: Callable[[], tuple[Check, ...]]) -> tuple[Check, ...]:
    try:
        return look()
    except Exception as error:  # noqa: BLE001  # the doctor must see the rest too
        name = look.__name__.removeprefix("check_")
        detail = f"could not be checked: {type(error).__name__}: {error}"
        return (Check(name=name, status="broken", detail=detail, remedy="reinstall rightbatch and what it needs, then try again"),)


def _line(check: Check) -> str:
    text = f"{_MARKS[check.status]} {check.name}: {check.detail}"
    return f"{text}\n        -> {check.remedy}" if check.remedy else text
