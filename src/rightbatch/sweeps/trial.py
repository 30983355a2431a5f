"""What runs in the process of a trial: one training, with the loader, stepper and evaluation of ``rb.train``, to its target."""

import math
from collections.abc import Iterator
from pathlib import Path

from rightbatch.engine.in_process import users_errors
from rightbatch.engine.provenance import environment
from rightbatch.engine.rig import Rig, build_rig
from rightbatch.errors import UserCodeError
from rightbatch.records.plan import BatchPlan
from rightbatch.records.sweep import TrialPoint, TrialResult, TrialStatus
from rightbatch.sweeps.crossing import HOLD, Course
from rightbatch.sweeps.tasks import Described, DescribeTask, TrialTask, WorkerSetting
from rightbatch.training.assembly import Parts, assemble
from rightbatch.training.evaluation import check_target
from rightbatch.training.loop import Stopwatch, batches_left, weights_are_finite
from rightbatch.training.peers import Alone
from rightbatch.training.request import TrainingRequest
from rightbatch.workload.ingredients import Batch

LARGEST_EVALUATION_BATCH = 256
_MOST_POINTS = 64


def describe(task: DescribeTask) -> Described:
    """Say what the workload is, and refuse one that no trial could bring to the target.

    Raises:
        WorkloadError: It has no validation samples or no metric.
        UserCodeError: The user's code raised.
    """
    with users_errors():
        rig = _rig(task.setting, seed=0)
        check_target(rig.workload, is_loss=task.target.is_loss)
        return Described(workload=rig.describe(), environment=environment(rig, "child"), code_files=_from_here(task.code_files()))


def _from_here(files: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Name files by their way from the working folder, which stands elsewhere on a cluster than where the driver runs."""
    here = Path.cwd().resolve()
    return tuple((str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path, digest) for path, digest in files)


def _rig(setting: WorkerSetting, *, seed: int) -> Rig:
    return build_rig(setting.load, device=setting.device, precision=setting.precision, threads=setting.threads, seed=seed)


def run_trial(task: TrialTask) -> TrialResult:
    """Train until the target is reached and held, the limit, divergence, or no hope.

    Raises:
        UserCodeError: The user's code raised, or its metric never is a number.
        NothingFitsError: Not even one sample fits in memory.
    """
    with users_errors():
        rig = _rig(task.setting, seed=task.spec.seed)
        parts = assemble(rig, _request(task), Alone())
    try:
        return _train(parts, task)
    finally:
        parts.loader.close()


def _request(task: TrialTask) -> TrainingRequest:
    size = task.spec.global_batch_size
    ceiling = task.largest_micro_batch or size
    steps = next(count for count in range(1, size + 1) if size % count == 0 and size // count <= ceiling)
    plan = BatchPlan(global_batch_size=size, micro_batch_size=size // steps, accumulation_steps=steps, lr=task.spec.lr)
    return TrainingRequest(plan=plan, plan_source="sweep", samples=task.spec.most_samples, noise_every=0)


def _train(parts: Parts, task: TrialTask) -> TrialResult:
    watch = Stopwatch(parts.rig.meters.clock.now_s)
    course = Course(task.target, epoch_samples=parts.loader.samples_per_epoch, most_samples=task.spec.most_samples)
    silent, steps = 0, 0
    for batch in _batches(parts):
        with users_errors():
            outcome = parts.stepper(batch, samples=parts.loader.batch_samples)
        steps += 1
        seen = parts.stepper.samples_seen
        if seen < course.due and seen < task.spec.most_samples:
            continue
        training_s = watch.elapsed_s
        with watch.standing_still():
            loss = outcome.loss
            is_broken = math.isinf(loss) or (math.isnan(loss) and not weights_are_finite(parts.model))
            value = None if is_broken else _evaluate(parts, task)
            if value is None:
                silent += 1
                if is_broken or task.target.is_loss:
                    return _result(parts, task, course, steps, training_s, TrialStatus.DIVERGED, "its loss is not finite")
                _refuse_silence(task, silent, seen, is_last=seen >= task.spec.most_samples)
                continue
            silent = 0
            course.add(seen, steps, training_s, value)
        ended = _ended(course, task, seen)
        if ended is not None:
            return _result(parts, task, course, steps, training_s, *ended)
    raise AssertionError("batches never end")


def _ended(course: Course, task: TrialTask, seen: int) -> tuple[TrialStatus, str] | None:
    """How the trial ends after an evaluation; none when it goes on."""
    if course.crossing is not None:
        return TrialStatus.COMPLETE, ""
    if seen >= task.spec.most_samples:
        return TrialStatus.ABORTED, f"it took {seen} samples, as many as it could have, without the target"
    if course.is_flat:
        return (
            TrialStatus.ABORTED,
            f"its progress over the last doubling of samples cannot bring it to the target within {task.spec.most_samples}",
        )
    return None


def _batches(parts: Parts) -> Iterator[Batch]:
    """Epoch after epoch, without end."""
    while True:
        yield from batches_left(parts.loader)


def _evaluate(parts: Parts, task: TrialTask) -> float | None:
    """The value of the target's quantity; none where it is not finite."""
    assert parts.evaluator is not None, "checked when the workload was described"  # noqa: S101
    batch_size = min(LARGEST_EVALUATION_BATCH, task.largest_micro_batch or LARGEST_EVALUATION_BATCH)
    with users_errors():
        found = parts.evaluator.evaluate(parts.average or parts.model, batch_size)
    return found.loss if task.target.is_loss else found.metric


def _refuse_silence(task: TrialTask, silent: int, seen: int, *, is_last: bool) -> None:
    if silent >= HOLD or is_last:
        raise UserCodeError(
            f"a metric must return a finite number; {task.target.quantity} was none in {silent} evaluations in a row, after {seen} samples "
            f"at batch {task.spec.global_batch_size}, while the loss is finite; check metric="
        )


def _result(parts: Parts, task: TrialTask, course: Course, steps: int, training_s: float, status: TrialStatus, reason: str) -> TrialResult:
    crossing = course.crossing if status is TrialStatus.COMPLETE else None
    every = -(-len(course.evaluations) // _MOST_POINTS) or 1
    kept = course.evaluations[::-1][::every][::-1]  # the last one is always among them
    return TrialResult(
        spec=task.spec,
        status=status,
        reason=reason,
        steps=steps,
        samples=parts.stepper.samples_seen,
        training_s=training_s,
        samples_to_target=None if crossing is None else crossing.samples,
        steps_to_target=None if crossing is None else crossing.steps,
        seconds_to_target=None if crossing is None else crossing.training_s,
        micro_batch_size=parts.stepper.micro_batch_size,
        history=tuple(TrialPoint(samples=e.samples, training_s=e.training_s, value=e.value) for e in kept),
    )
