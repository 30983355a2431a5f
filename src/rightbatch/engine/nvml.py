"""What NVIDIA's management library says about one CUDA device: its energy counter, and who else computes on it.

NVML counts every device of the machine and knows nothing of ``CUDA_VISIBLE_DEVICES``, so a device is looked up by its UUID, or by its PCI
address where torch tells no UUID; never by its index.
"""

import os
from collections.abc import Callable
from typing import Any

import torch


class NvmlEnergyMeter:
    """Energy of one NVIDIA device since its driver was loaded."""

    def __init__(self, read_mj: Callable[[], int]) -> None:
        self._read_mj = read_mj

    def energy_j(self) -> float:
        """Return joules."""
        return self._read_mj() / 1000


def nvml_energy_meter(device: torch.device) -> NvmlEnergyMeter | None:
    """Return an energy meter of a CUDA device, or none when its driver does not count energy."""
    try:
        import pynvml

        handle = _handle(device)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # noqa: BLE001  # a missing library, driver or counter, each with its own class: no meter
        return None
    return NvmlEnergyMeter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def other_gpu_processes(device: torch.device) -> int:
    """Return how many processes other than this one and its parent compute on a CUDA device; 0 when NVML cannot tell.

    In a container NVML reports process ids of the host, so this process may stand in the list under a number it does not know. Once it
    computes on the device it is on the list all the same: then one entry is always taken for its own. The parent, which waits for the
    answer, is left out only where its number is known; with a context of its own in such a container it counts as another process.
    """
    try:
        import pynvml

        listed = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(_handle(device))}
    except Exception:  # noqa: BLE001  # without a driver nobody else computes there either
        return 0
    own = {os.getpid(), os.getppid()}
    others = listed - own
    is_listed_under_a_foreign_number = torch.cuda.is_initialized() and os.getpid() not in listed  # type: ignore[no-untyped-call]
    return max(0, len(others) - is_listed_under_a_foreign_number)


def _handle(device: torch.device) -> Any:  # NVML's own handle class, private to it
    """Return NVML's handle of the device that torch means.

    Raises:
        Exception: NVML or the device's identity is missing; every driver has its own classes.
    """
    import pynvml

    pynvml.nvmlInit()
    properties: Any = torch.cuda.get_device_properties(device)  # its fields differ by version of torch
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        text = str(uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}")
    address = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    return pynvml.nvmlDeviceGetHandleByPciBusId(address)
