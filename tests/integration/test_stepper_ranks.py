"""Two ranks take the steps of one process, however unequal their shares, and also where one of them runs out of memory."""

import json
from pathlib import Path

import pytest

from launch import forked

PROGRAM = '''
"""Trains two ranks on their shares of fixed batches, once for each case, and writes how far that is from one process on whole batches."""
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rightbatch as rb
from rightbatch.records.plan import BatchPlan

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
PLAN = BatchPlan(global_batch_size=32, micro_batch_size=8, accumulation_steps=2, world_size=2)
WEIGHTS = torch.tensor([0.2, 1.0, 3.0]).double()


class Trap(nn.Module):
    """Runs out of memory in one forward or backward pass."""

    def __init__(self):
        super().__init__()
        self.armed = None

    def forward(self, x):
        self.check("forward")
        x = x.clone()
        x.register_hook(lambda _: self.check("backward"))
        return x

    def check(self, place):
        if self.armed is not None and self.armed[0] == place:
            self.armed[1] -= 1
            if self.armed[1] < 0:
                self.armed = self.armed if self.armed[2] else None
                raise torch.OutOfMemoryError("CUDA out of memory. A trap")


class AtOperation(TorchDispatchMode):
    """Runs out of memory at the k-th operation that makes a tensor."""

    def __init__(self, k):
        super().__init__()
        self.left = k

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given]
        if made:
            self.left -= 1
            if self.left == -1:
                raise torch.OutOfMemoryError("CUDA out of memory. At an operation")
        return result


def fail_at_operation(stepper, k):
    """Let the first attempt of the next step fail at its k-th operation."""
    attempt, mode = stepper._backward._attempt, AtOperation(k)

    def watched(work):
        def run():
            with mode:
                work()
        return attempt(run)

    stepper._backward._attempt = watched
    return mode


def net(batch_norm=False):
    """Traps behind the first layer, in the middle, and at the end: in backward passes they come last to first."""
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if batch_norm else nn.Tanh()
    return nn.Sequential(nn.Linear(6, 8), Trap(), middle, nn.Linear(8, 8), Trap(), nn.Tanh(), nn.Linear(8, 3), Trap()).double()


class Latest(nn.Module):
    """Follows the weights of a model by their names."""

    def __init__(self, model):
        super().__init__()
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def update_parameters(self, model):
        for name, parameter in model.named_parameters():
            self.weights[name].copy_(parameter.detach())


def counted(model, batch):
    return cross_entropy(model(batch[0]), batch[1], weight=None), int((batch[1] != -100).sum())


LOSSES = {
    "mean": {"loss": cross_entropy},
    "class weights": {"loss": nn.CrossEntropyLoss(weight=WEIGHTS)},
    "per token": {
        "loss": lambda o, t: cross_entropy(o, t, reduction="none"),
        "loss_weight": lambda t: (t != -100).sum(),
    },
    "counted": {"loss": None, "step": counted},
}
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


def full_loss(case, output, target):
    return cross_entropy(output, target, weight=WEIGHTS if case["loss"] == "class weights" else None)


def train(case):
    """Train one case; return the distance from the oracle, the sizes along the way, and what the batches' first failure left."""
    model, oracle = net(case.get("batch_norm", False)), net(case.get("batch_norm", False))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-5, **case.get("options", {}))  # a bucket for each parameter
    optimizers = [OPTIMIZERS[case["optimizer"]](m.parameters()) for m in (model, oracle)]
    average = Latest(model)
    stepper = rb.Stepper(wrapped, optimizers[0], plan=PLAN, clip_norm=case.get("clip_norm"), noise_every=case.get("noise_every"),
                         average=average, **LOSSES[case["loss"]])
    generator = torch.Generator().manual_seed(1)
    sizes, losses = [], []
    for step, (all_samples, first) in enumerate(case["batches"]):
        inputs = torch.randn(all_samples, 6, generator=generator).double()
        target = torch.randint(0, 3, (all_samples,), generator=generator)
        target[torch.rand(all_samples, generator=generator) < case["ignored"]] = -100
        if step == case.get("blank_step"):
            target[:first] = -100  # nothing counts on rank 0
        share = slice(0, first) if rank == 0 else slice(first, None)
        if step == 1 and case.get("fails") == rank:
            model[case["trap"]].armed = [case["place"], case["pass"], case.get("always", False)]
        mode = None
        if step == 1 and case.get("operation") is not None and rank == 1:
            mode = fail_at_operation(stepper, case["operation"])
        stepper((inputs[share], target[share]), samples=all_samples)
        if mode is not None:
            del stepper._backward._attempt
            assert mode.left < 0, "the operation was not met"
        assert not any(isinstance(m, Trap) and m.armed for m in model), "the trap was not met"
        sizes.append(stepper.micro_batch_size)
        oracle.zero_grad()
        full_loss(case, oracle(inputs), target).backward()
        if case.get("clip_norm"):
            nn.utils.clip_grad_norm_(oracle.parameters(), case["clip_norm"])
        optimizers[1].step()
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, oracle)]
    state = torch.cat([value.double().flatten() for value in model.state_dict().values()])
    others = [torch.empty_like(state) for _ in range(2)]
    torch.distributed.all_gather(others, state)
    return {
        "off": float((flat[0] - flat[1]).norm() / flat[1].norm()),
        "average_off": float((torch.cat([weight.flatten() for weight in average.weights.values()]) - flat[0]).norm()),
        "sizes": sizes,
        "ranks_off": float((others[0] - others[1]).norm()),
        "passes": int(model[2].num_batches_tracked) if case.get("batch_norm") else None,
        "samples_seen": stepper.samples_seen,
        "noise": None if stepper.monitor is None else json.loads(stepper.monitor.stream.model_dump_json()),
    }


results = {}
for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        results[name] = train(case)
    except rb.RightbatchError as error:
        results[name] = {"error": type(error).__name__, "message": str(error)}
        Path(f"{sys.argv[1]}-{rank}").write_text(json.dumps(results))
        os._exit(0)
    Path(f"{sys.argv[1]}-{rank}").write_text(json.dumps(results))
torch.distributed.barrier()
os._exit(0)  # gloo's threads can abort a process that ends them as its peer does: everything is written by now
'''
WHOLE = [[24, 13], [24, 13], [24, 13], [24, 13], [24, 13]]
UNEQUAL = [[24, 13], [9, 1], [31, 20], [2, 1], [24, 5]]
EXACT = {
    f"{loss}, {optimizer}, {clip_norm}": {
        "loss": loss,
        "optimizer": optimizer,
        "clip_norm": clip_norm,
        "ignored": 0.3,
        "batches": UNEQUAL[:3] + UNEQUAL[4:],
    }
    for loss in ("mean", "class weights", "per token", "counted")
    for optimizer, clip_norm in (("SGD", None), ("Adam", 0.05))
} | {
    f"{loss}, blank": {"loss": loss, "optimizer": "SGD", "ignored": 0.0, "batches": UNEQUAL, "blank_step": 2}
    for loss in ("mean", "counted")
}
"""By words: loss, optimizer, clipping."""


def failing(rank: int, place: str, trap: int, at: int, **more: object) -> dict[str, object]:
    return {
        "loss": "mean",
        "optimizer": "SGD",
        "ignored": 0.3,
        "batches": WHOLE,
        "fails": rank,
        "place": place,
        "trap": trap,
        "pass": at,
    } | more


PLACES = (("forward", 4, 0), ("forward", 4, 1), ("backward", 4, 0), ("backward", 7, 1), ("backward", 4, 1), ("backward", 1, 1))
FAILING = {
    f"rank {rank}, {place} {trap}, micro-batch {at}": failing(rank, place, trap, at) for rank in (0, 1) for place, trap, at in PLACES
} | {
    "views": failing(1, "backward", 4, 1, options={"gradient_as_bucket_view": True}),
    "unused": failing(0, "backward", 4, 1, options={"find_unused_parameters": True}),
    "counted": failing(1, "backward", 4, 1, loss="counted"),
    "measured": failing(1, "backward", 4, 1, noise_every=1),
    "batch norm": failing(0, "backward", 4, 1, batch_norm=True),
}
"""Micro-batch 1 is the last one: its backward pass has sent some buckets off already when it fails at trap 4 or 1."""
OPERATIONS = {
    f"operation {k}": {"loss": "mean", "optimizer": "SGD", "ignored": 0.3, "batches": WHOLE[:3], "operation": k} for k in range(0, 45, 4)
}
"""Of those that make a tensor in the forward and backward passes of rank 1's second step."""
HOPELESS = {"hopeless": failing(1, "backward", 4, 1, always=True)}

pytestmark = pytest.mark.slow


def run(folder: Path, cases: dict[str, object], name: str) -> tuple[dict[str, dict], dict[str, dict]]:
    """Train two ranks; return what each wrote."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / name).write_text(json.dumps(cases))
    ended = forked(folder, "program.py", name)
    assert ended.code == 0, ended.err
    first, second = (json.loads((folder / f"{name}-{rank}").read_text()) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict], dict[str, dict]]:
    """What each rank wrote, by case."""
    return run(tmp_path_factory.mktemp("ranks"), EXACT | FAILING | OPERATIONS, "cases")


@pytest.mark.parametrize("case", EXACT)
def test_unequal_shares_give_the_weights_of_one_process(measured: tuple[dict, dict], case: str) -> None:
    for rank in measured:
        assert rank[case]["off"] < 1e-10
        assert rank[case]["average_off"] == 0
        assert rank[case]["samples_seen"] == sum(size for size, _ in EXACT[case]["batches"])


@pytest.mark.parametrize("case", [case for case in FAILING if case != "batch norm"])
def test_a_rank_that_runs_out_of_memory_changes_nothing_but_the_size(measured: tuple[dict, dict], case: str) -> None:
    """Nor does a rank hang, and the ranks agree on the smaller size two steps after it was told."""
    failed = FAILING[case]["fails"]
    for rank in measured:
        assert rank[case]["off"] < 1e-10
        assert rank[case]["ranks_off"] == 0
    before, after = measured[1 - failed][case]["sizes"], measured[failed][case]["sizes"]
    assert before[:4] == [8, 8, 8, 8]
    assert before[4] == after[4] == after[1] < 8


@pytest.mark.parametrize("case", OPERATIONS)
def test_whichever_operation_runs_out_of_memory_the_weights_are_those_of_one_process(measured: tuple[dict, dict], case: str) -> None:
    for rank in measured:
        assert rank[case]["off"] < 1e-10
        assert rank[case]["ranks_off"] == 0
    assert measured[1][case]["sizes"][1] < 8


def test_statistics_of_batch_norm_stay_the_same_on_all_ranks(measured: tuple[dict, dict]) -> None:
    """The last micro-batch of rank 0 is computed again in two: its failed pass leaves no trace in the counter."""
    first, second = (rank["batch norm"] for rank in measured)
    # Rank 0's buffers are copied to rank 1 as each step begins; 13 samples are 2 micro-batches of at most 8, then 4 of at most 4. Of the
    # step that failed, one is kept, and the other one was taken again in two.
    assert first["sizes"] == [8, 4, 4, 4, 4]
    assert first["passes"] == 2 + 3 + 4 + 4 + 4
    assert second["sizes"] == [8, 8, 8, 8, 4]
    assert second["passes"] == 2 + 3 + 4 + 4 + 3


def test_a_measured_step_that_failed_on_one_rank_is_left_out(measured: tuple[dict, dict]) -> None:
    first, second = (rank["measured"]["noise"] for rank in measured)
    assert first == second
    assert first["inconsistent_steps"] == 1
    assert first["samples_seen"] == 5 * 24


def test_where_not_even_one_sample_fits_every_rank_ends_with_the_reason(tmp_path: Path) -> None:
    first, second = (rank["hopeless"] for rank in run(tmp_path, HOPELESS, "cases"))
    assert second["error"] == "NothingFitsError"
    assert first["error"] == "RankError"
    assert "one gave up, rank 1: one sample must fit in memory" in first["message"]
