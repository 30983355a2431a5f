"""Where numbers come from: the machine, the versions and the switches of the process that measures."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch

from rightbatch._version import __version__
from rightbatch.engine.process_state import float32_precision_words
from rightbatch.engine.rig import Rig
from rightbatch.records.environment import Environment


def environment(rig: Rig, isolation: Literal["child", "in-process"]) -> Environment:
    """Describe the device, the software and the backend switches of this process."""
    device = rig.device
    is_cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if is_cuda else None
    versions = [("rightbatch", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    versions.append(("numpy", metadata.version("numpy")))
    if is_cuda:
        versions += [("cuda", str(torch.version.cuda)), ("cudnn", str(torch.backends.cudnn.version()))]  # type: ignore[no-untyped-call]
    return Environment(
        device=str(device),
        device_name=cpu_name() if properties is None else properties.name,
        device_total_bytes=psutil.virtual_memory().total if properties is None else properties.total_memory,
        cpu_count=psutil.cpu_count() or 1,
        threads=torch.get_num_threads(),
        operating_system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=tuple(versions),
        precision=rig.workload.precision,
        isolation=isolation,
        seed=rig.seed,
        flags=(
            ("float32 matmul precision", float32_precision_words()),
            ("deterministic algorithms", str(torch.are_deterministic_algorithms_enabled())),
            ("cudnn benchmark", str(torch.backends.cudnn.benchmark)),
        ),
    )


def cpu_name() -> str:
    """Return the processor's own name, or the machine type where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
