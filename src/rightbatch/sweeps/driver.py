"""From a workload and a request to a sweep's result: ask the design, run its trials, tell the journal, conclude.

Importing this module does not import torch, nor does driving a sweep: everything of the user's runs in the processes of trials.
"""

import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType

from rightbatch._version import __version__
from rightbatch.errors import InterruptedRunError, UsageError, WorkerKilledError
from rightbatch.fits.sweep import fit_sweep, step_times_alone
from rightbatch.records.folder import RUNS_FOLDER
from rightbatch.records.plan import Findings
from rightbatch.records.sweep import SweepManifest, SweepResult, TrialResult, TrialSpec, TrialStatus
from rightbatch.records.sweep_folder import SweepFolder
from rightbatch.sweeps import executors, tasks
from rightbatch.sweeps.design import Rule, expected_trials, next_trials
from rightbatch.sweeps.executors import Executor
from rightbatch.sweeps.known import known_findings
from rightbatch.sweeps.request import SweepProgress, SweepRequest, SweepStage, SweptRun
from rightbatch.sweeps.settings import digest_of, scaling_rule, settings_of
from rightbatch.sweeps.study import KILLED, Attempt, SweepStudy
from rightbatch.sweeps.table import tidy_table
from rightbatch.sweeps.tasks import Described, DescribeTask, TrialTask, WorkerSetting
from rightbatch.sweeps.words import UNSTEADY, best_words, cost_words, ended_words, killed_words
from rightbatch.workload.source import Source

MOST_KILLS = 2
"""A trial whose process was killed so often has failed."""
_TICK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is sent to the processes of trials.

    Attributes:
        describe: Says what the workload is.
        run_trial: Runs a trial.
    """

    describe: Callable[[DescribeTask], Described] = tasks.describe
    run_trial: Callable[[TrialTask], TrialResult] = tasks.run_trial


def sweep(
    source: Source,
    request: SweepRequest,
    progress: SweepProgress,
    *,
    command: tuple[str, ...] = (),
    open_executor: Callable[[], Executor] | None = None,
    work: Work | None = None,
    clock_s: Callable[[], float] = time.monotonic,
) -> SweptRun:
    """Train what the design asks for, until it asks for nothing more, and conclude.

    Args:
        source: Where the workload comes from.
        request: What is asked.
        progress: Where to say how it goes.
        command: The command that goes on with the sweep.
        open_executor: Opens what trials run on; the default is what the request names.
        work: What runs there; the default trains.
        clock_s: Clock of the time budget, in seconds.

    Raises:
        RightbatchError: See ``rightbatch.errors``; every trial that had ended is kept.
    """
    digest = digest_of(request, source.spec, source.arguments)
    executors.parse_where(request.where)
    findings = known_findings(request.plan, source)
    folder = SweepFolder.create(request.out or RUNS_FOLDER / f"sweep-{source.name}-{digest[:8]}")
    with folder.lock(), _terminated_as_interrupted():
        if request.fresh:
            folder.clear()
        driver = _Driver(
            source=source,
            request=request,
            progress=progress,
            command=command,
            folder=folder,
            findings=findings,
            digest=digest,
            open_executor=open_executor or (lambda: executors.open_executor(request.where, jobs=request.jobs, device=request.device)),
            work=work or Work(),
            clock_s=clock_s,
        )
        return driver.run()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end a sweep as Ctrl-C does; outside the main thread signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(kw_only=True)
class _Driver:
    """One session of a sweep."""

    source: Source
    request: SweepRequest
    progress: SweepProgress
    command: tuple[str, ...]
    folder: SweepFolder
    findings: Findings | None
    digest: str
    open_executor: Callable[[], Executor]
    work: Work
    clock_s: Callable[[], float]
    _running: "dict[Future[TrialResult], Attempt]" = field(default_factory=dict)
    _trial_s: list[float] = field(default_factory=list)
    _started_s: dict[TrialSpec, float] = field(default_factory=dict)
    _begun_s: float = 0.0

    def run(self) -> SweptRun:
        """Go on where the folder's journal ends."""
        self._begun_s = self.clock_s()
        manifest = self._read_manifest()
        try:
            study = SweepStudy(self.folder.path) if manifest is not None else None
            if manifest is None or study is None or self._waiting(manifest, study):
                with closing(self.open_executor()) as executor:
                    if manifest is None:
                        manifest = self._describe(executor)
                        self.folder.write_manifest(manifest)
                    study = study or SweepStudy(self.folder.path)
                    ended_by_budget = self._train(manifest, study, executor)
            else:
                ended_by_budget = False
        except KeyboardInterrupt as error:
            raise self._interrupted(manifest) from error
        return self._conclude(manifest, study, ended_by_budget=ended_by_budget)

    def _read_manifest(self) -> SweepManifest | None:
        """What the folder holds, if it may be gone on with."""
        manifest = self.folder.read_manifest()
        if manifest is None:
            return None
        if manifest.asked != self.digest:
            raise UsageError(
                f"{self.folder.path} holds another sweep ({manifest.workload_spec}, {manifest.settings.target}); pass another --out, "
                "or --fresh to begin again there."
            )
        if manifest.code_files and not self.source.code_is_unchanged(manifest.code_files):
            raise UsageError(
                f"the workload's code has changed since the trials in {self.folder.path}, so old and new ones cannot be compared; "
                "pass --fresh to begin again, or another --out."
            )
        return manifest

    def _describe(self, executor: Executor) -> SweepManifest:
        task = DescribeTask(setting=self._setting(executor), target=self.request.target, code_files=self.source.code_files)
        found = executor.submit(self.work.describe, task).result()
        return SweepManifest(
            rightbatch_version=__version__,
            created_at=_now(),
            updated_at=_now(),
            command=self.command,
            workload_spec=self.source.spec,
            workload_arguments=self.source.arguments,
            code_files=found.code_files,
            workload=found.workload,
            settings=settings_of(self.request, found.workload, self.findings, slots=executor.slots),
            asked=self.digest,
            device=found.environment.device,
            device_name=found.environment.device_name,
            versions=found.environment.versions,
        )

    def _setting(self, executor: Executor) -> WorkerSetting:
        request = self.request
        return WorkerSetting(
            load=self.source.load,
            device=executor.device or request.device,
            precision=request.precision,
            threads=request.threads or executor.threads,
        )

    def _rule(self, manifest: SweepManifest) -> Rule:
        return scaling_rule(manifest.workload, manifest.settings.noise_scale)

    def _waiting(self, manifest: SweepManifest, study: SweepStudy) -> list[TrialSpec]:
        """Trials that can be run now and are not."""
        running = {attempt.spec for attempt in self._running.values()}
        return [spec for spec in next_trials(manifest.settings, self._rule(manifest), study.results) if spec not in running]

    def _train(self, manifest: SweepManifest, study: SweepStudy, executor: Executor) -> bool:
        """Run trials until none is asked for; return whether the budget ended it before."""
        expected = expected_trials(manifest.settings)
        if study.results or study.stale:
            self._say(
                manifest, study, executor, f"going on after {len(study.results)} trials; {study.stale} were cut off and are run again"
            )
        else:
            self._say(manifest, study, executor, cost_words(manifest.settings, expected=expected, slots=executor.slots))
        if self._is_unsteady and step_times_alone(self._timed(manifest), manifest.settings.sizes) is not None:
            self._say(manifest, study, executor, UNSTEADY)
        while True:
            waiting = self._waiting(manifest, study)
            if not waiting and not self._running:
                return False
            for spec in waiting[: executor.slots - len(self._running)]:
                self._submit(manifest, study, executor, spec)
            if self._is_late():
                return True
            done, _ = wait(self._running, timeout=_TICK_S, return_when=FIRST_COMPLETED)
            if not done:
                self._say(manifest, study, executor, "")
            for future in done:
                self._say(manifest, study, executor, self._take_in(study, future))

    def _submit(self, manifest: SweepManifest, study: SweepStudy, executor: Executor, spec: TrialSpec) -> None:
        task = TrialTask(
            setting=self._setting(executor),
            spec=spec,
            target=manifest.settings.target,
            largest_micro_batch=manifest.settings.largest_micro_batch,
        )
        attempt = study.start(spec)
        self._started_s[spec] = self.clock_s()
        self._running[executor.submit(self.work.run_trial, task)] = attempt

    def _take_in(self, study: SweepStudy, future: "Future[TrialResult]") -> str:
        """Keep what a trial came to, and say it. What the user's code raised is raised here; the trial is then still to be run."""
        attempt = self._running.pop(future)
        try:
            result = future.result()
        except WorkerKilledError as error:
            if study.kills_of(attempt.spec) + 1 < MOST_KILLS:
                study.lose(attempt, KILLED)
                return killed_words(attempt.spec, str(error))
            result = _failed(attempt.spec, f"{error}, twice")
        self._trial_s.append(self.clock_s() - self._started_s.pop(attempt.spec))
        study.finish(attempt, result)
        return ended_words(result)

    def _is_late(self) -> bool:
        return self.request.budget_s is not None and self.clock_s() - self._begun_s >= self.request.budget_s

    def _say(self, manifest: SweepManifest, study: SweepStudy, executor: Executor, news: str) -> None:
        running = tuple(attempt.spec for attempt in self._running.values())
        ended = len(study.results)
        expected = max(expected_trials(manifest.settings), ended + len(running))
        left_s = None
        if self._trial_s and ended < expected:
            left_s = (expected - ended) * sum(self._trial_s) / len(self._trial_s) / executor.slots
        best = best_words(manifest.settings, study.results)
        self.progress.update(SweepStage(running=running, ended=ended, expected=expected, best=best, left_s=left_s, news=news))

    def _interrupted(self, manifest: SweepManifest | None) -> InterruptedRunError:
        if manifest is None:
            return InterruptedRunError("interrupted before the first trial.", shlex.join(self.command))
        self.folder.write_manifest(manifest.model_copy(update={"state": "interrupted", "updated_at": _now()}))
        kept = "every trial that had ended is kept; those that ran are run again."
        return InterruptedRunError(f"interrupted; {kept}", shlex.join(self.command))

    def _timed(self, manifest: SweepManifest) -> Findings | None:
        """What `find` timed, where that was on the same device in the same precision."""
        found = self.findings
        same = (manifest.device_name, manifest.workload.precision)
        return found if found is not None and (found.environment.device_name, found.environment.precision) == same else None

    @property
    def _is_unsteady(self) -> bool:
        """Whether `find` says that its own timings cannot be relied on."""
        return self.findings is not None and self.findings.recommendation.status == "unstable"

    def _conclude(self, manifest: SweepManifest, study: SweepStudy, *, ended_by_budget: bool) -> SweptRun:
        settings, trials = manifest.settings, study.results
        step_times_s = step_times_alone(self._timed(manifest), settings.sizes)
        result: SweepResult = fit_sweep(
            settings,
            manifest.workload,
            trials,
            is_complete=not ended_by_budget,
            device_name=manifest.device_name,
            step_times_s=step_times_s,
            times_are_steady=not self._is_unsteady,
            plan=None if self.findings is None else self.findings.recommendation.plan,
        )
        self.folder.write_result(result)
        self.folder.write_table(
            tidy_table(
                settings,
                trials,
                workload=manifest.workload.name,
                device=manifest.device_name,
                train_size=manifest.workload.train_size,
                step_times_s=step_times_s,
            )
        )
        state = "interrupted" if ended_by_budget else "complete"
        self.folder.write_manifest(manifest.model_copy(update={"state": state, "updated_at": _now(), "command": self.command}))
        return SweptRun(result=result, trials=trials, folder=self.folder.path, ended_by_budget=ended_by_budget)


def _failed(spec: TrialSpec, reason: str) -> TrialResult:
    return TrialResult(spec=spec, status=TrialStatus.FAILED, reason=reason, steps=0, samples=0, training_s=0.0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
