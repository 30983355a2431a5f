"""A training's plan and its progress, each in a line; imports nothing heavy."""

from rightbatch.records.plan import BatchPlan
from rightbatch.records.training_log import EvaluationLine, StepLine, TrainingTarget
from rightbatch.units import format_number


def plan_words(plan: BatchPlan) -> str:
    """Say how a batch is made: ``128 = micro 64 x accumulate 2``."""
    factors = [f"micro {plan.micro_batch_size}"] if plan.accumulation_steps * plan.world_size > 1 else []
    factors += [f"accumulate {plan.accumulation_steps}"] if plan.accumulation_steps > 1 else []
    factors += [f"ranks {plan.world_size}"] if plan.world_size > 1 else []
    return f"{plan.global_batch_size}" + (f" = {' x '.join(factors)}" if factors else "")


def step_words(line: StepLine, total_samples: int, evaluation: EvaluationLine | None, target: TrainingTarget | None) -> str:
    """Say where a training is: ``12800/50000 samples · batch 128 · lr 0.1 · loss 0.42 · 5310 samples/s · noise 480``.

    Args:
        line: The last steps.
        total_samples: Where it ends.
        evaluation: What the last evaluation showed; none before the first.
        target: What the user calls the metric comes from here.
    """
    parts = [f"{line.samples}/{total_samples} samples", f"batch {line.global_batch_size}"]
    if line.lr is not None:
        parts.append(f"lr {line.lr:.4g}")
    parts.append("loss not finite" if line.loss is None else f"loss {line.loss:.4g}")
    if evaluation is not None and evaluation.metric is not None:
        parts.append(f"{metric_name(target)} {evaluation.metric:.4g}")
    if line.samples_per_s is not None:
        parts.append(f"{format_number(line.samples_per_s)} samples/s")
    if line.noise_scale is not None and line.noise_scale.value is not None:
        parts.append(f"noise {format_number(line.noise_scale.value)}")
    return " · ".join(parts)


def evaluation_words(evaluation: EvaluationLine, target: TrainingTarget | None) -> str:
    """Say an evaluation: ``accuracy 0.9123, loss 0.3102``."""
    loss = "loss not finite" if evaluation.loss is None else f"loss {evaluation.loss:.4g}"
    return loss if evaluation.metric is None else f"{metric_name(target)} {evaluation.metric:.4g}, {loss}"


def metric_name(target: TrainingTarget | None) -> str:
    """What the user calls the workload's metric, as far as it was said."""
    return "metric" if target is None or target.is_loss else target.quantity
