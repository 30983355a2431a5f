"""What an earlier run left in its folder, whether it still holds, and where new measurements are kept. Never imports torch."""

import hashlib
import math
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rightbatch._version import __version__
from rightbatch.errors import RunFolderError
from rightbatch.fits.lr_range import fit_lr_range, with_tested_rate
from rightbatch.fits.swept import evidence_of
from rightbatch.records.environment import Environment
from rightbatch.records.folder import RUNS_FOLDER
from rightbatch.records.measurements import Measurements, WorkloadSummary
from rightbatch.records.plan import Findings
from rightbatch.records.record import Record
from rightbatch.records.run import PART_KINDS, RunFolder, RunManifest, StoredPart
from rightbatch.records.sweep_folder import SweepFolder
from rightbatch.records.training import SweepEvidence
from rightbatch.tuner.request import Part, Request, parts_of
from rightbatch.workload.source import Source

WORKLOAD, SWEPT = "workload", "swept"
ORDER = (Part.MEMORY, Part.STEP_TIME, Part.LOADER, Part.LR_RANGE, Part.GRADIENT_NOISE, Part.BRANCHES)
_SAME_RATE = 1e-6
"""Relative difference of two learning rates that are one."""


@dataclass
class Kept:
    """What is known before measuring, and where to keep what is found."""

    folder: RunFolder | None
    base_fingerprint: str
    parts: dict[str, Any]
    environment: Environment | None = None
    manifest: RunManifest | None = None
    created_at: str = ""
    measured_at: str = ""

    def keep(self, name: str, record: Record, request: Request) -> None:
        """Take a new measurement in, and write it into the folder at once."""
        measured_at = now()
        self.parts[name] = record
        if name not in (WORKLOAD, SWEPT):
            self.measured_at = min(self.measured_at or measured_at, measured_at)
        if self.folder is not None:
            fingerprint = _part_fingerprint(self.base_fingerprint, name, request)
            self.folder.write_part(name, record, fingerprint=fingerprint, measured_at=measured_at)

    def write_manifest(self, manifest: RunManifest) -> None:
        """Write the manifest into the folder, if there is one."""
        if self.folder is not None:
            self.folder.write_manifest(manifest)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts that are known, in the order of measuring."""
        return tuple(part.value for part in ORDER if part.value in self.parts)

    def trained_as(self, workload: WorkloadSummary) -> WorkloadSummary:
        """Return the workload with the rate that was tested, where that stands in for a tuned one."""
        tested = self.parts.get(Part.LR_RANGE)
        return workload if tested is None else with_tested_rate(workload, fit_lr_range(tested))

    @property
    def noise_is_outdated(self) -> bool:
        """Whether the pilot of the noise took another rate than the one that is tested by now."""
        if Part.GRADIENT_NOISE not in self.parts or WORKLOAD not in self.parts:
            return False
        taken, trained = self.parts[Part.GRADIENT_NOISE].pilot_lr, self.trained_as(self.parts[WORKLOAD])
        if taken is None or trained.lr is None or not trained.lr_is_tested:
            return False
        return not math.isclose(taken, trained.lr, rel_tol=_SAME_RATE)

    def measurements(self) -> Measurements:
        """Return everything that is known."""
        return Measurements(**self.parts)


def read_kept(folder: RunFolder, source: Source, request: Request, *, rank_count: int = 1) -> Kept:
    """Read the parts of an earlier run that still hold: same code, arguments, versions, machine and settings.

    Args:
        folder: The run folder.
        source: Where the workload comes from.
        request: What is asked.
        rank_count: Processes that agree on every size; what so many agreed on says nothing about another number.
    """
    base = digest(
        str(Path.cwd()),
        source.spec,
        *source.arguments,
        *_machine(),
        str((request.device, request.precision, request.seed, request.threads, request.isolation)),
        *((f"{rank_count} ranks",) if rank_count > 1 else ()),
    )
    manifest = None if request.fresh else folder.read_manifest()
    kept = Kept(folder, base, {}, created_at=manifest.created_at if manifest else now())
    if manifest is None or manifest.environment is None or not source.code_is_unchanged(manifest.code_files):
        return kept
    parts = {name: part for name, kind in PART_KINDS.items() if (part := folder.read_part(name, kind)) is not None}
    holding = {name: part for name, part in parts.items() if part.fingerprint == _part_fingerprint(base, name, request)}
    if WORKLOAD not in holding:
        return kept
    kept.environment, kept.manifest = manifest.environment, manifest
    cut_short = _cut_short(folder, holding) if request.budget_s > (manifest.budget_s or request.budget_s) else set()
    kept.parts = {name: part.record for name, part in holding.items() if name not in cut_short}
    if kept.noise_is_outdated:
        del kept.parts[Part.GRADIENT_NOISE]
    kept.measured_at = min(
        (part.measured_at for name, part in holding.items() if name in kept.parts and name not in (WORKLOAD, SWEPT)), default=""
    )
    return kept


def take_in_sweep(kept: Kept, source: Source) -> None:
    """Let the latest finished sweep of the same workload, with the same code, take part in the answer; its trials are training probes.

    Args:
        kept: What is known before measuring.
        source: Where the workload comes from.
    """
    found = max(_sweeps_of(source), key=lambda pair: pair[0], default=None)
    kept.parts.pop(SWEPT, None)
    if found is not None:
        kept.parts[SWEPT] = found[1]


def _sweeps_of(source: Source) -> Iterator[tuple[str, SweepEvidence]]:
    """Finished sweeps below ``rightbatch-runs``, with the time of their last change; what cannot be read is somebody else's concern."""
    for path in sorted(RUNS_FOLDER.iterdir()) if RUNS_FOLDER.is_dir() else ():
        if not SweepFolder.is_at(path):
            continue
        try:
            manifest, result = SweepFolder(path).read_manifest(), SweepFolder(path).read_result()
        except RunFolderError:
            continue
        if manifest is None or result is None or (manifest.workload_spec, manifest.workload_arguments) != (source.spec, source.arguments):
            continue
        is_same = bool(manifest.code_files) and source.code_is_unchanged(manifest.code_files)
        evidence = evidence_of(result, str(path)) if is_same else None
        if evidence is not None:
            yield manifest.updated_at, evidence


def _cut_short(folder: RunFolder, parts: Mapping[str, StoredPart[Any]]) -> set[str]:
    """Parts that a larger budget would improve: a search that the budget ended, and timings and noise that decided nothing."""
    improvable: set[str] = set()
    memory = parts.get(Part.MEMORY)
    if memory is not None and memory.record.stopped_by == "budget":
        improvable.add(Part.MEMORY)
    findings = folder.read_findings()
    if findings is not None and findings.recommendation.status not in {"ok", "nothing_fits"}:
        improvable |= {Part.STEP_TIME, Part.GRADIENT_NOISE}
    if findings is not None and findings.lr_range is not None and findings.lr_range.value is None:
        improvable.add(Part.LR_RANGE)
    return improvable


def _part_fingerprint(base: str, name: str, request: Request) -> str:
    """Sizes and limits change what is measured of memory and time, and through the ceiling what is measured of noise; the goal does not."""
    bounds = (request.max_batch, request.limit_bytes) if name not in (WORKLOAD, Part.LOADER) else ()
    return digest(base, name, str(bounds))


def answer_at_once(folder: RunFolder, request: Request, kept: Kept) -> Findings | None:
    """Return the stored verdict if everything asked is measured and the question is the same."""
    if not {part.value for part in parts_of(request, kept.parts.get(WORKLOAD))} <= kept.parts.keys():
        return None
    findings = folder.read_findings()
    if findings is None or kept.environment is None or findings.measured_at != kept.measured_at:
        return None
    if findings.swept != kept.parts.get(SWEPT):
        return None
    if not kept.parts.keys() <= _judged_parts(findings):  # the run ended between the last measurement and its verdict
        return None
    if (findings.recommendation.objective, findings.constraints) != (request.objective, request.constraints):
        return None
    return findings.model_copy(update={"reused_parts": kept.part_names, "duration_s": 0.0})


def _judged_parts(findings: Findings) -> set[str]:
    judged = {
        Part.MEMORY: findings.memory,
        Part.STEP_TIME: findings.step_time,
        Part.LOADER: findings.loader,
        Part.GRADIENT_NOISE: findings.noise_scale,
        Part.BRANCHES: findings.branches,
        Part.LR_RANGE: findings.lr_range,
    }
    return {WORKLOAD, SWEPT, *(part.value for part, conclusion in judged.items() if conclusion is not None)}


def _machine() -> tuple[str, ...]:
    """What a timing depends on and can be told without torch."""
    return (
        platform.python_version(),
        __version__,
        metadata.version("torch"),
        platform.platform(),
        str(os.cpu_count()),
        os.environ.get("OMP_NUM_THREADS", ""),
        os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        *_gpu_names(),
    )


def _gpu_names() -> tuple[str, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return tuple(str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(pynvml.nvmlDeviceGetCount()))
    except Exception:  # noqa: BLE001  # no library, no driver or no device: no names
        return ()


def digest(*words: str) -> str:
    """Return the SHA-256 of some words, in hexadecimal."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def now() -> str:
    """Return the time: ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
