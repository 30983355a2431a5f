"""Hand-made trainings for tests of their log, their result and their report."""

import math

from rightbatch.records.estimates import Estimate
from rightbatch.records.plan import BatchPlan
from rightbatch.records.training_log import EvaluationLine, EventLine, LogEvent, LogLine, StepLine, TrainingTarget
from rightbatch.records.training_run import PredictedStep, TrainingManifest, TrainingState

HOSTILE_NAME = "</script><script>alert(1)</script>"
SAMPLES_PER_EPOCH = 10_000


def manifest(state: TrainingState = TrainingState.TARGET_REACHED, **changes: object) -> TrainingManifest:
    given = {
        "rightbatch_version": "0.1.0",
        "created_at": "2026-11-25T10:00:00+00:00",
        "updated_at": "2026-11-25T10:04:10+00:00",
        "command": ("rightbatch", "train", "train.py:workload", "--plan", "runs/cnn", "--target", "accuracy>=0.9"),
        "workload_spec": "train.py:workload",
        "workload_name": "My CNN",
        "fingerprint": "0" * 64,
        "plan": BatchPlan(global_batch_size=128, micro_batch_size=64, accumulation_steps=2, lr=0.1),
        "plan_source": "the findings in runs/cnn",
        "schedule": "noise-adaptive, from 64 to 512",
        "samples": 50_000,
        "samples_per_epoch": SAMPLES_PER_EPOCH,
        "target": TrainingTarget.parse("accuracy>=0.9"),
        "seed": 0,
        "device": "cpu",
        "device_name": "An 8-core processor",
        "predicted_steps": tuple(PredictedStep(global_batch_size=size, step_time_s=0.004 + size * 2e-4) for size in (32, 128, 512)),
        "state": state,
    }
    return TrainingManifest(**given | changes)


def lines(*, until: int = 40_000, first: int = 128, last: int = 256, change_at: int = 20_000, log_every: int = 2000) -> tuple[LogLine, ...]:
    """A run whose loss falls as a power of the samples, with one change of the size, evaluated once an epoch."""
    made: list[LogLine] = [
        EventLine(step=0, samples=0, training_s=0.0, event=LogEvent.STARTED, detail="batch 128 = micro 64 x accumulate 2")
    ]
    step, training_s = 0, 0.0
    for samples in range(log_every, until + 1, log_every):
        size = first if samples <= change_at else last
        step += log_every // size
        training_s += log_every / size * (0.005 + size * 2e-4)
        place = {"step": step, "samples": samples, "training_s": training_s}
        if size != first and samples - log_every <= change_at:
            made.append(EventLine(**place, event=LogEvent.BATCH_SIZE, detail=f"{first} to {last}"))
        noise = Estimate(value=samples / 50, low=samples / 60, high=samples / 40, n=samples) if samples % 10_000 == 0 else None
        made.append(
            StepLine(
                **place,
                global_batch_size=size,
                micro_batch_size=64,
                lr=0.1 * size / first,
                loss=2.3 * (samples / log_every) ** -0.5,
                grad_norm=1.5,
                samples_per_s=size / (0.005 + size * 2e-4),
                noise_scale=noise,
            )
        )
        if samples % SAMPLES_PER_EPOCH == 0:
            metric = 1 - 0.4 / math.sqrt(samples / 2500)
            made.append(EvaluationLine(**place, loss=2.2 * (samples / 2500) ** -0.5, metric=metric, evaluated_samples=2000))
    return tuple(made)


def _ended(made: tuple[LogLine, ...], event: LogEvent, detail: str) -> tuple[LogLine, ...]:
    last = max(made, key=lambda line: line.step)
    return (*made, EventLine(step=last.step, samples=last.samples, training_s=last.training_s, event=event, detail=detail))


Training = tuple[TrainingManifest, tuple[LogLine, ...]]


def good() -> Training:
    made = _ended(lines(), LogEvent.TARGET_REACHED, "accuracy 0.9 after 40000 samples")
    return manifest(), made


def interrupted() -> Training:
    made = _ended(lines(until=14_000), LogEvent.CHECKPOINT, "checkpoint-000000105-0123456789abcdef.pt")
    resumed = EventLine(step=105, samples=14_000, training_s=9.0, event=LogEvent.INTERRUPTED, detail="SIGTERM")
    return manifest(TrainingState.INTERRUPTED, schedule="constant"), (*made, resumed)


def diverged() -> Training:
    made = list(lines(until=8000))
    last = made[-1]
    assert isinstance(last, StepLine)
    made[-1] = last.model_copy(update={"loss": None, "grad_norm": None})
    ended = _ended(tuple(made), LogEvent.DIVERGED, "the loss is not finite")
    return manifest(TrainingState.DIVERGED, schedule="constant", predicted_steps=(), plan_source="the command line"), ended


def hostile_names() -> Training:
    made = _ended(lines(), LogEvent.FINISHED, f"{HOSTILE_NAME} [red]x[/red] \x1b[31m\u202e")
    target = TrainingTarget(quantity="accuracy", value=0.99, is_loss=False)
    changes = {"workload_name": HOSTILE_NAME, "workload_spec": HOSTILE_NAME, "plan_source": HOSTILE_NAME, "target": target}
    return manifest(TrainingState.TARGET_MISSED, **changes), made


ALL = {"good": good, "interrupted": interrupted, "diverged": diverged, "hostile_names": hostile_names}
