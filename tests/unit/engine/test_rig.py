"""The rig builds fresh, equal models, places batches as the workload says, and tells how its loss reduces a batch."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cases import CPU, Residual, images, plain_cnn, rig_of, sgd, vectors
from fakes import DIMENSION, FakeDevice, planted_rig, planted_workload
from rightbatch.engine.provenance import environment
from rightbatch.engine.rig import Rig, build_rig, resolve_device
from rightbatch.errors import UsageError, WorkloadError
from rightbatch.workload.ingredients import Workload


def workload_of(**changes):
    ingredients = {"model": plain_cnn, "train": images(40), "loss": cross_entropy, "optimizer": sgd} | changes
    return Workload(**ingredients)


def weights(trainee):
    return torch.cat([p.detach().flatten() for p in trainee.model.parameters()])


def test_the_same_seed_gives_the_same_weights_each_time_and_another_seed_others():
    rig = rig_of(workload_of())
    first = weights(rig.new_trainee())
    torch.rand(3)
    assert torch.equal(first, weights(rig.new_trainee()))
    assert not torch.equal(first, weights(rig_of(workload_of(), seed=1).new_trainee()))


def test_a_module_given_as_model_is_copied_with_its_weights():
    model = plain_cnn()
    trainee = rig_of(workload_of(model=model)).new_trainee()
    assert trainee.model is not model
    assert torch.equal(weights(trainee), torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_a_new_trainee_is_in_training_mode_with_the_workloads_own_optimizer():
    trainee = rig_of(workload_of(model=plain_cnn().eval())).new_trainee()
    assert all(module.training for module in trainee.model.modules())
    assert isinstance(trainee.optimizer, torch.optim.SGD)
    assert trainee.scaler is None


def test_frozen_parameters_are_not_given_to_the_optimizer():
    model = plain_cnn()
    model[0].requires_grad_(requires_grad=False)
    trainee = rig_of(workload_of(model=model)).new_trainee()
    assert len(trainee.parameters) == len(list(model.parameters())) - 2
    assert sum(len(group["params"]) for group in trainee.optimizer.param_groups) == len(trainee.parameters)


def test_without_an_optimizer_an_adam_stands_in_and_no_rate_is_the_users():
    summary = rig_of(workload_of(optimizer=None)).describe()
    assert (summary.optimizer, summary.optimizer_given, summary.lr) == ("Adam", False, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": lambda: "net"}, r"must return a torch\.nn\.Module; it returned str"),
        (
            {"model": plain_cnn().requires_grad_(requires_grad=False)},
            "needs a parameter that requires a gradient; the model has none; is it frozen",
        ),
        ({"model": lambda: nn.LazyLinear(3)}, "must have their shapes before training; the model has lazy layers"),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}, "must be positive to be scaled; got 0; give the one"),
        ({"optimizer": list}, r"must build a torch\.optim\.Optimizer; it returned list"),
        ({"optimizer": torch.optim.LBFGS}, "must step with the gradients of one batch; LBFGS computes its own"),
        ({"loss": lambda output, target: 1.0}, r"loss must return a tensor; got float; return the loss itself, without \.item\(\)"),
    ],
)
def test_a_workload_that_does_not_hold_what_it_promises_is_refused(changes, message):
    with pytest.raises(WorkloadError, match=message):
        rig_of(workload_of(**changes)).describe()


def test_double_precision_reaches_weights_and_inputs_but_not_targets():
    rig = rig_of(workload_of(precision="fp64"))
    inputs, targets = rig.real_batch([0, 1])
    assert (inputs.dtype, targets.dtype) == (torch.float64, torch.int64)
    assert next(rig.new_trainee().model.parameters()).dtype == torch.float64


def test_channels_last_reaches_model_and_images():
    rig = rig_of(workload_of(channels_last=True))
    inputs, _ = rig.real_batch([0, 1])
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert rig.new_trainee().model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_typical_batch_may_be_larger_than_the_dataset():
    rig = rig_of(workload_of(train=images(5)))
    inputs, targets = rig.typical_batch(12)
    assert inputs.shape == (12, 2, 8, 8)
    assert torch.equal(inputs[:5], inputs[5:10])
    assert len(targets) == 12


def test_a_real_batch_holds_the_samples_asked_for():
    rig = rig_of(workload_of())
    inputs, targets = rig.real_batch([7, 3])
    assert torch.equal(inputs[1], rig.workload.train[3][0])
    assert targets.tolist() == [7 % 3, 0]


def coupled_loss(output, target):
    similarity = output @ output.T
    return cross_entropy(similarity, torch.arange(len(output)))


def random_step(model, batch):
    """Of every batch another part counts, as where tokens are masked."""
    counted = torch.rand(len(batch[1])) < 0.5
    counted[0] = True
    return cross_entropy(model(batch[0])[counted], batch[1][counted]), int(counted.sum())


@pytest.mark.parametrize(
    ("ingredients", "reduction", "couples"),
    [
        ({"loss": cross_entropy}, "mean", False),
        ({"loss": lambda o, t: cross_entropy(o, t, reduction="sum")}, "sum", False),
        ({"loss": lambda o, t: cross_entropy(o, t, reduction="none")}, "per_sample", False),
        ({"loss": None, "step": lambda m, b: (cross_entropy(m(b[0]), b[1]), len(b[1]))}, "counted", False),
        ({"loss": coupled_loss}, "mean", True),
        ({"loss": None, "step": lambda m, b: (coupled_loss(m(b[0]), b[1]), len(b[1]))}, "counted", True),
        ({"loss": None, "step": random_step}, "counted", False),
    ],
    ids=["mean", "sum", "per sample", "counted", "coupled", "counted and coupled", "counted and random"],
)
def test_how_the_loss_reduces_a_batch_is_found_out(ingredients, reduction, couples):
    rig = rig_of(workload_of(**ingredients))
    summary = rig.describe()
    assert (summary.loss_reduction, summary.couples_samples) == (reduction, couples)
    assert rig.loss_is_sum == (reduction == "sum")


def test_describing_runs_no_more_than_four_samples_at_once_unless_the_loss_looks_like_a_sum():
    device = FakeDevice()
    planted_rig(device, planted_workload(device, torch.zeros(100, DIMENSION)))().describe()
    assert device.largest_run == 4


class Scaled(nn.Module):
    """A loss that learns its temperature."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, output, target):
        return cross_entropy(output * self.log_scale.exp(), target)


def test_a_summary_knows_what_the_optimizer_is_not_given_and_the_rates_of_all_groups():
    def optimizer(parameters):
        first, second, *others = parameters
        return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.01}, {"params": others}], lr=0.1)

    summary = rig_of(workload_of(loss=Scaled(), optimizer=optimizer)).describe()

    assert (summary.loss_parameter_count, summary.lr, summary.further_lrs) == (1, 0.1, (0.01,))


def test_samples_that_do_not_stack_are_refused_with_what_to_do():
    ragged = [(torch.zeros(3), 0), (torch.zeros(4), 0)] * 8
    with pytest.raises(WorkloadError, match=r"must stack to a batch; got stack expects each tensor to be equal size.*give collate_fn="):
        rig_of(workload_of(train=ragged)).describe()


def test_a_rig_that_was_never_asked_to_describe_itself_knows_a_sum_too():
    rig = rig_of(workload_of(loss=lambda o, t: cross_entropy(o, t, reduction="sum")))
    expected = weights(rig_of(workload_of()).new_trainee())
    trainee = rig.new_trainee()
    assert trainee.objective.loss_is_sum
    assert torch.equal(weights(trainee), expected)


def test_a_summary_says_what_the_workload_is():
    model = Residual()
    summary = rig_of(workload_of(model=model, lr_batch_size=64, valid=images(10), name="mine")).describe()
    assert summary.name == "mine"
    assert (summary.train_size, summary.valid_size) == (40, 10)
    assert summary.parameter_count == summary.trainable_parameter_count == sum(p.numel() for p in model.parameters())
    assert summary.batch_norm
    assert (summary.optimizer, summary.optimizer_given, summary.momentum, summary.lr) == ("SGD", True, 0.9, 0.1)
    assert (summary.lr_batch_size, summary.betas, summary.precision) == (64, None, "fp32")


def test_a_single_sample_can_be_described():
    assert rig_of(workload_of()).describe(1).loss_reduction == "mean"
    assert rig_of(workload_of(train=images(1))).describe().train_size == 1


@pytest.mark.parametrize("name", ["cuda:99", "warp", "meta:0:1"])
def test_a_device_that_is_not_here_is_a_usage_error(name):
    with pytest.raises(UsageError, match=rf"must be usable here; got '{name}' .*try --device cpu"):
        resolve_device(name)


def test_building_a_rig_seeds_before_it_loads_and_replaces_the_precision():
    def load():
        return Workload(model=nn.Sequential(nn.Linear(6, 3)), train=vectors(8), loss=cross_entropy)

    rigs = [build_rig(load, device="cpu", precision="fp64", threads=torch.get_num_threads(), seed=5) for _ in range(2)]
    assert rigs[0].workload.precision == "fp64"
    assert torch.equal(weights(rigs[0].new_trainee()), weights(rigs[1].new_trainee()))


def test_the_environment_names_the_device_the_versions_and_the_switches():
    rig: Rig = rig_of(workload_of(precision="bf16"), seed=4)
    found = environment(rig, "in-process")
    assert (found.device, found.precision, found.isolation, found.seed) == (str(CPU), "bf16", "in-process", 4)
    assert dict(found.versions)["torch"] == torch.__version__
    assert dict(found.flags)["deterministic algorithms"] == "False"
    assert found.device_name
    assert found.device_total_bytes > 0
    assert found.threads == torch.get_num_threads()
