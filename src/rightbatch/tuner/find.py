"""From a workload and a request to findings: reuse what still holds, measure the rest, judge, keep everything.

Importing this module does not import torch, so that an answer that is already in the run folder comes at once.
"""

import json
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightbatch._version import __version__
from rightbatch.engine.ranks import WAIT_S, Ranks, bucket_bytes, failure_told, local_device, ranks_from_environment
from rightbatch.errors import InterruptedRunError, UsageError
from rightbatch.records.folder import RUNS_FOLDER
from rightbatch.records.measurements import (
    MemoryMeasurements,
    Outcome,
    WorkloadSummary,
)
from rightbatch.records.plan import Findings
from rightbatch.records.run import RunFolder, RunManifest
from rightbatch.tuner.kept import ORDER, SWEPT, WORKLOAD, Kept, answer_at_once, digest, now, read_kept, take_in_sweep
from rightbatch.tuner.request import STANDARD_PARTS, Part, Progress, Request, SilentProgress, parts_of
from rightbatch.units import format_number
from rightbatch.workload.source import Source

if TYPE_CHECKING:
    from rightbatch.engine.rig import Rig
    from rightbatch.tuner.measuring import Measuring

_FINDINGS = "findings"
"""The last stage of all ranks."""


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """What came out, and where it is kept.

    Attributes:
        findings: All conclusions; the same on every rank.
        folder: The run folder; none when nothing was saved, and on every rank but the first.
        rank: Number of this process among those that measured together; 0 writes and prints.
    """

    findings: Findings
    folder: Path | None
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Everything that a run is asked, and by how many processes."""

    source: Source
    request: Request
    progress: Progress
    command: tuple[str, ...]
    build_rig: "Callable[[], Rig] | None"
    clock_s: Callable[[], float]
    ranks: Ranks


def find(
    source: Source,
    request: Request,
    progress: Progress,
    *,
    command: tuple[str, ...] = (),
    build_rig: "Callable[[], Rig] | None" = None,
    clock_s: Callable[[], float] = time.monotonic,
    ranks: Ranks | None = None,
) -> FoundRun:
    """Measure what is asked and not yet known, and recommend.

    Under ``torchrun`` every rank calls this and gets the same findings: all search for the memory ceiling together, and the first rank
    alone measures the rest, says how it goes, and keeps the run folder.

    Args:
        source: Where the workload comes from.
        request: What is asked.
        progress: Where to say what goes on.
        command: The command that repeats this run.
        build_rig: Builds the rig where probes run; the default loads the source and takes the device's own meters.
        clock_s: Clock of the time budget, in seconds.
        ranks: The processes that ask together, left at the end; the default asks the environment that a launcher sets.

    Raises:
        RightbatchError: See ``rightbatch.errors``; what was measured before is kept.
    """
    if ranks is None:
        ranks = ranks_from_environment(WAIT_S + request.budget_s)
    asked = _Asked(
        source=source,
        request=_for_all(ranks, request),
        progress=progress if ranks.rank == 0 else SilentProgress(),
        command=command,
        build_rig=build_rig,
        clock_s=clock_s,
        ranks=ranks,
    )
    with failure_told(ranks):
        return _lead(asked) if ranks.rank == 0 else _follow(asked)


def _for_all(ranks: Ranks, request: Request) -> Request:
    """The plan is for as many processes as ask for it, unless the user named a number."""
    if ranks.world_size == 1 or request.constraints.world_size > 1:
        return request
    return replace(request, constraints=request.constraints.model_copy(update={"world_size": ranks.world_size}))


def _lead(asked: _Asked) -> FoundRun:
    """Decide what is to be measured, measure it, judge, and keep it all."""
    request = asked.request
    if not request.save:
        findings = _measure_and_judge(asked, Kept(None, "", {}))
        path = None
    else:
        path = request.out or default_folder(asked.source, request, asked.ranks.world_size)
        folder = RunFolder.create(path, fresh=request.fresh)
        with folder.lock(), folder.removed_if_empty():
            kept = read_kept(folder, asked.source, request, rank_count=asked.ranks.world_size)
            if request.parts >= STANDARD_PARTS:
                take_in_sweep(kept, asked.source)
            known = answer_at_once(folder, request, kept)
            if known is not None:
                _share_waiting(asked.ranks, frozenset())
            findings = known or _measure_and_judge(asked, kept)
    asked.ranks.share_text(findings.model_dump_json, stage=_FINDINGS)
    return FoundRun(findings=findings, folder=path)


def _follow(asked: _Asked) -> FoundRun:
    """Take part in the search for the ceiling if it is still to be made, then wait for what the first rank concludes."""
    waiting = _share_waiting(asked.ranks, frozenset())
    if Part.MEMORY in waiting:
        from rightbatch.tuner.measuring import Measuring

        measuring = Measuring(_builder(asked), asked.request, asked.progress, asked.clock_s)
        with closing(measuring):  # before the wait: what this rank's child holds would disturb the first rank's timings
            summary, _ = measuring.describe()
            measuring.start_budget()
            _memory(measuring, asked, summary, measuring.share_s(Part.MEMORY, waiting))
    findings = Findings.model_validate_json(asked.ranks.share_text(str, stage=_FINDINGS))
    return FoundRun(findings=findings, folder=None, rank=asked.ranks.rank)


def _share_waiting(ranks: Ranks, waiting: frozenset[Part]) -> frozenset[Part]:
    """Return on every rank what the first one still has to measure: it alone knows what was kept."""
    shared = ranks.share_text(lambda: json.dumps(sorted(waiting)), stage="what is to be measured")
    return frozenset(Part(name) for name in json.loads(shared))


def default_folder(source: Source, request: Request, rank_count: int = 1) -> Path:
    """Return the run folder of a question that names none.

    The same question gets the same folder; another limit, precision, device or number of ranks its own: none spoils another's parts.

    Args:
        source: Where the workload comes from.
        request: What is asked.
        rank_count: Processes that ask together.
    """
    settings: tuple[object, ...] = (request.device, request.precision, request.max_batch, request.limit_bytes)
    if rank_count > 1:
        settings = (*settings, rank_count)
    return RUNS_FOLDER / f"{source.name}-{digest(source.spec, *source.arguments, str(settings))[:8]}"


def _measure_and_judge(asked: _Asked, kept: Kept) -> Findings:
    request = asked.request
    taken_over = dict(kept.parts)
    wanted = parts_of(request, kept.parts.get(WORKLOAD)) | {Part.MEMORY}
    waiting = frozenset(part for part in wanted if part.value not in kept.parts)
    _share_waiting(asked.ranks, waiting)
    duration_s = 0.0
    if kept.folder is not None:
        kept.folder.keep_only(kept.parts)
    if waiting or kept.environment is None:
        duration_s = _measure(asked, kept, waiting)
    reused = tuple(name for name in kept.part_names if kept.parts[name] is taken_over.get(name))
    findings = _judge(asked, kept).model_copy(update={"reused_parts": reused, "duration_s": duration_s})
    if kept.folder is not None:
        if SWEPT in kept.parts:
            kept.keep(SWEPT, kept.parts[SWEPT], request)
        kept.folder.write_findings(findings)
        if kept.manifest is not None:
            kept.write_manifest(_asked_again(kept.manifest, request, asked.command))
    return findings


def _judge(asked: _Asked, kept: Kept) -> Findings:
    """Conclude from what is known so far."""
    from rightbatch.recommend import judge

    assert kept.environment is not None, "set by the measuring, or stored"  # noqa: S101
    return judge(
        kept.measurements(),
        environment=kept.environment,
        objective=asked.request.objective,
        constraints=asked.request.constraints,
        measured_at=kept.measured_at or now(),
        duration_s=0.0,
    )


def _builder(asked: _Asked) -> "Callable[[], Rig]":
    from rightbatch.engine.rig import build_rig

    request = asked.request
    return asked.build_rig or partial(
        build_rig,
        asked.source.load,
        device=local_device(request.device),
        precision=request.precision,
        threads=request.threads,
        seed=request.seed,
    )


def _measure(asked: _Asked, kept: Kept, waiting: frozenset[Part]) -> float:
    """Measure the waiting parts in order; keep each as soon as it is there. Return the seconds it took."""
    from rightbatch.tuner.measuring import Measuring

    source, request = asked.source, asked.request
    manifest: RunManifest | None = None
    with ExitStack() as stack:
        try:
            measuring = Measuring(_builder(asked), request, asked.progress, asked.clock_s)
            stack.callback(measuring.close)
            summary, kept.environment = measuring.describe()
            _check_same(kept, summary)
            kept.keep(WORKLOAD, summary, request)
            code_files = measuring.on_host(partial(_code_files, source=source))
            manifest = _manifest(source, request, kept, asked.command, code_files)
            kept.write_manifest(manifest)
            untuned = parts_of(request, summary) - request.parts - {Part(name) for name in kept.part_names}
            measuring.start_budget()
            _measure_parts(measuring, asked, kept, waiting | untuned, summary)
        except KeyboardInterrupt as error:
            if manifest is not None:
                kept.write_manifest(manifest.model_copy(update={"state": "interrupted", "updated_at": now()}))
            measured = ", ".join(name.replace("_", " ") for name in kept.part_names) or "nothing"
            raise InterruptedRunError(f"interrupted; measured so far: {measured}.", shlex.join(asked.command)) from error
    kept.manifest = manifest
    return measuring.elapsed_s


def _check_same(kept: Kept, summary: WorkloadSummary) -> None:
    """Refuse to add to what was measured on another workload: its data may have changed where no code has, or all of it in Python."""
    before: WorkloadSummary | None = kept.parts.get(WORKLOAD)
    if before is None or kept.folder is None or not kept.part_names or _identity(before) == _identity(summary):
        return
    raise UsageError(
        f"all parts of an answer must come from one workload; {kept.folder.path} holds parts of {_identity(before)}, and this one is "
        f"{_identity(summary)}; measure all of it again (--fresh; in Python without resume), or pass another --out."
    )


def _identity(workload: WorkloadSummary) -> str:
    rate = "" if workload.lr is None else f" at {format_number(workload.lr)}"
    counts = f"{workload.parameter_count} parameters, {workload.train_size} training samples"
    return f"{workload.name} ({counts}, {workload.optimizer}{rate})"


def _measure_parts(measuring: "Measuring", asked: _Asked, kept: Kept, waiting: frozenset[Part], summary: WorkloadSummary) -> None:
    asked_for = parts_of(asked.request, summary)
    for part in ORDER:
        if part is Part.GRADIENT_NOISE and part in asked_for and kept.noise_is_outdated:  # the rate was tested just now
            waiting |= {part}
        if part not in waiting:
            continue
        budget_s = measuring.share_s(part, waiting)
        waiting -= {part}
        memory: MemoryMeasurements | None = kept.parts.get(Part.MEMORY)
        record: Any
        if part is Part.LOADER:
            record = measuring.loader(budget_s)
        elif part is Part.MEMORY or memory is None:
            record = _memory(measuring, asked, summary, budget_s)
        elif not any(point.outcome is Outcome.RAN for point in memory.points):
            return
        elif part is Part.STEP_TIME:
            record = measuring.step_time(summary, memory, budget_s)
        elif part is Part.BRANCHES:
            record = measuring.branches(_judge(asked, kept), budget_s)
        elif part is Part.LR_RANGE:
            record = measuring.lr_range(summary, memory, budget_s)
        else:
            record = measuring.gradient_noise(kept.trained_as(summary), memory, kept.parts.get(Part.STEP_TIME), budget_s)
        kept.keep(part.value, record, asked.request)


def _memory(measuring: "Measuring", asked: _Asked, summary: WorkloadSummary, budget_s: float) -> MemoryMeasurements:
    """Search for the ceiling, beside the buckets that each of several processes will keep."""
    if asked.ranks.world_size == 1:
        return measuring.memory(summary, budget_s)
    bucket = measuring.on_host(bucket_bytes)
    return measuring.memory(summary, budget_s, ranks=asked.ranks, bucket_bytes=bucket)


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
