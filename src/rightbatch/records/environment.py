"""Provenance: the machine, the versions and the settings that every number belongs to."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from rightbatch.records.record import Record


class Environment(Record):
    """Where and with what a run was measured."""

    device: str
    """``cpu``, ``cuda:0``, ``mps``."""
    device_name: str
    """Name of the processor or accelerator."""
    device_total_bytes: NonNegativeInt
    cpu_count: PositiveInt
    threads: PositiveInt
    """Threads torch computed with."""
    operating_system: str
    versions: tuple[tuple[str, str], ...]
    """(package or runtime, version)."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"]
    isolation: Literal["child", "in-process"]
    seed: NonNegativeInt
    flags: tuple[tuple[str, str], ...] = ()
    """Backend switches that change speed or memory: (name, value)."""
