"""A training from its request to its result: the folder, what goes on from it, the loop, and what is kept."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from rightbatch._version import __version__
from rightbatch.engine.provenance import cpu_name
from rightbatch.engine.rig import Rig
from rightbatch.errors import RunFolderError, UsageError
from rightbatch.fits.training_result import training_result
from rightbatch.records.document import ForeignRecordError, NewerSchemaError
from rightbatch.records.training_log import LogEvent, LogLine
from rightbatch.records.training_run import TrainingFolder, TrainingManifest, TrainingResult, TrainingState
from rightbatch.training.assembly import Parts, assemble
from rightbatch.training.checkpoint import Checkpoint, load_checkpoint, remove_checkpoints
from rightbatch.training.evaluation import check_target
from rightbatch.training.log import TrainingLog
from rightbatch.training.loop import TrainingLoop
from rightbatch.training.peers import Peers, peers_from_environment
from rightbatch.training.progress_words import plan_words
from rightbatch.training.request import KeepGoing, SilentTraining, TrainingProgress, TrainingRequest
from rightbatch.training.stop_signals import StopSignals

NO_CODE: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a workload comes from.

    Attributes:
        spec: How the user named it.
        arguments: The user's arguments to it.
        code_files: (path, SHA-256) of every file of the user's code.
    """

    spec: str = "a workload given in Python"
    arguments: tuple[str, ...] = ()
    code_files: tuple[tuple[str, str], ...] = NO_CODE


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What came out.

    Attributes:
        result: In numbers; the same on all ranks.
        manifest: What was asked.
        lines: The log; empty on every rank but the first.
        model: The trained model, in training mode, not wrapped.
        average: Moving average of its weights; none when the workload keeps none.
        folder: Where everything is kept; none when nothing is, and on every rank but the first.
        rank: Number of this process.
        is_kept: Whether there is a folder.
        was_complete: Whether the folder held a finished training, so that nothing was trained now.
    """

    result: TrainingResult
    manifest: TrainingManifest
    lines: tuple[LogLine, ...]
    model: nn.Module
    average: nn.Module | None
    folder: Path | None
    rank: int
    is_kept: bool
    was_complete: bool


def run_training(
    rig: Rig,
    request: TrainingRequest,
    *,
    origin: Origin,
    progress: TrainingProgress,
    keep_going: KeepGoing | None = None,
    peers: Peers | None = None,
    clock_s: Callable[[], float] = time.monotonic,
) -> TrainedRun:
    """Train a workload; under a launcher every rank calls this with the same arguments.

    Args:
        rig: The workload on the device of this rank.
        request: How to train.
        origin: Where the workload comes from.
        progress: Where to say how it goes.
        keep_going: Asked after each evaluation; the training ends where it says no.
        peers: The ranks; the default asks the environment that a launcher sets.
        clock_s: Clock of times in the log, in seconds.

    Raises:
        RightbatchError: See ``rightbatch.errors``; checkpoints that were written before are intact.
    """
    peers = peers_from_environment(rig.device) if peers is None else peers
    with ExitStack() as stack:
        stack.callback(peers.close)
        signals = stack.enter_context(StopSignals())
        if request.target is not None:
            check_target(rig.workload, is_loss=request.target.is_loss)
        folder = None if request.out is None else peers.share(lambda: TrainingFolder.create(request.out or Path()))
        if folder is not None:
            peers.share(lambda: stack.enter_context(folder.lock()))
            peers.share(lambda: _make_room(folder, request))
        parts = assemble(rig, request, peers)
        stack.callback(parts.loader.close)
        return _Session(
            parts=parts,
            request=request,
            origin=origin,
            folder=folder,
            progress=progress if peers.rank == 0 else SilentTraining(),
            signals=signals,
            keep_going=keep_going,
            clock_s=clock_s,
        ).run()


def _make_room(folder: TrainingFolder, request: TrainingRequest) -> None:
    """Refuse to train over an earlier training, unless it goes on or is to be dropped, readable or not."""
    try:
        manifest = folder.read_manifest()
    except (ForeignRecordError, NewerSchemaError):
        raise
    except RunFolderError:
        if not request.fresh:
            raise
        manifest = None
    if request.fresh:
        remove_checkpoints(folder.path)
    elif manifest is not None and not request.resume:
        raise UsageError(
            f"a folder keeps one training; {folder.path} holds one of {manifest.workload_spec} that is {manifest.state.value}; "
            "pass --resume to go on with it, --fresh to start again, or another --out."
        )


@dataclass(frozen=True, kw_only=True)
class _Session:
    parts: Parts
    request: TrainingRequest
    origin: Origin
    folder: TrainingFolder | None
    progress: TrainingProgress
    signals: StopSignals
    keep_going: KeepGoing | None
    clock_s: Callable[[], float]

    def run(self) -> TrainedRun:
        """Go on from the last checkpoint or start, train, and sum up."""
        parts, peers = self.parts, self.parts.peers
        fingerprint = parts.fingerprint(self.origin.spec, self.origin.arguments)
        total = self._total_samples()
        own_folder = self.folder if peers.rank == 0 else None
        before = peers.share(lambda: self._read_earlier(fingerprint))
        if before is not None and self._is_done(before, total):
            parts.load(before.checkpoint.state)
            return self._sum_up(before.manifest, () if own_folder is None else own_folder.read_lines(), was_complete=True)
        manifest = self._manifest(fingerprint, total, None if before is None else before.manifest)
        if own_folder is not None:
            own_folder.write_manifest(manifest)  # before any other file: it is what makes the folder a training's
        with ExitStack() as stack:
            log = None
            if peers.rank == 0:
                checkpoint = None if before is None else before.checkpoint
                position = None if checkpoint is None else int(str(_progress(checkpoint)["log_position"]))
                path = None if own_folder is None else own_folder.path
                log = stack.enter_context(TrainingLog(path, position=position, step=0 if checkpoint is None else checkpoint.step))
            loop = TrainingLoop(
                parts,
                self.request,
                total_samples=total,
                log=log,
                folder=own_folder,
                fingerprint=fingerprint,
                progress=self.progress,
                signals=self.signals,
                keep_going=self.keep_going,
                clock_s=self.clock_s,
            )
            if before is not None:
                loop.restore(before.checkpoint.state, _progress(before.checkpoint))
            self._announce(loop, before)
            state = loop.run()
            manifest = manifest.model_copy(update={"state": state, "updated_at": _now()})
            if state in {TrainingState.FINISHED, TrainingState.TARGET_MISSED}:
                loop.event(LogEvent.FINISHED)
            if own_folder is not None:
                own_folder.write_manifest(manifest)
            return self._sum_up(manifest, () if log is None else log.lines(), was_complete=False)

    def _total_samples(self) -> int:
        if self.request.samples is not None:
            return self.request.samples
        return max(1, round((self.request.epochs or 0.0) * self.parts.loader.samples_per_epoch))

    def _read_earlier(self, fingerprint: str) -> "_Earlier | None":
        if self.folder is None or not self.request.resume:
            return None
        manifest = self.folder.read_manifest()
        checkpoint = load_checkpoint(self.folder.path, fingerprint=fingerprint)
        return None if manifest is None or checkpoint is None else _Earlier(manifest, checkpoint)

    def _is_done(self, before: "_Earlier", total: int) -> bool:
        """Whether nothing is left to train: all samples are used, or the same target was met."""
        state = before.manifest.state
        if state is TrainingState.TARGET_REACHED and before.manifest.target == self.request.target:
            return True
        return int(str(_progress(before.checkpoint)["samples"])) >= total and state in {TrainingState.FINISHED, TrainingState.TARGET_MISSED}

    def _announce(self, loop: TrainingLoop, before: "_Earlier | None") -> None:
        if before is None:
            left_out = (
                "" if self.parts.loader.samples_per_epoch == self.parts.rig.train_size else "; the last batch of an epoch is left out"
            )
            loop.event(LogEvent.STARTED, f"batch {plan_words(self.parts.plan)}{left_out}")
            return
        for damaged in before.checkpoint.passed_over:
            loop.event(LogEvent.CHECKPOINT_DAMAGED, damaged)
        changed = before.manifest.code_files != self.origin.code_files
        loop.event(LogEvent.RESUMED, f"from {before.checkpoint.file.name}" + ("; the code has changed since" if changed else ""))

    def _sum_up(self, manifest: TrainingManifest, lines: tuple[LogLine, ...], *, was_complete: bool) -> TrainedRun:
        peers = self.parts.peers
        return TrainedRun(
            result=peers.share(lambda: training_result(manifest, lines)),
            manifest=manifest,
            lines=lines,
            model=self.parts.model,
            average=self.parts.average,
            folder=self.folder.path if self.folder is not None and peers.rank == 0 else None,
            rank=peers.rank,
            is_kept=self.folder is not None,
            was_complete=was_complete,
        )

    def _manifest(self, fingerprint: str, total: int, earlier: TrainingManifest | None) -> TrainingManifest:
        parts, request = self.parts, self.request
        device = parts.rig.device
        return TrainingManifest(
            rightbatch_version=__version__,
            created_at=_now() if earlier is None else earlier.created_at,
            updated_at=_now(),
            command=request.command,
            workload_spec=self.origin.spec,
            workload_arguments=self.origin.arguments,
            code_files=self.origin.code_files,
            workload_name=parts.rig.workload.name or type(parts.model).__name__,
            fingerprint=fingerprint,
            plan=parts.plan,
            plan_source=request.plan_source,
            schedule=request.schedule_words,
            batch_schedule=request.schedule,
            schedule_asked=request.schedule_asked,
            forecast=request.forecast,
            samples=total,
            samples_per_epoch=parts.loader.samples_per_epoch,
            target=request.target,
            evaluate_every=request.evaluate_every,
            noise_every=request.noise_every,
            seed=parts.rig.seed,
            device=str(device),
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            predicted_steps=request.predicted_steps,
        )


@dataclass(frozen=True)
class _Earlier:
    """What an earlier session left."""

    manifest: TrainingManifest
    checkpoint: Checkpoint


def _progress(checkpoint: Checkpoint) -> dict[str, object]:
    progress = checkpoint.state["progress"]
    assert isinstance(progress, dict), "written as one"  # noqa: S101
    return progress


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
