"""Which plan and which batch schedule a training takes, from a run of ``find``, a size, an earlier session or the workload. Torch-free."""

from dataclasses import dataclass
from pathlib import Path

from rightbatch.errors import InconclusiveError, RightbatchError, UsageError
from rightbatch.fits.schedule_forecast import forecast_schedule
from rightbatch.fits.schedule_text import FORMS, parse_schedule, schedule_text
from rightbatch.recommend.schedule import requested_schedule
from rightbatch.records.estimates import Status
from rightbatch.records.plan import BatchPlan, Findings
from rightbatch.records.run import RunFolder
from rightbatch.records.schedule import BatchSchedule, ScheduleForecast, SizeCoupling
from rightbatch.records.training_run import PredictedStep, TrainingManifest

ADAPTIVE = "noise"
"""The kind of schedule that ``--dynamic`` asks for."""
DYNAMIC = "dynamic"
"""What it is remembered as."""


@dataclass(frozen=True, kw_only=True)
class ChosenPlan:
    """A plan, where it comes from, and what is known beside it.

    Attributes:
        plan: What to train with.
        source: In words.
        findings: Of the run it comes from; none when it comes from elsewhere.
        has_precision: Whether the plan says in which precision to train, or leaves that to the workload.
    """

    plan: BatchPlan
    source: str
    findings: Findings | None = None
    has_precision: bool = False

    @property
    def predicted_steps(self) -> tuple[PredictedStep, ...]:
        """Step times by size, as far as the findings know; none where other processes disturbed them."""
        if self.findings is None or self.findings.tradeoff is None:
            return ()
        if self.findings.step_time is None or self.findings.step_time.status is Status.UNSTABLE:
            return ()
        points = self.findings.tradeoff.points
        return tuple(PredictedStep(global_batch_size=point.global_batch_size, step_time_s=point.step_time_s) for point in points)


@dataclass(frozen=True, kw_only=True)
class ChosenSchedule:
    """How the batch size changes.

    Attributes:
        schedule: None keeps the plan's size.
        words: What it is, in words.
        asked: The word that it was asked for with; empty when none was.
        forecast: What it was predicted to gain; none where nothing was predicted.
    """

    schedule: BatchSchedule | None = None
    words: str = "constant"
    asked: str = ""
    forecast: ScheduleForecast | None = None


def plan_from_run(path: Path) -> ChosenPlan:
    """Take the plan that a run of ``find`` recommends.

    Raises:
        RunFolderError: There is no such run, or it cannot be read.
        InconclusiveError: It recommends no plan.
    """
    findings = RunFolder.open(path).read_findings()
    if findings is None or findings.recommendation.plan is None:
        raise InconclusiveError(
            f"{path} recommends no plan; run `rightbatch find` in it to its end (with a larger --budget where it was inconclusive), or "
            "give a size: --plan 128."
        )
    return ChosenPlan(plan=findings.recommendation.plan, source=run_source(path), findings=findings, has_precision=True)


def run_source(path: Path) -> str:
    """Say that a plan comes from a run."""
    return f"the findings in {path}"


def has_plan(path: Path) -> bool:
    """Whether a run of ``find`` lies there and recommends a plan."""
    try:
        plan_from_run(path)
    except RightbatchError:
        return False
    return True


def plan_of_size(size: int, source: str) -> ChosenPlan:
    """Make a plan of a bare size: one micro-batch, the workload's own learning rate.

    Args:
        size: Global batch size in samples.
        source: Where it comes from, in words.
    """
    if size < 1:
        raise UsageError(f"a batch size must be at least 1; got {size}; give a size such as 128, or the folder of a run of `find`.")
    return ChosenPlan(plan=BatchPlan(global_batch_size=size, micro_batch_size=size), source=source)


def plan_of_workload(lr_batch_size: int | None) -> ChosenPlan:
    """Take the size at which the workload's learning rate was tuned.

    Raises:
        UsageError: It names none.
    """
    if lr_batch_size is None:
        raise UsageError(
            "a training needs a batch size; there is no run of `rightbatch find` for this workload, and it has no lr_batch_size; "
            "run `rightbatch find` first, or give a size: --plan 128."
        )
    return plan_of_size(lr_batch_size, "the workload's lr_batch_size")


def earlier_plan(manifest: TrainingManifest) -> ChosenPlan:
    """Take the plan that an earlier session of the training had."""
    return ChosenPlan(plan=manifest.plan, source=manifest.plan_source, has_precision=True)


def earlier_schedule(manifest: TrainingManifest, text: str | None, *, is_dynamic: bool) -> ChosenSchedule:
    """Take the schedule that an earlier session of the training had.

    Args:
        manifest: Of that session.
        text: The user's word now; none for none.
        is_dynamic: Whether a dynamic batch is asked for now.

    Raises:
        UsageError: Another one is asked for now.
    """
    asked = DYNAMIC if is_dynamic else text or ""
    if asked and asked != manifest.schedule_asked:
        began = manifest.schedule_asked or "a constant size"
        raise UsageError(f"a training goes on as it began, this one with {began}; got {asked}; leave it out, or start again with --fresh.")
    return ChosenSchedule(
        schedule=manifest.batch_schedule, words=manifest.schedule, asked=manifest.schedule_asked, forecast=manifest.forecast
    )


def choose_schedule(chosen: ChosenPlan, text: str | None, *, is_dynamic: bool, optimizer: str, total_samples: int) -> ChosenSchedule:
    """Read or propose a schedule, and forecast what it gains where the findings allow.

    Args:
        chosen: The plan that it starts from.
        text: The user's word for it; none for none, or for the noise-adaptive one if ``is_dynamic``.
        is_dynamic: Whether to follow the noise if that is worth it.
        optimizer: Class name of the optimizer, which decides how the rate follows the size.
        total_samples: Samples that are trained on.

    Returns:
        A constant size where a dynamic batch is not worth it; the forecast says why.

    Raises:
        UsageError: The word has no known form, or needs findings that there are not.
    """
    if text is None and not is_dynamic:
        return ChosenSchedule()
    if text is not None and is_dynamic:
        raise UsageError("a schedule is either given or chosen by the noise; got both --schedule and --dynamic; drop one.")
    word = ADAPTIVE if text is None else text.strip()
    if chosen.findings is None:
        return _without_findings(chosen.plan, word, optimizer)
    schedule = requested_schedule(word, chosen.findings, total_samples)
    forecast = forecast_schedule(chosen.findings, schedule, total_samples)
    if is_dynamic and not forecast.worth_it:
        return ChosenSchedule(words="constant: a dynamic batch is not worth it here", asked=DYNAMIC, forecast=forecast)
    return ChosenSchedule(schedule=schedule, words=schedule_text(schedule), asked=DYNAMIC if is_dynamic else text or "", forecast=forecast)


def forecast_words(chosen: ChosenSchedule) -> tuple[str, ...]:
    """Say what a schedule is predicted to gain, and what follows from it, in sentences; nothing where nothing was predicted."""
    forecast = chosen.forecast
    if forecast is None:
        return ()
    follows = f"Training follows {chosen.words}." if chosen.schedule is not None else "Training keeps the plan's size."
    return (*(f"A dynamic batch: {reason[0].lower()}{reason[1:]}" for reason in forecast.reasons[:1]), *forecast.reasons[1:], follows)


def _without_findings(plan: BatchPlan, word: str, optimizer: str) -> ChosenSchedule:
    if word in FORMS:
        raise UsageError(
            f"a schedule without numbers ({word}, or --dynamic) is proposed from the findings of a run, and the plan comes from none; give "
            f"--plan RUN (in Python, what rb.find returned), or the numbers, such as --schedule {FORMS[word]}."
        )
    coupling = SizeCoupling(base_batch_size=plan.global_batch_size, optimizer=optimizer)
    schedule = parse_schedule(word).model_copy(update={"coupling": coupling})
    return ChosenSchedule(schedule=schedule, words=schedule_text(schedule), asked=word)
