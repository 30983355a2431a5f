"""A step on accumulated micro-batches is the full batch's, whatever the loss is a mean over."""

import copy
import functools
import math
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss

import rightbatch as rb
from rightbatch.errors import UsageError, WorkloadError
from rightbatch.records.plan import BatchPlan
from rightbatch.records.schedule import BatchSetting

TOLERANCE = 1e-10
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def plan_of(micro=4, accumulation=2, precision="fp32"):
    return BatchPlan(global_batch_size=micro * accumulation, micro_batch_size=micro, accumulation_steps=accumulation, precision=precision)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def token_net():
    """Scores of shape (batch, class, token), as cross_entropy takes them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 1)).double()


def batch_of(count, *, tokens=None, ignored=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count,) if tokens is None else (count, tokens)
    inputs = (
        torch.randn(count, 6, generator=generator).double()
        if tokens is None
        else torch.randn(count, 2, tokens, generator=generator).double()
    )
    target = torch.randint(0, 3, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = -100
    return inputs, target


def per_sample(output, target):
    return cross_entropy(output, target, reduction="none")


def counted(model, batch):
    output, target = model(batch[0]), batch[1]
    return cross_entropy(output, target), (target != -100).sum()


def own_masked_mean(output, target):
    valid = target != -100
    return (per_sample(output, target) * valid).sum() / valid.sum()


LOSSES = {
    "function": {"loss": cross_entropy},
    "module with weights": {"loss": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)},
    "partial with weights and smoothing": {"loss": functools.partial(cross_entropy, weight=CLASS_WEIGHTS, label_smoothing=0.1)},
    "nll": {"loss": lambda output, target: nll_loss(output.log_softmax(1), target), "loss_weight": lambda target: (target != -100).sum()},
    "own mean": {"loss": own_masked_mean, "loss_weight": lambda target: (target != -100).sum()},
    "sum": {"loss": nn.CrossEntropyLoss(reduction="sum"), "loss_weight": lambda target: (target != -100).sum()},
    "losses of tokens": {"loss": per_sample, "loss_weight": lambda target: (target != -100).sum()},
    "counted by a step": {"loss": None, "step": counted},
}


def full_loss(kind, model, batch):
    """The loss of the whole batch as torch defines it."""
    if kind in ("module with weights", "partial with weights and smoothing"):
        return LOSSES[kind]["loss"](model(batch[0]), batch[1])
    return cross_entropy(model(batch[0]), batch[1])


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def distance(a, b):
    return float((a - b).norm() / b.norm())


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2),
}


def test_norm_of_a_gradient_that_is_gone_is_refused_rather_than_another_one_given():
    model = net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), plan=plan_of(4), **LOSSES["function"])
    first = stepper(batch_of(4, seed=0))
    norm = float(first.grad_norm)

    second = stepper(batch_of(4, seed=1))

    assert float(second.grad_norm) != norm
    with pytest.raises(UsageError, match="before the next step"):
        first.grad_norm  # noqa: B018


def test_the_norm_of_sparse_gradients_is_that_of_dense_ones():
    norms = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=sparse), nn.Linear(4, 3)).double()
        stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, plan_of(2))
        outcome = stepper((torch.tensor([[1, 1, 2], [2, 3, 9], [1, 9, 9]]), torch.tensor([0, 1, 2])))
        norms.append(float(outcome.grad_norm))
    assert norms[0] == pytest.approx(norms[1], rel=TOLERANCE)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=3),
    micro=st.integers(1, 6),
    tokens=st.sampled_from([None, 5]),
    ignored=st.sampled_from([0.0, 0.4]),
    clip_norm=st.sampled_from([None, 0.05]),
)
def test_steps_of_changing_sizes_are_those_of_the_full_batches(kind, optimizer, sizes, micro, tokens, ignored, clip_norm):
    build = net if tokens is None else token_net
    accumulated, full = build(), build()
    optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in (accumulated, full)]
    averages = [
        torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        for model in (accumulated, full)
    ]
    stepper = rb.Stepper(accumulated, optimizers[0], plan=plan_of(micro), clip_norm=clip_norm, average=averages[0], **LOSSES[kind])
    for index, size in enumerate(sizes):
        batch = batch_of(size, tokens=tokens, ignored=ignored, seed=index)
        if not (batch[1] != -100).any():
            continue
        outcome = stepper(batch)
        full.zero_grad()
        loss = full_loss(kind, full, batch)
        loss.backward()
        assert distance(*(torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (accumulated, full))) < TOLERANCE or clip_norm
        norm = nn.utils.clip_grad_norm_(full.parameters(), math.inf if clip_norm is None else clip_norm)
        optimizers[1].step()
        averages[1].update_parameters(full)
        assert outcome.loss == pytest.approx(float(loss.detach()), rel=TOLERANCE)
        assert outcome.samples == size
        assert outcome.accumulation_steps == -(-size // micro)
        assert float(outcome.grad_norm) == pytest.approx(float(norm), rel=TOLERANCE)
    assert distance(weights_of(accumulated), weights_of(full)) < TOLERANCE
    assert distance(weights_of(averages[0]), weights_of(averages[1])) < TOLERANCE


def test_the_mean_of_means_is_another_gradient():
    """The test above can fail: what is usually written is off by far more than its tolerance."""
    batch = batch_of(12, tokens=5, ignored=0.4)
    naive, full = token_net(), token_net()
    for start in (0, 5, 10):
        (cross_entropy(naive(batch[0][start : start + 5]), batch[1][start : start + 5]) / 3).backward()
    cross_entropy(full(batch[0]), batch[1]).backward()
    assert distance(*(torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (naive, full))) > 1e-2


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("ignored", ["a whole micro-batch", "everything"])
def test_what_counts_nothing_adds_nothing(kind, ignored):
    model, full = token_net(), token_net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), plan=plan_of(4), **LOSSES[kind])
    inputs, target = batch_of(12, tokens=5, ignored=0.2)
    target[: 4 if ignored == "a whole micro-batch" else 12] = -100

    outcome = stepper((inputs, target))

    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    if ignored == "everything":
        assert torch.equal(gradient, torch.zeros_like(gradient))
        assert torch.equal(weights_of(model), weights_of(full))
        assert outcome.loss != outcome.loss
    else:
        loss = full_loss(kind, full, (inputs, target))
        loss.backward()
        assert distance(gradient, torch.cat([parameter.grad.flatten() for parameter in full.parameters()])) < TOLERANCE
        assert outcome.loss == pytest.approx(float(loss.detach()), rel=TOLERANCE)


def test_class_probabilities_count_one_each():
    inputs, _ = batch_of(10)
    probabilities = torch.softmax(torch.randn(10, 3, generator=torch.Generator().manual_seed(1)).double(), 1)
    model, full = net(), net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), plan_of(4))
    stepper((inputs, probabilities))
    cross_entropy(full(inputs), probabilities, weight=CLASS_WEIGHTS).backward()
    assert distance(model[0].weight.grad, full[0].weight.grad) < TOLERANCE


def test_an_infinity_in_one_micro_batch_discards_the_step():
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stepper = rb.Stepper(
        model, optimizer, lambda o, t: cross_entropy(o, t) * (1e38 if t.max() > 1 else 1.0), plan_of(4, precision="fp16"), clip_norm=1.0
    )
    before = weights_of(model).clone()
    scale = stepper.state_dict()["scaler"]["scale"]
    inputs, target = torch.randn(8, 6), torch.zeros(8, dtype=torch.int64)
    target[5] = 2
    stepper((inputs, target))
    assert torch.equal(weights_of(model), before)
    assert stepper.state_dict()["scaler"]["scale"] == scale / 2
    stepper((inputs, target * 0))
    assert not torch.equal(weights_of(model), before)
    assert stepper.state_dict()["scaler"]["scale"] == scale / 2


def test_half_precision_losses_of_many_tokens_stay_finite():
    """A sum over the window would be beyond float16."""

    def step(model, batch):
        loss = cross_entropy(model(batch[0]), batch[1])
        return loss.half(), 60_000

    model = nn.Linear(6, 3)
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), None, plan_of(4, precision="fp16"), step=step)
    outcome = stepper((torch.randn(8, 6), torch.randint(0, 3, (8,))))
    assert 0 < outcome.loss < 10
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


class Doubling:
    """Doubles size and rate after 16 samples."""

    def setting_at(self, samples_seen):
        late = samples_seen >= 16
        return BatchSetting(
            global_batch_size=16 if late else 8,
            lr_factor=2.0 if late else 1.0,
            beta_power=2.0 if late else 1.0,
            weight_decay_factor=0.5 if late else 1.0,
            clip_factor=3.0 if late else 1.0,
        )


def test_the_schedule_couples_rates_within_the_step_and_leaves_the_schedulers_own():
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.2, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([(g["lr"], g["betas"][0], g["weight_decay"]) for g in o.param_groups]))
    stepper = rb.Stepper(model, optimizer, cross_entropy, plan_of(4), schedule=Doubling(), scheduler=scheduler)

    lrs = [stepper(batch_of(size)).lr for size in (8, 8, 16, 16)]

    assert lrs == pytest.approx([0.1, 0.1, 0.2, 0.02])  # the scheduler lowers the rate after 24 samples, within the third step
    assert [step[1][0] for step in seen] == pytest.approx([0.01, 0.01, 0.02, 0.002])
    assert [step[0][1:] for step in seen] == [(0.9, 0.2)] * 2 + [(0.9**2, 0.1)] * 2
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.99)] * 2
    assert scheduler.last_epoch == 48 // 8
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)


def test_the_schedules_clip_factor_moves_the_largest_norm():
    model = net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=1.0), cross_entropy, plan_of(4), schedule=Doubling(), clip_norm=0.01)
    moved = []
    for size in (8, 8, 16):
        before = weights_of(model)
        stepper(batch_of(size))
        moved.append(float((weights_of(model) - before).norm()))
    assert moved == pytest.approx([0.01, 0.01, 2.0 * 3.0 * 0.01], rel=1e-3)


def test_a_tensor_rate_is_coupled_in_place_and_put_back_exactly():
    model = net()
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    stepper = rb.Stepper(model, optimizer, cross_entropy, plan_of(4), schedule=Doubling())
    for size in (8, 8, 16):
        stepper(batch_of(size))
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == float(torch.tensor(0.1))


def test_a_tensor_rate_that_groups_share_is_coupled_once_and_told_as_it_was_in_the_step():
    model = net()
    optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in model.parameters()], lr=torch.tensor(0.1))
    taken = []
    optimizer.register_step_pre_hook(lambda *_: taken.append([float(group["lr"]) for group in optimizer.param_groups]))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    stepper = rb.Stepper(model, optimizer, cross_entropy, plan_of(8), schedule=Doubling(), scheduler=scheduler)
    outcomes = [stepper(batch_of(8)) for _ in range(3)]
    assert taken == [pytest.approx([rate] * 4) for rate in (0.1, 0.1, 0.1)]
    assert [float(outcome.lr) for outcome in outcomes] == [rates[0] for rates in taken]


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (4, 4, 4, 4)])
def test_the_monitor_measures_accumulated_steps_and_halves_of_others(sizes):
    model = net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.0), cross_entropy, plan_of(4), noise_every=2)
    outcomes = [stepper(batch_of(size, seed=index)) for index, size in enumerate(sizes)]
    assert [outcome.noise_scale is not None for outcome in outcomes] == [True, False, True, False]
    assert stepper.monitor.stream.samples_seen == sum(sizes)
    assert stepper.monitor.stream.single_steps == 0
    assert sum(len(block.sizes) if hasattr(block, "sizes") else 1 for block in stepper.monitor.stream.blocks) == 2


def test_a_restored_stepper_goes_on_as_the_saved_one(tmp_path):
    def built():
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return model, optimizer, rb.Stepper(model, optimizer, cross_entropy, plan_of(4), scheduler=scheduler, noise_every=2)

    whole = built()
    for index in range(6):
        whole[2](batch_of(7, seed=index))
    first = built()
    for index in range(3):
        first[2](batch_of(7, seed=index))
    torch.save({"stepper": first[2].state_dict(), "model": first[0].state_dict(), "optimizer": first[1].state_dict()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    second = built()
    for part, name in zip(second, ("model", "optimizer", "stepper"), strict=True):
        part.load_state_dict(state[name])
    for index in range(3, 6):
        second[2](batch_of(7, seed=index))
    assert torch.equal(weights_of(second[0]), weights_of(whole[0]))
    assert second[2].state_dict() == whole[2].state_dict()
    assert second[2].samples_seen == 42


def test_a_state_of_other_parts_is_refused():
    model = net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, plan_of(4))
    with pytest.raises(UsageError, match=r"of the same parts; got version 1 with \['monitor'\] for \[\]"):
        stepper.load_state_dict(stepper.state_dict() | {"monitor": {}})


def test_losses_that_couple_samples_are_not_cut():
    model = net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, plan_of(4), couples_samples=True)
    stepper(batch_of(4))
    with pytest.raises(UsageError, match="must see the whole batch: 5 samples do not fit in a micro-batch of 4"):
        stepper(batch_of(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": None}, "either a loss or a step; got neither"),
        ({"loss": cross_entropy, "step": counted}, "either a loss or a step; got both"),
        ({"loss": None, "step": counted, "loss_weight": len}, "beside a step, which returns its count itself"),
        ({"loss": cross_entropy, "couples_samples": True, "noise_every": 5}, "couples samples it has one; got noise_every=5"),
        ({"loss": cross_entropy, "average": nn.Linear(1, 1)}, r"must have update_parameters\(model\), as AveragedModel has; got Linear"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    model = net()
    with pytest.raises(UsageError, match=message):
        rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), plan=plan_of(4), **arguments)


def test_a_scheduler_that_waits_for_a_metric_is_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="got ReduceLROnPlateau, which waits for a metric"):
        rb.Stepper(model, optimizer, cross_entropy, plan_of(4), scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def test_an_optimizer_that_computes_its_own_gradients_is_refused():
    model = net()
    with pytest.raises(UsageError, match="got LBFGS, which computes its own"):
        rb.Stepper(model, torch.optim.LBFGS(model.parameters()), cross_entropy, plan_of(4))


def test_an_empty_batch_is_refused():
    model = net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, plan_of(4))
    with pytest.raises(WorkloadError, match="must hold at least one sample; got none"):
        stepper((torch.zeros(0, 6).double(), torch.zeros(0, dtype=torch.int64)))


def test_dictionaries_of_tensors_strings_and_what_is_shared_are_cut_by_samples():
    Pair = namedtuple("Pair", ["x", "y"])
    seen = []

    def step(model, batch):
        seen.append((batch["names"], len(batch["pair"].x), len(batch["table"])))
        return per_sample(model(batch["pair"].x), batch["pair"].y)

    model, full = net(), net()
    inputs, target = batch_of(5)
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), None, plan_of(2), step=step)
    stepper({"pair": Pair(inputs, target), "names": list("abcde"), "table": torch.zeros(7), "flag": True})
    assert seen == [(["a"], 1, 7), (["b", "c"], 2, 7), (["d", "e"], 2, 7)]
    cross_entropy(full(inputs), target).backward()
    assert distance(model[0].weight.grad, full[0].weight.grad) < TOLERANCE


def test_double_precision_plans_train_in_double():
    model = net()
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, plan_of(4, precision="fp64"))
    inputs, target = batch_of(6)
    assert stepper((inputs.float(), target)).mean_loss.dtype == torch.float64


def test_batch_norm_sees_each_micro_batch():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    other = copy.deepcopy(model)
    stepper = rb.Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, plan_of(4))
    inputs, target = batch_of(8)
    stepper((inputs, target))
    for part in inputs.split(4):
        other(part)
    assert model[0].num_batches_tracked == 2
    assert torch.equal(model[0].running_mean, other[0].running_mean)
