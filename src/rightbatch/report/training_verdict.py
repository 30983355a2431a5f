"""All the words of a training's report, made once from its manifest and its log; the terminal and the page only lay them out."""

import shlex
from collections.abc import Sequence
from datetime import datetime

from rightbatch.fits.training_result import evenly, training_result
from rightbatch.records.training_log import EvaluationLine, EventLine, LogEvent, LogLine, StepLine
from rightbatch.records.training_run import TrainingManifest, TrainingResult, TrainingState, resume_command
from rightbatch.report.document import KeyNumber, Section, Table, Verdict, VerdictStatus
from rightbatch.report.phrases import estimate, number, plain, signed_percent, split
from rightbatch.training.progress_words import evaluation_words, metric_name, plan_words
from rightbatch.units import format_ago_s, format_duration_s

_STATUS: dict[TrainingState, VerdictStatus] = {
    TrainingState.FINISHED: "ok",
    TrainingState.TARGET_REACHED: "ok",
    TrainingState.TARGET_MISSED: "inconclusive",
    TrainingState.UNFINISHED: "inconclusive",
    TrainingState.STOPPED: "inconclusive",
    TrainingState.INTERRUPTED: "inconclusive",
    TrainingState.DIVERGED: "unstable",
}
MOST_ROWS = 100
"""Of a table behind a chart; of longer logs the rows are spread evenly."""
_SHOWN_EVENTS = 40
_REMEDY_DIVERGED = "Try a smaller learning rate, a warm-up, or clip_norm; where the precision is fp16, bf16."
_FINITE_CHECKPOINT = "The last checkpoint was made before, while the loss was finite."


def build_training_verdict(manifest: TrainingManifest, lines: Sequence[LogLine], *, now: datetime | None = None) -> Verdict:
    """Put a training into words.

    Args:
        manifest: What was asked, and how it ended.
        lines: Its log.
        now: An aware time, to say how long ago it was; none says only when.
    """
    result = training_result(manifest, lines)
    sections = (
        _course(result, lines),
        _batch(result),
        _noise(lines),
        _time(manifest, result),
        _events(lines),
        _provenance(manifest, now),
    )
    return Verdict(
        status=_STATUS[result.state],
        workload=plain(manifest.workload_name),
        answer=_answer(result),
        headline=_headline(result),
        lead=_lead(manifest, result, lines),
        key_numbers=_key_numbers(result),
        sizes=(),
        sections=tuple(section for section in sections if section is not None),
    )


def _answer(result: TrainingResult) -> str:
    parts = [_outcome(result)]
    if result.evaluation is not None:
        parts.append(evaluation_words(result.reached or result.evaluation, result.target))
    elif result.train_loss is not None:
        parts.append(f"training loss {number(result.train_loss)}")
    if result.steps:
        steps = "1 step" if result.steps == 1 else f"{result.steps} steps"
        parts.append(f"{steps} of {_sizes(result)}")
    if result.samples_per_s is not None:
        parts.append(f"{number(result.samples_per_s)} samples/s")
    return " · ".join(parts)


def _outcome(result: TrainingResult) -> str:
    of_all = f"{result.samples} of {result.samples_asked} samples"
    if result.state is TrainingState.TARGET_REACHED and result.reached is not None:
        return f"{result.target} after {result.reached.samples} samples, {format_duration_s(result.reached.training_s)}"
    if result.state is TrainingState.TARGET_MISSED:
        return f"{result.target} not reached in {result.samples} samples, {format_duration_s(result.training_s)}"
    if result.state is TrainingState.FINISHED:
        return f"trained on {result.samples} samples, {format_duration_s(result.training_s)}"
    return f"{result.state.value} after {of_all}"


def _sizes(result: TrainingResult) -> str:
    sizes = [size for _, size in result.batch_sizes]
    return f"{min(sizes)}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"


def _headline(result: TrainingResult) -> str:
    epochs = f"{number(result.epochs)} epoch{'' if result.epochs == 1 else 's'}"
    if result.state is TrainingState.TARGET_REACHED:
        return f"The target was reached after {epochs}."
    if result.state is TrainingState.TARGET_MISSED:
        return f"The target was not reached in {epochs}."
    if result.state is TrainingState.FINISHED:
        return f"Trained for {epochs}."
    if result.state is TrainingState.DIVERGED:
        return f"The training diverged after {epochs}: its loss is not finite."
    verbs = {TrainingState.INTERRUPTED: "was interrupted", TrainingState.STOPPED: "was stopped by the caller"}
    return f"The training {verbs.get(result.state, 'is not finished')} after {epochs}."


def _lead(manifest: TrainingManifest, result: TrainingResult, lines: Sequence[LogLine]) -> tuple[str, ...]:
    if result.state is TrainingState.DIVERGED:
        has_checkpoint = any(isinstance(line, EventLine) and line.event is LogEvent.CHECKPOINT for line in lines)
        return (f"{_REMEDY_DIVERGED} {_FINITE_CHECKPOINT}" if has_checkpoint else _REMEDY_DIVERGED,)
    if result.state in {TrainingState.INTERRUPTED, TrainingState.UNFINISHED}:
        command = resume_command(manifest.command, world_size=manifest.plan.world_size)
        return (f"Go on with: {plain(command)}" if command else "Go on with resume=True.",)
    sentences = [_predicted(result)] if result.predicted_s is not None else []
    if result.state is TrainingState.TARGET_MISSED and result.best is not None:
        place = f"after {result.best.samples} samples"
        sentences.append(f"The best evaluation was {evaluation_words(result.best, result.target)}, {place}.")
    return tuple(sentences)


def _key_numbers(result: TrainingResult) -> tuple[KeyNumber, ...]:
    keys = []
    shown = result.reached or result.evaluation
    if shown is not None and shown.metric is not None:
        of = "of the moving average" if shown.of_average else f"on {shown.evaluated_samples} validation samples"
        keys.append(KeyNumber(label=metric_name(result.target), value=number(shown.metric), note=of))
    if shown is not None and shown.loss is not None:
        keys.append(KeyNumber(label="validation loss", value=number(shown.loss)))
    epochs = f"{number(result.epochs)} epoch{'' if result.epochs == 1 else 's'}"
    keys.append(KeyNumber(label="samples", value=f"{result.samples:,}", note=epochs))
    keys.append(KeyNumber(label="training time", value=format_duration_s(result.training_s), note="without evaluations and checkpoints"))
    if result.samples_per_s is not None:
        keys.append(KeyNumber(label="samples/s", value=number(result.samples_per_s)))
    if result.batch_sizes:
        plan = result.plan
        keys.append(
            KeyNumber(
                label="batch",
                value=_sizes(result).replace(" to ", "-"),
                note=split(plan.micro_batch_size, plan.accumulation_steps, plan.world_size),
            )
        )
    return tuple(keys)


def _course(result: TrainingResult, lines: Sequence[LogLine]) -> Section:
    sentences = []
    if result.train_loss is not None:
        sentences.append(f"The training loss over the last steps of the log is {number(result.train_loss)}.")
    evaluations = [line for line in lines if isinstance(line, EvaluationLine)]
    if not evaluations:
        sentences.append("Nothing was evaluated.")
    elif result.best is not None:
        which = "The evaluation" if len(evaluations) == 1 else f"The best of {len(evaluations)} evaluations"
        sentences.append(f"{which} gave {evaluation_words(result.best, result.target)}, after {result.best.samples} samples.")
    if any(line.of_average for line in evaluations):
        sentences.append("The moving average of the weights was evaluated, not the weights.")
    rows = tuple(
        (str(line.samples), format_duration_s(line.training_s), "not finite" if line.loss is None else number(line.loss),
         "" if line.metric is None else number(line.metric))
        for line in evenly(evaluations, MOST_ROWS)
    )  # fmt: skip
    header = ("samples", "training time", "validation loss", metric_name(result.target))
    tables = (Table(caption="Evaluations", header=header, rows=rows, behind_chart=True),) if rows else ()
    return Section(key="course", title="Loss", sentences=tuple(sentences), tables=tables)


def _batch(result: TrainingResult) -> Section:
    plan = result.plan
    rate = "" if plan.lr is None else f", learning rate {number(plan.lr)}"
    sentences = [
        f"The plan is batch {plan_words(plan)}{rate}, from {plain(result.plan_source)}.",
        f"Its schedule: {plain(result.schedule)}.",
    ]
    if result.forecast is not None:
        sentences.extend(("What was forecast before the start:", *(plain(reason) for reason in result.forecast.reasons)))
    changes = result.batch_sizes
    rows = tuple((str(samples), str(size)) for samples, size in evenly(changes, MOST_ROWS))
    tables = (Table(caption="Sizes", header=("from sample", "batch"), rows=rows, behind_chart=True),) if len(rows) > 1 else ()
    if len(changes) > 1:
        times = "once" if len(changes) == 2 else f"{len(changes) - 1} times"
        sentences.append(f"The size changed {times}, from {changes[0][1]} to {changes[-1][1]}.")
    if result.out_of_memory:
        times = f"{result.out_of_memory} step{'s' if result.out_of_memory > 1 else ''}"
        sentences.append(f"Memory ran out in {times}, taken again in smaller micro-batches: the same mathematics.")
    return Section(key="batch", title="Batch and learning rate", sentences=tuple(sentences), tables=tables)


def _noise(lines: Sequence[LogLine]) -> Section | None:
    known = [(line.samples, line.noise_scale) for line in lines if isinstance(line, StepLine) and line.noise_scale is not None]
    if not known:
        return None
    rows = tuple((str(samples), estimate(scale)) for samples, scale in evenly(known, MOST_ROWS))
    header = ("samples", "noise scale, 95 % interval")
    return Section(
        key="noise",
        title="Gradient noise",
        sentences=(f"Over the run, up to sample {known[-1][0]}, the noise scale was {estimate(known[-1][1])} samples.",),
        tables=(Table(caption="Noise scale of the run so far", header=header, rows=rows, behind_chart=True),),
    )


def _time(manifest: TrainingManifest, result: TrainingResult) -> Section:
    sentences = [f"Training took {format_duration_s(result.training_s)}, loading of batches included."]
    if result.predicted_s is not None:
        sentences.append(_predicted(result))
    elif not manifest.predicted_steps:
        sentences.append("There is no prediction to compare with: the plan does not come from findings with steady step times.")
    else:
        timed = [step.global_batch_size for step in manifest.predicted_steps]
        sentences.append(f"There is no prediction to compare with: the findings time sizes from {min(timed)} to {max(timed)} only.")
    return Section(key="time", title="Time, predicted and realised", sentences=tuple(sentences))


def _predicted(result: TrainingResult) -> str:
    predicted_s = result.predicted_s or 0.0
    difference = f", a difference of {signed_percent(result.training_s / predicted_s - 1)}" if predicted_s else ""
    realised = format_duration_s(result.training_s)
    return f"By the plan's step times these samples should have taken {format_duration_s(predicted_s)}; they took {realised}{difference}."


def _events(lines: Sequence[LogLine]) -> Section | None:
    events = [line for line in lines if isinstance(line, EventLine)]
    shown = [line for line in events if line.event is not LogEvent.CHECKPOINT]
    checkpoints = len(events) - len(shown)
    written = {0: "No checkpoint was written.", 1: "One checkpoint was written."}
    sentences = [written.get(checkpoints, f"{checkpoints} checkpoints were written.")]
    if len(shown) > _SHOWN_EVENTS:
        sentences.append(f"The last {_SHOWN_EVENTS} of {len(shown)} other events:")
    rows = tuple((str(line.samples), line.event.value, plain(line.detail)) for line in shown[-_SHOWN_EVENTS:])
    if not events:
        return None
    table = Table(caption="Events", header=("samples", "event", "detail"), rows=rows)
    return Section(key="events", title="What happened", sentences=tuple(sentences), tables=(table,) if rows else ())


def _provenance(manifest: TrainingManifest, now: datetime | None) -> Section:
    last = datetime.fromisoformat(manifest.updated_at)
    age = "" if now is None else f" ({format_ago_s((now - last).total_seconds())})"
    rows = (
        (
            "workload",
            plain(shlex.join((manifest.workload_spec, *manifest.workload_arguments)) if manifest.command else manifest.workload_spec),
        ),
        ("command", plain(shlex.join(manifest.command))),
        ("device", f"{plain(manifest.device)}: {plain(manifest.device_name)}"),
        ("precision", f"{manifest.plan.precision}, seed {manifest.seed}"),
        ("data", f"{manifest.samples_per_epoch:,} training samples"),
        ("trained", f"{datetime.fromisoformat(manifest.created_at):%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC{age}"),
        ("rightbatch", plain(manifest.rightbatch_version)),
    )
    table = Table(caption="", header=("what", "value"), rows=tuple(row for row in rows if row[1]))
    return Section(key="provenance", title="Where this comes from", tables=(table,))
