"""Everything that a training is made of, built from a workload and a plan, with its state as one document and back."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.engine.in_process import users_errors
from rightbatch.engine.learning_rate import load_optimizer, set_lr
from rightbatch.engine.rig import Rig, seed_everything
from rightbatch.engine.step import Trainee
from rightbatch.errors import UsageError, WorkloadError
from rightbatch.records.plan import BatchPlan
from rightbatch.training.batch_schedule import DynamicBatch
from rightbatch.training.checkpoint import State
from rightbatch.training.evaluation import Evaluator
from rightbatch.training.generators import generators_state, restore_generators
from rightbatch.training.loader import BatchLoader
from rightbatch.training.peers import Peers
from rightbatch.training.request import TrainingRequest
from rightbatch.training.stepper import Stepper
from rightbatch.training.stop_signals import outlive_first_signal

_NOISE_EVERY, _NOISE_EVERY_ADAPTIVE = 50, 10
_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)  # noqa: SLF001  # the common base of all batch normalisations


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is trained, and what trains it.

    Attributes:
        rig: The workload on its device.
        plan: For as many ranks as there are, in the workload's precision.
        model: Not wrapped.
        average: Moving average of its weights; none when the workload keeps none.
        optimizer: Its optimizer, at the plan's learning rate.
        loader: Loads the batches.
        stepper: Takes the steps.
        schedule: Says the size of each batch; none when it is constant.
        evaluator: Evaluates; none without validation samples.
        peers: The ranks.
    """

    rig: Rig
    plan: BatchPlan
    model: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    stepper: Stepper
    schedule: DynamicBatch | None
    evaluator: Evaluator | None
    peers: Peers

    def size_at(self, samples_seen: int) -> int:
        """Global batch size of a step that was taken already."""
        return self.plan.global_batch_size if self.schedule is None else self.schedule.setting_at(samples_seen).global_batch_size

    def state(self) -> State:
        """Return everything that a checkpoint holds; all ranks call it together."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "loader": self.loader.state_dict(),
            "stepper": self.stepper.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "generators": self.peers.gather(generators_state(self.rig.device)),
        }

    def load(self, state: State) -> None:
        """Take over what ``state`` returned."""
        given: Any = state
        self.model.load_state_dict(given["model"])
        load_optimizer(self.optimizer, given["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(given["average"])
        self.loader.load_state_dict(given["loader"])
        self.stepper.load_state_dict(given["stepper"])
        if self.schedule is not None:
            self.schedule.load_state_dict(given["schedule"])
        restore_generators(given["generators"][self.peers.rank], self.rig.device)

    def fingerprint(self, spec: str, arguments: tuple[str, ...]) -> str:
        """Return the digest of everything that must be the same for a training to go on.

        Args:
            spec: How the user named the workload.
            arguments: The user's arguments to it.
        """
        shapes = [
            (name, list(value.shape), str(value.dtype)) for name, value in self.model.state_dict().items() if isinstance(value, Tensor)
        ]
        schedule = None if self.schedule is None else self.schedule.schedule.model_dump(mode="json")
        plan = self.plan.model_dump(mode="json", exclude={"num_workers"})
        identity = [spec, list(arguments), plan, schedule, self.rig.seed, self.rig.train_size, type(self.optimizer).__name__, shapes]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def assemble(rig: Rig, request: TrainingRequest, peers: Peers) -> Parts:
    """Build everything that a training is made of.

    Args:
        rig: The workload on the device of this rank.
        request: What is asked.
        peers: The ranks that train together.

    Raises:
        WorkloadError: An ingredient does not do what it must.
        UsageError: The plan cannot be trained by so many ranks.
    """
    workload = rig.workload
    plan = plan_for_ranks(request.plan, peers.world_size).model_copy(update={"precision": workload.precision})
    with users_errors():
        trainee = rig.new_trainee()
        set_lr(trainee.optimizer, plan.lr)
        scheduler = None if workload.scheduler is None else workload.scheduler(trainee.optimizer)
        if scheduler is not None and not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            raise WorkloadError(f"scheduler must build a torch.optim.lr_scheduler.LRScheduler; it returned {type(scheduler).__name__}.")
    schedule = None if request.schedule is None else DynamicBatch(request.schedule)
    num_workers = workload.num_workers if workload.num_workers is not None else plan.num_workers or 0
    wrapped = peers.wrap(trainee.model)
    stepper = Stepper(
        wrapped,
        trainee.optimizer,
        workload.loss,
        plan,
        schedule=schedule,
        scheduler=scheduler,
        step=workload.step,
        loss_weight=workload.loss_weight,
        loss_is_sum=rig.loss_is_sum,
        couples_samples=workload.couples_samples,
        clip_norm=workload.clip_norm,
        scaler=trainee.scaler,
        average=trainee.average,
        noise_every=_noise_every(request, plan, rig, trainee),
        dataset_size=rig.train_size,
    )
    loader = BatchLoader(
        workload.train,
        plan,
        schedule=schedule,
        seed=rig.seed,
        num_workers=num_workers,
        collate_fn=workload.collate_fn,
        drop_last=_last_batch_is_too_small(trainee.model, rig.train_size, plan, is_constant=schedule is None),
        worker_init_fn=outlive_first_signal,
        rank=peers.rank,
        world_size=peers.world_size,
    )
    evaluator = None
    if workload.valid is not None:
        evaluator = Evaluator(workload=workload, objective=trainee.objective, place=rig.place, peers=peers, num_workers=num_workers)
    seed_everything(rig.seed + peers.rank)  # each rank draws dropout masks of its own
    return Parts(
        rig=rig,
        plan=plan,
        model=trainee.model,
        average=trainee.average,
        optimizer=trainee.optimizer,
        loader=loader,
        stepper=stepper,
        schedule=schedule,
        evaluator=evaluator,
        peers=peers,
    )


def plan_for_ranks(plan: BatchPlan, world_size: int) -> BatchPlan:
    """Return the plan with the same global batch for another number of ranks, in micro-batches that are no larger.

    Args:
        plan: For whatever number of ranks.
        world_size: Processes that train together.

    Raises:
        UsageError: The global batch cannot be shared out evenly.
    """
    if plan.world_size == world_size:
        return plan
    share, rest = divmod(plan.global_batch_size, world_size)
    if rest:
        near = max(world_size, plan.global_batch_size - rest)
        raise UsageError(
            f"the global batch must be a multiple of the number of ranks; got {plan.global_batch_size} for {world_size} ranks; "
            f"use --plan {near} or {near + world_size}, or another number of ranks."
        )
    steps = next(count for count in range(1, share + 1) if share % count == 0 and share // count <= plan.micro_batch_size)
    return plan.model_copy(update={"micro_batch_size": share // steps, "accumulation_steps": steps, "world_size": world_size})


def _noise_every(request: TrainingRequest, plan: BatchPlan, rig: Rig, trainee: Trainee) -> int | None:
    """On how many steps to measure the noise: where nobody asked, not where measuring would change the training or could fail."""
    if request.noise_every is not None:
        return request.noise_every or None
    if request.schedule is not None and request.schedule.kind == "noise":
        return _NOISE_EVERY_ADAPTIVE
    modules = list(trainee.model.modules())
    is_sparse = any(getattr(module, "sparse", False) for module in modules if isinstance(module, (nn.Embedding, nn.EmbeddingBag)))
    halves_batch_norm = plan.accumulation_steps * plan.world_size == 1 and any(isinstance(module, _BATCH_NORM) for module in modules)
    if rig.workload.couples_samples or rig.workload.compile or is_sparse or halves_batch_norm:
        return None
    return _NOISE_EVERY


def _last_batch_is_too_small(model: nn.Module, train_size: int, plan: BatchPlan, *, is_constant: bool) -> bool:
    """Whether the last batch of an epoch has to be left out: batch normalisation cannot train on one sample."""
    if not any(isinstance(module, _BATCH_NORM) for module in model.modules()):
        return False
    return not is_constant or 0 < train_size % plan.global_batch_size < 2 * plan.world_size
