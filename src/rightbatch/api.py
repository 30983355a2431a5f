"""What a Python program or a notebook calls: the tuner and the training behind one function each, and answers that show themselves."""

import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import PrivateAttr

from rightbatch.engine.process_state import preserved_process_state
from rightbatch.engine.ranks import local_device
from rightbatch.engine.rig import Rig, build_rig
from rightbatch.errors import InconclusiveError, InterruptedRunError, NothingFitsError, RightbatchWarning, UsageError
from rightbatch.fits.schedule_text import schedule_text
from rightbatch.progress import drawn_progress
from rightbatch.records.plan import BatchPlan, Constraints, Findings, Goal, Objective
from rightbatch.records.schedule import BatchSchedule
from rightbatch.records.training_log import LogLine, TrainingTarget
from rightbatch.records.training_run import TrainingFolder, TrainingResult, TrainingState
from rightbatch.report.html import render_html, render_notebook
from rightbatch.report.text import render_text
from rightbatch.report.training import render_training_html, render_training_text
from rightbatch.training.choices import (
    ChosenPlan,
    ChosenSchedule,
    choose_schedule,
    forecast_words,
    plan_from_run,
    plan_of_size,
    plan_of_workload,
)
from rightbatch.training.request import KeepGoing, SilentTraining, TrainingProgress, TrainingRequest
from rightbatch.training.session import Origin, TrainedRun, run_training
from rightbatch.tuner.find import find as find_run
from rightbatch.tuner.request import STANDARD_PARTS, Part, Request, SilentProgress
from rightbatch.units import parse_bytes, parse_duration_s
from rightbatch.workload.given import GivenWorkload
from rightbatch.workload.ingredients import Precision, Workload


class FoundPlan(BatchPlan):
    """A plan with the findings it rests on. In a notebook it shows itself; ``print`` gives the report."""

    _findings: Findings = PrivateAttr()

    @classmethod
    def of(cls, findings: Findings) -> "FoundPlan":
        """Return the recommended plan of some findings.

        Raises:
            NothingFitsError: Not even one sample fits.
            InconclusiveError: What was measured names no plan.
        """
        plan = findings.recommendation.plan
        if plan is None:
            kind = NothingFitsError if findings.recommendation.status == "nothing_fits" else InconclusiveError
            raise kind(render_text(findings, width=80, colour=False).strip().splitlines()[0])
        found = cls(**plan.model_dump())
        found._findings = findings
        return found

    @property
    def findings(self) -> Findings:
        """Everything that was concluded."""
        return self._findings

    def write_report(self, path: str | Path) -> Path:
        """Write the HTML report to a file; return its path."""
        target = Path(path)
        target.write_text(render_html(self._findings), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return render_notebook(self._findings)

    def __str__(self) -> str:
        return render_text(self._findings, width=80, colour=False, now=datetime.now(UTC))


def find(
    workload: Workload,
    *,
    goal: Goal | Literal["time", "samples", "energy", "accuracy"] = Goal.TIME,
    budget: str = "2m",
    limit: str | None = None,
    max_batch: int | None = None,
    max_global_batch: int | None = None,
    verify: bool = False,
    device: str = "auto",
    precision: Precision | None = None,
    seed: int = 0,
    threads: int | None = None,
    isolation: Literal["child", "in-process"] = "child",
    lr_range: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> FoundPlan:
    """Measure a workload and return the batch plan to train it with.

    Under ``torchrun`` every rank calls this with the same arguments and returns the same plan, for as many ranks as there are; each
    takes the GPU of its ``LOCAL_RANK``. See ``docs/decisions/010-ranks.md``.

    Args:
        workload: What is trained.
        goal: What to have least of: ``time``, ``samples`` or ``energy`` to a target; or ``accuracy``, near the least time.
        budget: Time that the measurements may take once the workload is loaded, such as ``2m``; half as long again on a busy machine.
        limit: Most memory that training may use, such as ``24GiB``; ``None`` takes what is free.
        max_batch: Largest micro-batch to consider, in samples.
        max_global_batch: Largest global batch to consider, in samples.
        verify: Whether to check the answer by training from a checkpoint at several sizes, which takes half of the budget.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: Overrides the workload's precision.
        seed: Seed of everything random.
        threads: Threads torch computes with; ``None`` leaves its default.
        isolation: ``child`` measures in a process of its own; ``in-process`` here, and puts everything back.
        lr_range: Whether to test learning rates even if the workload says where its own was tuned; without a tuned one that is done anyway.
        out: Run folder to keep everything in; ``None`` keeps nothing. Of several ranks the first writes it.
        resume: Whether to measure only what ``out`` does not hold yet; whether the workload is still the same is for the caller to know.
        quiet: Whether to show nothing meanwhile; progress is drawn on a terminal and in a notebook only.

    Returns:
        The plan, with its findings.

    Raises:
        InterruptedRunError: Ctrl-C, or the interrupt of a notebook, ended it; with ``out``, ``resume=True`` goes on.
        NothingFitsError: Not even one sample fits in the limit.
        InconclusiveError: What was measured names no plan.
        UserCodeError: The model, dataset or loss raised.
        UsageError: An argument is not of the form above.
        RankError: Another rank failed; the message names it and its reason.
    """
    if resume and out is None:
        raise UsageError("going on with a run needs its folder; got none; say which with out.")
    request = Request(
        parts=STANDARD_PARTS | ({Part.BRANCHES} if verify else frozenset()) | ({Part.LR_RANGE} if lr_range else frozenset()),
        lr_range_if_untuned=True,
        objective=Objective(goal=Goal(goal)),
        constraints=Constraints(max_global_batch_size=max_global_batch),
        device=device,
        precision=precision,
        max_batch=max_batch,
        limit_bytes=None if limit is None else parse_bytes(limit),
        budget_s=parse_duration_s(budget),
        seed=seed,
        threads=threads,
        isolation=isolation,
        out=None if out is None else Path(out),
        fresh=not resume,
        save=out is not None,
    )
    try:
        with drawn_progress(quiet=quiet) as drawn:
            found = find_run(GivenWorkload(workload), request, drawn or SilentProgress())
    except InterruptedRunError as error:
        going_on = "nothing was kept, because out was not given" if out is None else "go on with resume=True"
        raise InterruptedRunError(f"{str(error).removesuffix('.')}; {going_on}.") from error
    plan = FoundPlan.of(found.findings)
    if found.findings.recommendation.status != "ok" and found.rank == 0:
        message = f"the recommendation is {found.findings.recommendation.status}; print(plan) says why and what to do."
        warnings.warn(message, RightbatchWarning, stacklevel=2)
    return plan


class Training(TrainingResult):
    """What a training came to, with the trained model. ``print`` gives the report."""

    _run: TrainedRun = PrivateAttr()

    @classmethod
    def of(cls, run: TrainedRun) -> "Training":
        """Return the result of a training that ended, with its model."""
        training = cls(**{name: getattr(run.result, name) for name in TrainingResult.model_fields})
        training._run = run
        return training

    @property
    def model(self) -> Any:
        """The trained module, on its device; its mode is training."""
        return self._run.model

    @property
    def average(self) -> Any:
        """The moving average of its weights; none when the workload keeps none."""
        return self._run.average

    @property
    def log(self) -> tuple[LogLine, ...]:
        """Steps, evaluations and events; empty on every rank but the first."""
        return self._run.lines

    def write_report(self, path: str | Path) -> Path:
        """Write the HTML report to a file; return its path."""
        target = Path(path)
        target.write_text(render_training_html(self._run.manifest, self._run.lines), encoding="utf-8")
        return target

    def __str__(self) -> str:
        return render_training_text(self._run.manifest, self._run.lines, width=80, colour=False, now=datetime.now(UTC))


def train(
    workload: Workload,
    plan: BatchPlan | int | str | Path | None = None,
    *,
    epochs: float | None = None,
    samples: int | None = None,
    target: str | TrainingTarget | None = None,
    schedule: str | BatchSchedule | None = None,
    dynamic: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    checkpoint_every: str = "60s",
    evaluate_every: int | None = None,
    noise_every: int | None = None,
    device: str = "auto",
    precision: Precision | None = None,
    seed: int = 0,
    threads: int | None = None,
    quiet: bool = False,
    progress: TrainingProgress | None = None,
    keep_going: KeepGoing | None = None,
) -> Training:
    """Train a workload with a plan, and return what came of it, with the trained model.

    Under ``torchrun`` every rank calls this with the same arguments; the first one writes. SIGINT and SIGTERM end the training after its
    current step, and everything is saved. The process's random state is put back at the end.

    Args:
        workload: What is trained.
        plan: What ``rb.find`` returned, a ``rb.BatchPlan``, a batch size in samples, or the folder of a run of ``find``; ``None`` takes the
            workload's ``lr_batch_size``.
        epochs: How long to train, in epochs; this or ``samples``.
        samples: How long to train, in samples over all epochs and ranks.
        target: Ends the training early: ``accuracy>=0.97``, with any name for the workload's metric, or ``loss<=0.1``.
        schedule: How the batch size changes, such as ``geometric:64..512@200000``, its rate coupled to it; or a schedule of your own.
        dynamic: Whether the size follows the gradient noise where that is forecast to be worth it; needs a plan with findings.
        out: Folder for the log, the checkpoints and the report; ``None`` keeps nothing.
        resume: Whether to go on from the last checkpoint in ``out``; from the start where there is none.
        fresh: Whether to start again in a folder that holds a training.
        checkpoint_every: Time between checkpoints, such as ``60s``.
        evaluate_every: Samples between evaluations; ``None`` evaluates after each epoch.
        noise_every: Measure the gradient noise on every so many steps; 0 never; ``None`` where it costs and changes next to nothing.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: Overrides the plan's and the workload's precision.
        seed: Seed of everything random.
        threads: Threads torch computes with; ``None`` leaves its default.
        quiet: Whether to show nothing meanwhile.
        progress: Is told how it goes; ``None`` draws it on a terminal and in a notebook only.
        keep_going: Asked with each evaluation; the training ends where it returns False.

    Returns:
        The result; its ``state`` says whether the target was reached, missed, or the training diverged.

    Raises:
        InterruptedRunError: A signal ended it; with ``out``, ``resume=True`` goes on.
        NothingFitsError: Not even one sample fits in memory.
        UserCodeError: The model, dataset, loss or metric raised.
        UsageError: An argument is not of the form above, or does not suit the folder.
        RunFolderError: The folder cannot be written, or is used by another process.
    """
    with preserved_process_state():
        chosen = _chosen_plan(plan, workload)
        wanted = chosen.plan.precision if precision is None and chosen.has_precision else precision
        rig = build_rig(lambda: workload, device=local_device(device), precision=wanted, threads=threads, seed=seed)
        total = samples if samples is not None else max(1, round((epochs or 0.0) * rig.train_size))
        followed = _chosen_schedule(rig, chosen, schedule, total, is_dynamic=dynamic)
        request = TrainingRequest(
            plan=chosen.plan,
            plan_source=chosen.source,
            epochs=epochs,
            samples=samples,
            target=TrainingTarget.parse(target) if isinstance(target, str) else target,
            schedule=followed.schedule,
            schedule_words=followed.words,
            schedule_asked=followed.asked,
            forecast=followed.forecast,
            predicted_steps=chosen.predicted_steps,
            noise_every=noise_every,
            out=None if out is None else Path(out),
            resume=resume,
            fresh=fresh,
            checkpoint_every_s=parse_duration_s(checkpoint_every),
            evaluate_every=evaluate_every,
        )
        with drawn_progress(quiet=quiet or progress is not None) as drawn:
            shown = progress or drawn or SilentTraining()
            for sentence in forecast_words(followed):
                shown.update("forecast", 0.0, sentence)
            run = run_training(rig, request, origin=Origin(), progress=shown, keep_going=keep_going)
    return _finished(run)


def _finished(run: TrainedRun) -> Training:
    """Write the report into the folder, and raise or warn where the training did not come to its end."""
    state = run.result.state
    if run.folder is not None:
        TrainingFolder(run.folder).write_report(render_training_html(run.manifest, run.lines))
    if state is TrainingState.INTERRUPTED:
        saved = "nothing was saved, because out was not given" if not run.is_kept else "go on with resume=True"
        raise InterruptedRunError(f"interrupted after {run.result.samples} samples; {saved}.")
    if state in {TrainingState.TARGET_MISSED, TrainingState.DIVERGED} and run.rank == 0:
        warnings.warn(f"the training ended with: {state.value}; print(training) says more.", RightbatchWarning, stacklevel=3)
    return Training.of(run)


def _chosen_plan(plan: BatchPlan | int | str | Path | None, workload: Workload) -> ChosenPlan:
    if plan is None:
        return plan_of_workload(workload.lr_batch_size)
    if isinstance(plan, FoundPlan):
        return ChosenPlan(plan=BatchPlan(**plan.model_dump()), source="rb.find", findings=plan.findings, has_precision=True)
    if isinstance(plan, BatchPlan):
        return ChosenPlan(plan=plan, source="the caller", has_precision="precision" in plan.model_fields_set)
    if isinstance(plan, int):
        return plan_of_size(plan, "the caller")
    return plan_from_run(Path(plan))


def _chosen_schedule(
    rig: Rig, chosen: ChosenPlan, schedule: str | BatchSchedule | None, total_samples: int, *, is_dynamic: bool
) -> ChosenSchedule:
    if schedule is not None and not isinstance(schedule, str):
        return ChosenSchedule(schedule=schedule, words=schedule_text(schedule))
    optimizer = "" if schedule is None else type(rig.new_trainee(compiled=False).optimizer).__name__
    return choose_schedule(chosen, schedule, is_dynamic=is_dynamic, optimizer=optimizer, total_samples=total_samples)
