"""Things to know and to do: few sentences, each with its numbers."""

from dataclasses import dataclass

from rightbatch.records.estimates import LoaderCurve, MemoryCurve, NoiseScale, Status, StepTimeCurve, Tradeoff
from rightbatch.records.measurements import WorkloadSummary
from rightbatch.records.plan import BatchPlan
from rightbatch.units import format_bytes, format_number

FEW_STEPS = 10
"""Fewer optimizer steps than this in an epoch are worth a word."""


@dataclass(frozen=True)
class Context:
    """What advice is given on."""

    status: str
    plan: BatchPlan | None
    workload: WorkloadSummary
    step_time: StepTimeCurve | None
    loader: LoaderCurve | None
    noise_scale: NoiseScale | None
    memory: MemoryCurve | None
    tradeoff: Tradeoff | None
    is_swept: bool
    """Whether the answer rests on a sweep, and not on the gradient noise."""


def advise(context: Context) -> tuple[str, ...]:
    """Sentences in the order of their weight: what to measure next, then what to mind when training with the plan."""
    sentences = [_unreliable(context), _next_measurement(context), _short_search(context)]
    if context.plan is not None:
        sentences += [
            _loader_limit(context, context.plan),
            _lone_sample(context.workload, context.plan),
            _evaluation(context.memory, context.plan),
            _few_steps(context.workload, context.plan),
            _ranks(context.plan),
        ]
    sentences += _about_workload(context.workload)
    return tuple(sentence for sentence in sentences if sentence)


def _next_measurement(context: Context) -> str:
    if context.status == "nothing_fits":
        needed, limit = ("", "")
        if context.memory is not None:
            needed, limit = format_bytes(context.memory.bytes_at_one), format_bytes(context.memory.limit.limit_bytes)
        return f"One sample needs about {needed} and the limit is {limit}: use a smaller model or input, lower precision, or more memory."
    if context.step_time is None:
        return "Nothing is known about speed: measure it with rightbatch find."
    if context.plan is None:
        if context.tradeoff is not None and context.tradeoff.points:
            return "No timed size that is allowed lies between the sizes that were trained: train at some of them, with rightbatch sweep."
        return "No size that is allowed was timed: raise --max-global-batch, or time smaller sizes."
    noise = context.noise_scale
    if context.is_swept:
        return "" if context.status == "ok" else _narrower(context, "more of its sizes, or more seeds, narrow it most: sweep again")
    if noise is None:
        return "The plan rests on speed alone: measure the gradient noise with rightbatch find to learn what larger batches are worth."
    if context.status == "ok":
        return ""
    if noise.status not in (Status.OK, Status.AT_LEAST):
        remedy = noise.remarks[0] if noise.remarks else "Give a larger --budget."
        return f"The plan rests on speed alone, because the gradient noise was not determined. {remedy}"
    return _narrower(context, _remedy(noise))


def _remedy(noise: NoiseScale) -> str:
    """What would narrow the belief about the critical batch size most."""
    if noise.pilot_samples == 0:
        return "a pilot run narrows it most: give a larger --budget"
    if noise.status is Status.AT_LEAST:
        return f"more than the {noise.n} gradients so far narrow it most: give a larger --budget"
    return "training probes narrow it most: compare two sizes with rightbatch sweep"


def _narrower(context: Context, remedy: str) -> str:
    """How far the critical batch size is known, and what would narrow that."""
    critical = context.tradeoff.critical_batch_size if context.tradeoff is not None else None
    if critical is None or critical.low is None or context.status == "unstable":
        return ""
    span = (
        f"between {format_number(critical.low)} and {format_number(critical.high)}"
        if critical.high
        else f"above {format_number(critical.low)}"
    )
    return f"The critical batch size is only known to lie {span}; {remedy}."


def _unreliable(context: Context) -> str:
    if context.status != "unstable" or context.step_time is None:
        return ""
    return f"The timings are not reliable, so measure again on a quiet machine. {' '.join(context.step_time.reasons)}".strip()


def _short_search(context: Context) -> str:
    if context.memory is None or context.memory.ceiling is None or context.memory.stopped_by != "budget":
        return ""
    return f"The budget ended the search for the ceiling at {context.memory.ceiling}: a larger --budget may find a larger one."


def _loader_limit(context: Context, plan: BatchPlan) -> str:
    loader, step_time = context.loader, context.step_time
    if loader is None or step_time is None or not loader.samples_per_s.value:
        return ""
    point = next((p for p in step_time.points if p.micro_batch_size == plan.micro_batch_size), None)
    if point is None or not point.samples_per_s.value or loader.samples_per_s.value >= point.samples_per_s.value:
        return ""
    return (
        f"The data loader delivers {format_number(loader.samples_per_s.value)} samples/s with {loader.num_workers} workers and the device "
        f"takes {format_number(point.samples_per_s.value)}: more workers or cheaper transforms help more than another batch size."
    )


def _lone_sample(workload: WorkloadSummary, plan: BatchPlan) -> str:
    share = -(-workload.train_size // plan.world_size)  # a distributed sampler gives every rank as many
    leftover = share % (plan.global_batch_size // plan.world_size) % plan.micro_batch_size
    if not workload.batch_norm or leftover != 1 or plan.micro_batch_size == 1:
        return ""
    each = " a rank" if plan.world_size > 1 else ""
    return (
        f"{share} samples{each} leave a last micro-batch of one, on which batch normalisation fails or misleads: "
        "use drop_last=True or another size."
    )


def _evaluation(memory: MemoryCurve | None, plan: BatchPlan) -> str:
    if memory is None or memory.evaluation_ceiling is None or memory.evaluation_ceiling >= plan.micro_batch_size:
        return ""
    return (
        f"Evaluation is predicted to fit no more than {memory.evaluation_ceiling} samples at once, fewer than a micro-batch: "
        "give the validation loader a batch size of its own."
    )


def _few_steps(workload: WorkloadSummary, plan: BatchPlan) -> str:
    steps = -(-workload.train_size // plan.global_batch_size)
    if steps >= FEW_STEPS:
        return ""
    epoch = "1 step" if steps == 1 else f"{steps} steps"
    return f"An epoch is only {epoch} at batch {plan.global_batch_size}: give schedules and warm-up in samples or steps, not epochs."


def _ranks(plan: BatchPlan) -> str:
    if plan.world_size == 1:
        return ""
    return f"Steps were timed on one device: the time that {plan.world_size} ranks spend exchanging gradients is not included."


def _about_workload(workload: WorkloadSummary) -> list[str]:
    sentences = []
    if workload.loss_reduction == "sum":
        sentences.append(
            "The loss is a sum, so its gradient grows with the batch: use its mean, or divide the learning rate by the batch size."
        )
    if workload.couples_samples:
        sentences.append(
            "The loss of a batch is not the mean of its samples' losses, as in contrastive learning: another size trains for something "
            "else, and no batch is accumulated here; couples_samples=True keeps training from cutting one."
        )
    if workload.loss_parameter_count:
        sentences.append(
            f"Trainable parameters of the loss itself, {workload.loss_parameter_count:,} here, are not trained: to train them, "
            "make them the model's and give step=; else freeze them."
        )
    if workload.optimizer_given and workload.lr is not None and workload.lr_batch_size is None:
        sentences.append(
            f"The learning rate {workload.lr:g} has no batch size to scale from: give lr_batch_size= to couple it to the plan."
        )
    return sentences
