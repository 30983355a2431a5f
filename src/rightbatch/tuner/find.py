"""From a workload and a request to findings: reuse what still holds, measure the rest, judge, keep everything.

Importing this module does not import torch, so that an answer that is already in the run folder comes at once.
"""

import hashlib
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rightbatch._version import __version__
from rightbatch.errors import InterruptedRunError
from rightbatch.records.environment import Environment
from rightbatch.records.measurements import (
    GradientNoiseMeasurements,
    LoaderMeasurements,
    Measurements,
    MemoryMeasurements,
    Outcome,
    StepTimeMeasurements,
    WorkloadSummary,
)
from rightbatch.records.plan import Findings
from rightbatch.records.record import Record
from rightbatch.records.run import RunFolder, RunManifest, StoredPart
from rightbatch.tuner.request import Part, Progress, Request

if TYPE_CHECKING:
    from rightbatch.engine.rig import Rig
    from rightbatch.tuner.measuring import Measuring

RUNS_FOLDER = Path("rightbatch-runs")

_WORKLOAD = "workload"
_ORDER = (Part.MEMORY, Part.STEP_TIME, Part.LOADER, Part.GRADIENT_NOISE)
_KINDS: Mapping[str, type[Record]] = {
    _WORKLOAD: WorkloadSummary,
    Part.MEMORY: MemoryMeasurements,
    Part.STEP_TIME: StepTimeMeasurements,
    Part.LOADER: LoaderMeasurements,
    Part.GRADIENT_NOISE: GradientNoiseMeasurements,
}


class Source(Protocol):
    """Where a workload comes from."""

    @property
    def spec(self) -> str:
        """How the user named it."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The user's arguments to it."""

    @property
    def name(self) -> str:
        """A word for it that can name a folder."""

    def load(self) -> Any:
        """Return the workload; runs the user's code."""

    def code_files(self) -> tuple[tuple[str, str], ...]:
        """Return (path, digest) of every file of the user's code, once loaded."""

    def code_is_unchanged(self, files: tuple[tuple[str, str], ...]) -> bool:
        """Return whether those files are as they were."""


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """What came out, and where it is kept.

    Attributes:
        findings: All conclusions.
        folder: The run folder; none when nothing was saved.
    """

    findings: Findings
    folder: Path | None


def find(
    source: Source,
    request: Request,
    progress: Progress,
    *,
    command: tuple[str, ...] = (),
    build_rig: "Callable[[], Rig] | None" = None,
    clock_s: Callable[[], float] = time.monotonic,
) -> FoundRun:
    """Measure what is asked and not yet known, and recommend.

    Args:
        source: Where the workload comes from.
        request: What is asked.
        progress: Where to say what goes on.
        command: The command that repeats this run.
        build_rig: Builds the rig where probes run; the default loads the source and takes the device's own meters.
        clock_s: Clock of the time budget, in seconds.

    Raises:
        RightbatchError: See ``rightbatch.errors``; what was measured before is kept.
    """
    if not request.save:
        state = _State(None, "", {})
        findings = _measure_and_judge(source, request, progress, state, command, build_rig, clock_s)
        return FoundRun(findings=findings, folder=None)
    path = request.out or RUNS_FOLDER / _folder_name(source, request)
    folder = RunFolder.create(path, fresh=request.fresh)
    with folder.lock(), folder.removed_if_empty():
        state = _stored(folder, source, request)
        findings = _answer_at_once(folder, request, state) or _measure_and_judge(
            source, request, progress, state, command, build_rig, clock_s
        )
    return FoundRun(findings=findings, folder=path)


def _folder_name(source: Source, request: Request) -> str:
    """The same question gets the same folder; another limit, precision or device gets another, so that none spoils the other's parts."""
    settings = (request.device, request.precision, request.max_batch, request.limit_bytes)
    return f"{source.name}-{_digest(source.spec, *source.arguments, str(settings))[:8]}"


@dataclass
class _State:
    """What is known before measuring, and where to keep what is found."""

    folder: RunFolder | None
    base_fingerprint: str
    parts: dict[str, Any]
    environment: Environment | None = None
    manifest: RunManifest | None = None
    created_at: str = ""
    measured_at: str = ""

    def keep(self, name: str, record: Record, request: Request) -> None:
        now = _now()
        self.parts[name] = record
        if name != _WORKLOAD:
            self.measured_at = min(self.measured_at or now, now)
        if self.folder is not None:
            self.folder.write_part(name, record, fingerprint=_part_fingerprint(self.base_fingerprint, name, request), measured_at=now)

    def measurements(self) -> Measurements:
        return Measurements(**self.parts)


def _stored(folder: RunFolder, source: Source, request: Request) -> _State:
    """Read the parts of an earlier run that still hold: same code, arguments, versions, machine and settings."""
    base = _digest(
        str(Path.cwd()),
        source.spec,
        *source.arguments,
        *_machine(),
        str((request.device, request.precision, request.seed, request.threads, request.isolation)),
    )
    manifest = None if request.fresh else folder.read_manifest()
    state = _State(folder, base, {}, created_at=manifest.created_at if manifest else _now())
    if manifest is None or manifest.environment is None or not source.code_is_unchanged(manifest.code_files):
        return state
    parts = {name: part for name, kind in _KINDS.items() if (part := folder.read_part(name, kind)) is not None}
    holding = {name: part for name, part in parts.items() if part.fingerprint == _part_fingerprint(base, name, request)}
    if _WORKLOAD not in holding:
        return state
    state.environment, state.manifest = manifest.environment, manifest
    cut_short = _cut_short(folder, holding) if request.budget_s > (manifest.budget_s or request.budget_s) else set()
    state.parts = {name: part.record for name, part in holding.items() if name not in cut_short}
    state.measured_at = min((part.measured_at for name, part in holding.items() if name in state.parts and name != _WORKLOAD), default="")
    return state


def _cut_short(folder: RunFolder, parts: Mapping[str, StoredPart[Any]]) -> set[str]:
    """Parts that a larger budget would improve: a search that the budget ended, and timings and noise that decided nothing."""
    improvable: set[str] = set()
    memory = parts.get(Part.MEMORY)
    if memory is not None and memory.record.stopped_by == "budget":
        improvable.add(Part.MEMORY)
    findings = folder.read_findings()
    if findings is not None and findings.recommendation.status not in {"ok", "nothing_fits"}:
        improvable |= {Part.STEP_TIME, Part.GRADIENT_NOISE}
    return improvable


def _part_fingerprint(base: str, name: str, request: Request) -> str:
    """Sizes and limits change what is measured of memory and time, and through the ceiling what is measured of noise; the goal does not."""
    bounds = (request.max_batch, request.limit_bytes) if name not in (_WORKLOAD, Part.LOADER) else ()
    return _digest(base, name, str(bounds))


def _answer_at_once(folder: RunFolder, request: Request, state: _State) -> Findings | None:
    """Return the stored verdict if everything asked is measured and the question is the same."""
    if not {part.value for part in request.parts} <= state.parts.keys():
        return None
    findings = folder.read_findings()
    if findings is None or state.environment is None or findings.measured_at != state.measured_at:
        return None
    if not state.parts.keys() <= _judged_parts(findings):  # the run ended between the last measurement and its verdict
        return None
    if (findings.recommendation.objective, findings.constraints) != (request.objective, request.constraints):
        return None
    return findings.model_copy(update={"reused_parts": _reused(state), "duration_s": 0.0})


def _judged_parts(findings: Findings) -> set[str]:
    judged = {
        Part.MEMORY: findings.memory,
        Part.STEP_TIME: findings.step_time,
        Part.LOADER: findings.loader,
        Part.GRADIENT_NOISE: findings.noise_scale,
    }
    return {_WORKLOAD, *(part.value for part, conclusion in judged.items() if conclusion is not None)}


def _reused(state: _State) -> tuple[str, ...]:
    return tuple(part.value for part in _ORDER if part.value in state.parts)


def _measure_and_judge(
    source: Source,
    request: Request,
    progress: Progress,
    state: _State,
    command: tuple[str, ...],
    build_rig: "Callable[[], Rig] | None",
    clock_s: Callable[[], float],
) -> Findings:
    from rightbatch.recommend import judge

    reused = _reused(state)
    waiting = frozenset(part for part in request.parts | {Part.MEMORY} if part.value not in state.parts)
    duration_s = 0.0
    if waiting or state.environment is None:
        if state.folder is not None:
            state.folder.keep_only(state.parts)
        duration_s = _measure(source, request, progress, state, waiting, command, build_rig, clock_s)
    assert state.environment is not None, "set by the measuring, or stored"  # noqa: S101
    findings = judge(
        state.measurements(),
        environment=state.environment,
        objective=request.objective,
        constraints=request.constraints,
        reused_parts=reused,
        measured_at=state.measured_at or _now(),
        duration_s=duration_s,
    )
    if state.folder is not None:
        state.folder.write_findings(findings)
        if state.manifest is not None:
            _write_manifest(state, _asked_again(state.manifest, request, command))
    return findings


def _measure(
    source: Source,
    request: Request,
    progress: Progress,
    state: _State,
    waiting: frozenset[Part],
    command: tuple[str, ...],
    build_rig: "Callable[[], Rig] | None",
    clock_s: Callable[[], float],
) -> float:
    """Measure the waiting parts in order; keep each as soon as it is there. Return the seconds it took."""
    from rightbatch.engine.rig import build_rig as default_build_rig
    from rightbatch.tuner.measuring import Measuring

    build = build_rig or partial(
        default_build_rig, source.load, device=request.device, precision=request.precision, threads=request.threads, seed=request.seed
    )
    manifest: RunManifest | None = None
    with ExitStack() as stack:
        try:
            measuring = Measuring(build, request, progress, clock_s)
            stack.callback(measuring.close)
            summary, state.environment = measuring.describe()
            state.keep(_WORKLOAD, summary, request)
            code_files = measuring.on_host(partial(_code_files, source=source))
            manifest = _manifest(source, request, state, command, code_files)
            _write_manifest(state, manifest)
            _measure_parts(measuring, request, state, waiting, summary)
        except KeyboardInterrupt as error:
            if manifest is not None:
                _write_manifest(state, manifest.model_copy(update={"state": "interrupted", "updated_at": _now()}))
            kept = ", ".join(part.value.replace("_", " ") for part in _ORDER if part.value in state.parts) or "nothing"
            raise InterruptedRunError(f"interrupted; measured so far: {kept}.", shlex.join(command)) from error
    state.manifest = manifest
    return measuring.elapsed_s


def _measure_parts(measuring: "Measuring", request: Request, state: _State, waiting: frozenset[Part], summary: WorkloadSummary) -> None:
    for part in _ORDER:
        if part not in waiting:
            continue
        budget_s = measuring.share_s(part, waiting)
        waiting -= {part}
        memory: MemoryMeasurements | None = state.parts.get(Part.MEMORY)
        record: Any
        if part is Part.LOADER:
            record = measuring.loader(budget_s)
        elif part is Part.MEMORY or memory is None:
            record = measuring.memory(summary, budget_s)
        elif not any(point.outcome is Outcome.RAN for point in memory.points):
            return
        elif part is Part.STEP_TIME:
            record = measuring.step_time(summary, memory, budget_s)
        else:
            record = measuring.gradient_noise(summary, memory, state.parts.get(Part.STEP_TIME), budget_s)
        state.keep(part.value, record, request)


def _code_files(_rig: "Rig", *, source: Source) -> tuple[tuple[str, str], ...]:
    return source.code_files()


def _asked_again(manifest: RunManifest, request: Request, command: tuple[str, ...]) -> RunManifest:
    """The manifest of the same measurements, judged for the present question."""
    asked = {
        "objective": request.objective,
        "constraints": request.constraints,
        "command": command,
        "state": "complete",
        "updated_at": _now(),
    }
    return manifest.model_copy(update=asked)


def _manifest(
    source: Source, request: Request, state: _State, command: tuple[str, ...], code_files: tuple[tuple[str, str], ...]
) -> RunManifest:
    return RunManifest(
        rightbatch_version=__version__,
        created_at=state.created_at or _now(),
        updated_at=_now(),
        command=command,
        workload_spec=source.spec,
        workload_arguments=source.arguments,
        environment=state.environment,
        code_files=code_files,
        state="measuring",
        budget_s=request.budget_s,
        objective=request.objective,
        constraints=request.constraints,
    )


def _write_manifest(state: _State, manifest: RunManifest) -> None:
    if state.folder is not None:
        state.folder.write_manifest(manifest)


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


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
