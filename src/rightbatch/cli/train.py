"""The command that trains: which plan, for how long, where; then the loop, the answer and the report."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rightbatch.cli.measure import ANSWERED, INCONCLUSIVE, answered_help
from rightbatch.cli.options import OutputOptions, TrainOptions
from rightbatch.cli.output import answer, say, stdout_reserved, text_layout
from rightbatch.cli.progress import show_progress
from rightbatch.errors import InterruptedRunError, RunFolderError, UsageError

if TYPE_CHECKING:
    from rightbatch.engine.rig import Rig
    from rightbatch.records.training_run import TrainingManifest
    from rightbatch.training.choices import ChosenPlan, ChosenSchedule
    from rightbatch.training.request import TrainingRequest
    from rightbatch.training.session import TrainedRun
    from rightbatch.workload.source import WorkloadSource


def train(source: "WorkloadSource", wanted: TrainOptions, output: OutputOptions, *, repeat: tuple[str, ...]) -> int:
    """Train, print the answer, write the report, and return the exit code.

    Args:
        source: The workload.
        wanted: How to train.
        output: How to print.
        repeat: The command that was given.

    Raises:
        InterruptedRunError: A signal ended it; everything was saved.
        RightbatchError: Whatever could not be done.
    """
    source.check()
    if answered_help(source):
        return ANSWERED
    asked = _Asked(source, wanted, repeat)
    early = asked.plan_before_loading()
    with stdout_reserved():
        from rightbatch.engine.ranks import is_lead

        quiet = output.quiet or not is_lead()
        if not quiet:
            say(f"loading {source.spec}")
        rig = asked.load(early)
        request = asked.request(rig, early, quiet=quiet)
        from rightbatch.training.session import Origin, run_training

        origin = Origin(spec=source.spec, arguments=source.arguments, code_files=source.code_files())
        with show_progress(quiet=quiet, whole="the samples") as progress:
            trained = run_training(rig, request, origin=origin, progress=progress)
    return _answer(trained, output, repeat)


@dataclass(frozen=True)
class _Asked:
    """What the command line asks, turned into a request step by step."""

    source: "WorkloadSource"
    wanted: TrainOptions
    repeat: tuple[str, ...]

    @property
    def out(self) -> Path:
        """The folder: the same for every plan, so that ``--resume`` finds it without one."""
        from rightbatch.records.folder import RUNS_FOLDER
        from rightbatch.tuner.kept import digest

        return self.wanted.out or RUNS_FOLDER / f"train-{self.source.name}-{digest(self.source.spec, *self.source.arguments)[:8]}"

    @cached_property
    def earlier(self) -> "TrainingManifest | None":
        """What the folder says about an earlier session that is to go on."""
        from rightbatch.records.training_run import TrainingFolder

        if not self.wanted.resume or not TrainingFolder.is_at(self.out):
            return None
        return TrainingFolder.open(self.out).read_manifest()

    @property
    def seed(self) -> int:
        """The seed that is asked for, else that of the session that goes on."""
        if self.wanted.seed is not None:
            return self.wanted.seed
        return 0 if self.earlier is None else self.earlier.seed

    def plan_before_loading(self) -> "ChosenPlan | None":
        """Return the plan as far as it is known without the workload; wrong options end here, before torch is loaded."""
        from rightbatch.training import choices

        wanted = self.wanted
        if wanted.target is not None:
            from rightbatch.records.training_log import TrainingTarget

            TrainingTarget.parse(wanted.target)
        earlier = self.earlier
        if wanted.epochs is None and wanted.samples is None and earlier is None:
            raise UsageError("a training needs an end; got neither --epochs nor --samples; give one, such as --epochs 10.")
        if wanted.epochs is not None and wanted.samples is not None:
            raise UsageError("a training has one end; got both --epochs and --samples; drop one.")
        if wanted.plan is not None:
            if wanted.plan.strip().isdigit():
                return choices.plan_of_size(int(wanted.plan), "the command line")
            source = choices.run_source(Path(wanted.plan))
            # What the run recommends may have changed since; a training goes on as it began.
            same = earlier is not None and earlier.plan_source == source
            return choices.earlier_plan(earlier) if same and earlier is not None else choices.plan_from_run(Path(wanted.plan))
        if earlier is not None:
            return choices.earlier_plan(earlier)
        folder = self._finds_folder()
        return choices.plan_from_run(folder) if choices.has_plan(folder) else None

    def _finds_folder(self) -> Path:
        from rightbatch.tuner.find import default_folder
        from rightbatch.tuner.request import Request

        return default_folder(self.source, Request(device=self.wanted.device, precision=self.wanted.precision))

    def load(self, chosen: "ChosenPlan | None") -> "Rig":
        """Load the workload and place it on the device."""
        from rightbatch.engine.ranks import local_device
        from rightbatch.engine.rig import build_rig

        wanted = self.wanted
        precision = chosen.plan.precision if wanted.precision is None and chosen is not None and chosen.has_precision else wanted.precision
        load = self.source.load
        return build_rig(load, device=local_device(wanted.device), precision=precision, threads=wanted.threads, seed=self.seed)  # type: ignore[arg-type]  # load checks what it returns

    def request(self, rig: "Rig", chosen: "ChosenPlan | None", *, quiet: bool) -> "TrainingRequest":
        """Return the whole request; say which plan it is, and what a schedule is forecast to gain."""
        from rightbatch.records.training_log import TrainingTarget
        from rightbatch.training import choices
        from rightbatch.training.request import TrainingRequest

        wanted, earlier = self.wanted, self.earlier
        if chosen is None:
            chosen = choices.plan_of_workload(rig.workload.lr_batch_size)
        samples = wanted.samples
        if earlier is not None and wanted.epochs is None and samples is None:
            samples = earlier.samples
        total = samples if samples is not None else max(1, round((wanted.epochs or 0.0) * rig.train_size))
        target = None if wanted.target is None else TrainingTarget.parse(wanted.target)
        schedule = self._schedule(rig, chosen, earlier, total)
        if not quiet:
            self._say_choices(chosen, schedule, rig.train_size)
        return TrainingRequest(
            plan=chosen.plan,
            plan_source=chosen.source,
            epochs=None if samples is not None else wanted.epochs,
            samples=samples,
            target=earlier.target if earlier is not None and target is None else target,
            schedule=schedule.schedule,
            schedule_words=schedule.words,
            schedule_asked=schedule.asked,
            forecast=schedule.forecast,
            predicted_steps=chosen.predicted_steps or (earlier.predicted_steps if earlier is not None else ()),
            noise_every=earlier.noise_every if earlier is not None and wanted.noise_every is None else wanted.noise_every,
            out=self.out,
            resume=wanted.resume,
            fresh=wanted.fresh,
            checkpoint_every_s=wanted.checkpoint_every,
            evaluate_every=earlier.evaluate_every if earlier is not None and wanted.evaluate_every is None else wanted.evaluate_every,
            command=self.repeat,
        )

    def _schedule(self, rig: "Rig", chosen: "ChosenPlan", earlier: "TrainingManifest | None", total: int) -> "ChosenSchedule":
        from rightbatch.training import choices

        wanted = self.wanted
        if earlier is not None:
            return choices.earlier_schedule(earlier, wanted.schedule, is_dynamic=wanted.dynamic)
        optimizer = "" if wanted.schedule is None else type(rig.new_trainee(compiled=False).optimizer).__name__
        return choices.choose_schedule(chosen, wanted.schedule, is_dynamic=wanted.dynamic, optimizer=optimizer, total_samples=total)

    @staticmethod
    def _say_choices(chosen: "ChosenPlan", schedule: "ChosenSchedule", train_size: int) -> None:
        from rightbatch.training.choices import forecast_words
        from rightbatch.training.progress_words import plan_words

        rate = "" if chosen.plan.lr is None else f", lr {chosen.plan.lr:.4g}"
        say(f"plan: batch {plan_words(chosen.plan)}{rate}, from {chosen.source}")
        if chosen.findings is not None and chosen.findings.recommendation.status != "ok":
            say(f"these findings are {chosen.findings.recommendation.status}; rightbatch show says why, and what to do")
        if chosen.plan.global_batch_size > train_size:
            say(f"the training set holds {train_size} samples, so no step takes more than these")
        for sentence in forecast_words(schedule):
            say(sentence)


def _answer(trained: "TrainedRun", output: OutputOptions, repeat: tuple[str, ...]) -> int:
    """Print what came out, write the report beside it, and return the exit code."""
    from rightbatch.records.training_run import TrainingState, resume_command
    from rightbatch.report.training import render_training_text

    state = trained.result.state
    if trained.rank == 0:
        _keep_report(trained, quiet=output.quiet)
    if state is TrainingState.INTERRUPTED:
        going_on = resume_command(repeat, world_size=trained.result.plan.world_size)
        raise InterruptedRunError(f"interrupted after {trained.result.samples} samples; everything is saved.", going_on)
    if output.json:
        answer(trained.result.model_dump_json(indent=2))
    elif trained.rank == 0:
        if trained.was_complete:
            say(f"rightbatch: this training is finished: {state.value}; more --epochs go on from here, --fresh starts again.")
        answer(render_training_text(trained.manifest, trained.lines, **text_layout()))
    return ANSWERED if state in {TrainingState.FINISHED, TrainingState.TARGET_REACHED} else INCONCLUSIVE


def _keep_report(trained: "TrainedRun", *, quiet: bool) -> None:
    """Write the page into the folder; when that fails the training still stands, so it is only said."""
    from rightbatch.records.training_run import TrainingFolder
    from rightbatch.report.training import render_training_html

    if trained.folder is None:
        return
    try:
        report = TrainingFolder(trained.folder).write_report(render_training_html(trained.manifest, trained.lines))
    except RunFolderError as error:
        say(f"rightbatch: the report was not written: {error}")
        return
    if not quiet:
        say(f"folder: {trained.folder}\nreport: {report}")
