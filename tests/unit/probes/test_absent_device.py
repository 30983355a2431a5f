"""Recordings for a CUDA device that is not here: without memory where that is exact, on the CPU with the reason where it is not."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cases import CLASSES, Residual, images, plain_cnn, rig_of
from rightbatch.fits.memory import traced_peak_bytes
from rightbatch.probes import absent_device
from rightbatch.probes.absent_device import record, record_without_memory
from rightbatch.probes.memory import trace
from rightbatch.records.measurements import AllocationKind
from rightbatch.workload.ingredients import Workload

PIXELS = 2 * 8 * 8


def workload(model, **options):
    options = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)} | options
    return Workload(model=model, train=images(64), loss=cross_entropy, **options)


def flat(*layers):
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32), *layers, nn.Linear(32, CLASSES))


def operations(recorded):
    return {recorded.allocations.operations[index] for index in recorded.allocations.operation}


@pytest.fixture
def without_onednn():
    with absent_device._without_onednn():
        yield


@pytest.mark.parametrize("model", [plain_cnn, Residual, flat(nn.ReLU())], ids=["plain", "batch norm", "linear"])
def test_where_tensors_without_data_tell_the_truth_they_are_recorded_and_give_the_peaks_of_real_ones(model, without_onednn):
    recorded = record_without_memory(rig_of(workload(model)))
    real = trace(rig_of(workload(model)))

    assert (recorded.recorded_on, recorded.consistent, recorded.remark) == ("meta", True, "")
    assert [traced_peak_bytes(recorded, size) for size in (1, 7, 100, 4096)] == [
        traced_peak_bytes(real, size) for size in (1, 7, 100, 4096)
    ]


class ReadsItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(PIXELS, CLASSES)

    def forward(self, x):
        return self.head(x.flatten(1)) * float(x.mean().item() > -100)


class DoesLess(nn.Module):
    """Takes steps with real data that it leaves out without."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(PIXELS, CLASSES)

    def forward(self, x):
        hidden = x.flatten(1)
        if hidden.device.type != "meta":
            hidden = hidden.clone() * 1.0
        return self.head(hidden)


class OtherOperation(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(PIXELS, CLASSES)

    def forward(self, x):
        hidden = x.flatten(1)
        return self.head(hidden.sigmoid() if hidden.device.type == "meta" else hidden.tanh())


class OtherSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(PIXELS, CLASSES)

    def forward(self, x):
        hidden = x.flatten(1)
        spare = torch.zeros(len(x), 4 if hidden.device.type == "meta" else 8, device=hidden.device)
        return self.head(hidden) + spare.sum()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ReadsItsInput, r"\w+ on meta tensors"),
        (DoesLess, r"\d+ allocations instead of \d+"),
        (OtherOperation, r"aten\.sigmoid stands for aten\.tanh"),
        (OtherSize, r"aten\.zeros differs"),
    ],
)
def test_where_they_do_not_real_tensors_are_recorded_and_the_reason_is_said(model, reason, without_onednn):
    recorded = record_without_memory(rig_of(workload(model)))

    assert recorded.recorded_on == "cpu"
    assert recorded.consistent
    assert re.fullmatch(rf"Recorded on CPU tensors, because a recording without memory differs: {reason}\.", recorded.remark)
    assert traced_peak_bytes(recorded, 100) == traced_peak_bytes(trace(rig_of(workload(model))), 100)


def masks(recorded):
    """Bytes a sample of what dropout keeps."""
    table = recorded.allocations
    dropout = {index for index, name in enumerate(table.operations) if "dropout" in name or "bernoulli" in name}
    return sorted(table.per_sample_bytes[row] for row, operation in enumerate(table.operation) if operation in dropout)


def test_dropout_keeps_a_boolean_mask_as_its_kernel_on_cuda_does():
    model = flat(nn.Dropout(0.5))
    recorded, on_the_cpu = record(rig_of(workload(model))), trace(rig_of(workload(model)))

    assert "aten.native_dropout" in operations(recorded)
    assert "aten.native_dropout" not in operations(on_the_cpu)
    assert masks(recorded) == [32, 32, 128, 128, 128, 128]  # 32 units in two steps: a mask of bytes, a result, a gradient


@pytest.mark.parametrize("layer", [nn.Dropout(0.5, inplace=True), nn.Dropout(0.0), nn.Dropout(1.0)], ids=["in place", "none", "all"])
def test_dropout_that_cuda_does_not_fuse_is_left_as_it_is(layer):
    assert "aten.native_dropout" not in operations(record(rig_of(workload(flat(layer)))))


def test_dropout_in_evaluation_mode_or_without_gradients_is_left_as_it_is():
    x = torch.ones(4, requires_grad=True)
    with absent_device._FusedDropout():
        assert nn.functional.dropout(x, 0.5, training=False) is x
        with torch.no_grad():
            assert nn.functional.dropout(x.detach(), 0.5).grad_fn is None
        fused = nn.functional.dropout(x, 0.5)
    assert type(fused.grad_fn).__name__ == "NativeDropoutBackward0"
    assert set(fused.tolist()) <= {0.0, 2.0}


def groups_of(optimizer, monkeypatch):
    """Param groups of the optimizer that is recorded."""
    seen = []
    monkeypatch.setattr(absent_device, "record_without_memory", lambda rig: seen.append(rig) or trace(rig))
    record(rig_of(workload(flat(nn.ReLU()), optimizer=optimizer)))
    return seen[0].new_trainee(compiled=False).optimizer


@pytest.mark.parametrize(
    ("optimizer", "foreach"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), True),
        (lambda params: torch.optim.SGD(params, lr=0.1, foreach=False), False),
        (lambda params: torch.optim.Adam(params, fused=True), None),
        (None, True),
    ],
    ids=["open", "user says no", "fused", "none given"],
)
def test_parameters_are_updated_at_once_where_the_user_left_it_open(optimizer, foreach, monkeypatch):
    built = groups_of(optimizer, monkeypatch)
    assert [group["foreach"] for group in built.param_groups] == [foreach]


def test_an_optimizer_of_ones_own_is_recorded_without_a_setting_that_it_does_not_know(monkeypatch):
    class Plain(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.1 * parameter.grad)

    assert "foreach" not in groups_of(Plain, monkeypatch).param_groups[0]


def test_updating_at_once_is_seen_in_the_recording():
    layers = [nn.Linear(32, 32) for _ in range(8)]
    decaying = workload(flat(*layers), optimizer=lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1))
    at_once, one_by_one = record(rig_of(decaying)), trace(rig_of(decaying))

    assert any(name.startswith("aten._foreach") for name in operations(at_once))
    assert not any(name.startswith("aten._foreach") for name in operations(one_by_one))
    copies = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    assert traced_peak_bytes(at_once, 1) - traced_peak_bytes(one_by_one, 1) >= copies  # every decayed gradient lives until all are applied


class Notes(nn.Module):
    """Notes whether oneDNN takes part while it trains."""

    def __init__(self, seen):
        super().__init__()
        self._note = seen.append

    def forward(self, x):
        if self.training:
            self._note(torch.backends.mkldnn.enabled)
        return x


@pytest.mark.parametrize("raises", [False, True])
def test_onednn_takes_no_part_and_is_put_back_whatever_happens(raises, monkeypatch):
    seen = []
    rig = rig_of(workload(flat(Notes(seen))))
    if raises:
        monkeypatch.setattr(absent_device, "trace", lambda rig: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record(rig)
    else:
        record(rig)
    assert seen
    assert not any(seen)
    assert torch.backends.mkldnn.enabled


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(16, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x.flatten(2).reshape(len(x), 8, 16))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(PIXELS, CLASSES)

    def forward(self, x):
        hidden = x.flatten(2).reshape(len(x), 1, 8, 16)
        return self.head(nn.functional.scaled_dot_product_attention(hidden, hidden, hidden).flatten(1))


@pytest.mark.parametrize(
    ("model", "precision", "remark"),
    [
        (plain_cnn, "fp32", ""),
        (Recurrent, "fp32", "CUDA runs recurrent layers in kernels of its own, whose workspaces are not known here."),
        (Attention, "fp32", "CUDA runs attention in kernels of its own, whose workspaces are not known here."),
        (plain_cnn, "bf16", "CUDA's autocast keeps more operations in single precision than the CPU's, which was recorded."),
    ],
)
def test_what_the_recording_cannot_know_of_cuda_is_said(model, precision, remark):
    recorded = record(rig_of(workload(model, precision=precision)))

    assert re.findall(r"CUDA.*?\.(?= |$)", recorded.remark) == ([remark] if remark else [])


def test_a_sum_stays_a_sum_in_the_recording():
    summed = replace(workload(plain_cnn), loss=lambda output, target: cross_entropy(output, target, reduction="sum"))
    rig = rig_of(summed)
    assert rig.loss_is_sum
    assert record(rig).recorded_on == "meta"


def test_everything_that_is_held_has_its_kind_in_a_recording_without_memory():
    recorded = record(rig_of(workload(Residual, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))))
    parameters = sum(p.nbytes for p in Residual().parameters())

    assert recorded.parameter_bytes == recorded.gradient_bytes == recorded.optimizer_state_bytes == parameters
    assert {AllocationKind.PARAMETER, AllocationKind.ACTIVATION, AllocationKind.GRADIENT} <= set(recorded.allocations.kind)
    assert recorded.input_bytes_per_sample == 4 * PIXELS + 8


@pytest.mark.parametrize("given", ["the model", "a function that always gives it"])
def test_the_users_model_keeps_its_weights(given):
    model = Residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recorded = record(rig_of(workload(model if given == "the model" else lambda: model)))

    assert recorded.recorded_on == "meta"
    assert {name: value.device.type for name, value in model.state_dict().items()} == dict.fromkeys(before, "cpu")
    if given == "the model":
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_weights_and_frozen_ones_stay_so_without_data():
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES))
    model[3].weight = model[2].weight
    model[1].weight.requires_grad_(requires_grad=False)
    recorded, real = record(rig_of(workload(model))), trace(rig_of(workload(model)))

    assert recorded.recorded_on == "meta"
    assert (recorded.parameter_bytes, recorded.gradient_bytes) == (real.parameter_bytes, real.gradient_bytes)
    assert recorded.gradient_bytes < recorded.parameter_bytes
