"""From a workload and a request to findings: reuse what still holds, measure the rest, judge, keep everything.

Importing this module does not import torch, so that an answer that is already in the run folder comes at once.
"""

import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightbatch._version import __version__
from rightbatch.errors import InterruptedRunError
from rightbatch.records.measurements import (
    MemoryMeasurements,
    Outcome,
    WorkloadSummary,
)
from rightbatch.records.plan import Findings
from rightbatch.records.run import RunFolder, RunManifest
from rightbatch.tuner.kept import ORDER, WORKLOAD, Kept, answer_at_once, digest, now, read_kept
from rightbatch.tuner.request import Part, Progress, Request, Source

if TYPE_CHECKING:
    from rightbatch.engine.rig import Rig
    from rightbatch.tuner.measuring import Measuring

RUNS_FOLDER = Path("rightbatch-runs")


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
        kept = Kept(None, "", {})
        findings = _measure_and_judge(source, request, progress, kept, command, build_rig, clock_s)
        return FoundRun(findings=findings, folder=None)
    path = request.out or RUNS_FOLDER / _folder_name(source, request)
    folder = RunFolder.create(path, fresh=request.fresh)
    with folder.lock(), folder.removed_if_empty():
        kept = read_kept(folder, source, request)
        findings = answer_at_once(folder, request, kept) or _measure_and_judge(source, request, progress, kept, command, build_rig, clock_s)
    return FoundRun(findings=findings, folder=path)


def _folder_name(source: Source, request: Request) -> str:
    """The same question gets the same folder; another limit, precision or device gets another, so that none spoils the other's parts."""
    settings = (request.device, request.precision, request.max_batch, request.limit_bytes)
    return f"{source.name}-{digest(source.spec, *source.arguments, str(settings))[:8]}"


def _measure_and_judge(
    source: Source,
    request: Request,
    progress: Progress,
    kept: Kept,
    command: tuple[str, ...],
    build_rig: "Callable[[], Rig] | None",
    clock_s: Callable[[], float],
) -> Findings:
    from rightbatch.recommend import judge

    taken_over = kept.part_names
    waiting = frozenset(part for part in request.parts | {Part.MEMORY} if part.value not in kept.parts)
    duration_s = 0.0
    if waiting or kept.environment is None:
        if kept.folder is not None:
            kept.folder.keep_only(kept.parts)
        duration_s = _measure(source, request, progress, kept, waiting, command, build_rig, clock_s)
    assert kept.environment is not None, "set by the measuring, or stored"  # noqa: S101
    findings = judge(
        kept.measurements(),
        environment=kept.environment,
        objective=request.objective,
        constraints=request.constraints,
        reused_parts=taken_over,
        measured_at=kept.measured_at or now(),
        duration_s=duration_s,
    )
    if kept.folder is not None:
        kept.folder.write_findings(findings)
        if kept.manifest is not None:
            kept.write_manifest(_asked_again(kept.manifest, request, command))
    return findings


def _measure(
    source: Source,
    request: Request,
    progress: Progress,
    kept: Kept,
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
            summary, kept.environment = measuring.describe()
            kept.keep(WORKLOAD, summary, request)
            code_files = measuring.on_host(partial(_code_files, source=source))
            manifest = _manifest(source, request, kept, command, code_files)
            kept.write_manifest(manifest)
            _measure_parts(measuring, request, kept, waiting, summary)
        except KeyboardInterrupt as error:
            if manifest is not None:
                kept.write_manifest(manifest.model_copy(update={"state": "interrupted", "updated_at": now()}))
            measured = ", ".join(name.replace("_", " ") for name in kept.part_names) or "nothing"
            raise InterruptedRunError(f"interrupted; measured so far: {measured}.", shlex.join(command)) from error
    kept.manifest = manifest
    return measuring.elapsed_s


def _measure_parts(measuring: "Measuring", request: Request, kept: Kept, waiting: frozenset[Part], summary: WorkloadSummary) -> None:
    for part in ORDER:
        if part not in waiting:
            continue
        budget_s = measuring.share_s(part, waiting)
        waiting -= {part}
        memory: MemoryMeasurements | None = kept.parts.get(Part.MEMORY)
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
            record = measuring.gradient_noise(summary, memory, kept.parts.get(Part.STEP_TIME), budget_s)
        kept.keep(part.value, record, request)


def _code_files(_rig: "Rig", *, source: Source) -> tuple[tuple[str, str], ...]:
    return source.code_files()


def _asked_again(manifest: RunManifest, request: Request, command: tuple[str, ...]) -> RunManifest:
    """The manifest of the same measurements, judged for the present question."""
    asked = {
        "objective": request.objective,
        "constraints": request.constraints,
        "command": command,
        "state": "complete",
        "updated_at": now(),
    }
    return manifest.model_copy(update=asked)


def _manifest(
    source: Source, request: Request, kept: Kept, command: tuple[str, ...], code_files: tuple[tuple[str, str], ...]
) -> RunManifest:
    return RunManifest(
        rightbatch_version=__version__,
        created_at=kept.created_at or now(),
        updated_at=now(),
        command=command,
        workload_spec=source.spec,
        workload_arguments=source.arguments,
        environment=kept.environment,
        code_files=code_files,
        state="measuring",
        budget_s=request.budget_s,
        objective=request.objective,
        constraints=request.constraints,
    )
