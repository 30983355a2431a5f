"""The monitor's numbers are those of per-sample gradients, and it leaves the training alone."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import cross_entropy

import rightbatch as rb
from oracles.oracle_gradients import per_sample_gradients
from oracles.oracle_noise import ragged_means, step_trace_and_sq_norm
from rightbatch.errors import UsageError
from rightbatch.records.estimates import Status

TOLERANCE = 1e-10


def cnn():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()


def samples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 6, 6, generator=generator).double(), torch.randint(0, 4, (count,), generator=generator)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def accumulate(monitor, model, x, y, sizes, *, factors=None, say_weights=False, scaler=None):
    """Backward over micro-batches of ``sizes``, each mean loss multiplied with its factor."""
    start = 0
    for size, factor in zip(sizes, factors or [1.0] * len(sizes), strict=True):
        with monitor.micro_batch(size, **({"weight": factor} if say_weights else {})):
            loss = factor * cross_entropy(model(x[start : start + size]), y[start : start + size])
            (loss if scaler is None else scaler.scale(loss)).backward()
        start += size


def train(monitor, model, optimizer, steps, *, sizes=(4, 4, 4), seed=0, set_to_none=True):
    for step in range(steps):
        x, y = samples(sum(sizes), seed + step)
        accumulate(monitor, model, x, y, sizes)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def only_step(monitor):
    """S and G of the one measured step, all layers together."""
    (block,) = monitor.stream.blocks
    assert block.steps == 1
    return sum(block.trace_sums), sum(block.sq_norm_sums)


def expected_step(model, x, y, sizes, weights, dataset_size=math.inf):
    rows = per_sample_gradients(model, cross_entropy, list(zip(x, y, strict=True))).numpy()
    model.zero_grad()
    return step_trace_and_sq_norm(ragged_means(rows, sizes), sizes, weights, dataset_size)


@pytest.mark.parametrize(
    ("sizes", "factors", "dataset_size"),
    [
        ((4, 4, 4), (1.0, 1.0, 1.0), None),
        ((1,) * 9, (1.0,) * 9, 50),
        ((5, 3, 1), (1.0, 1.0, 1.0), None),
        ((5, 3, 1), (5.0, 3.0, 1.0), 40),
    ],
    ids=["equal", "one sample each, small population", "unequal means", "sums over samples"],
)
def test_a_step_equals_per_sample_gradients(sizes, factors, dataset_size):
    model = cnn()
    optimizer = sgd(model)
    x, y = samples(sum(sizes))
    expected = expected_step(model, x, y, sizes, factors, dataset_size or math.inf)
    monitor = rb.NoiseMonitor(model, optimizer, dataset_size=dataset_size)

    accumulate(monitor, model, x, y, sizes, factors=factors, say_weights=True)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()

    assert only_step(monitor) == pytest.approx(expected, rel=TOLERANCE)


class Modulus(nn.Module):
    """The moduli of complex scores, of a complex weight or of its two real parts."""

    def __init__(self, weight, *, is_complex):
        super().__init__()
        parts = [weight] if is_complex else [weight.real, weight.imag]
        self.parts = nn.ParameterList([nn.Parameter(part.clone()) for part in parts])

    def forward(self, x):
        weight = self.parts[0] if len(self.parts) == 1 else torch.complex(*self.parts)
        return (x.flatten(1).to(weight.dtype) @ weight).abs()


def test_a_complex_parameter_counts_as_its_two_real_parts():
    weight = torch.randn(36, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    found = []
    for is_complex in (True, False):
        model = Modulus(weight, is_complex=is_complex)
        optimizer = sgd(model)
        monitor = rb.NoiseMonitor(model, optimizer, every=1)
        train(monitor, model, optimizer, 1)
        found.append(only_step(monitor))
    assert found[0] == pytest.approx(found[1], rel=TOLERANCE)


def test_a_constant_factor_on_the_loss_drops_out_of_the_noise_scale():
    def value(factor):
        model = cnn()
        optimizer = sgd(model)
        monitor = rb.NoiseMonitor(model, optimizer)
        accumulate(monitor, model, *samples(12), (4, 4, 4), factors=[factor] * 3)
        optimizer.step()
        return monitor.noise_scale.value

    assert value(1 / 3) == pytest.approx(value(1.0), rel=TOLERANCE)


@pytest.mark.parametrize("size", [8, 7])
def test_the_parts_of_a_measured_step_are_its_halves_and_of_others_the_whole(size):
    model = cnn()
    optimizer = sgd(model)
    x, y = samples(size)
    halves = ((size + 1) // 2, size // 2)
    expected = expected_step(model, x, y, halves, halves)
    monitor = rb.NoiseMonitor(model, optimizer, every=2)
    seen = []
    for _ in range(2):
        for share, x_part, y_part in monitor.parts(x, y):
            (share * cross_entropy(model(x_part), y_part)).backward()
            seen.append((share, len(x_part)))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()

    assert seen == [(halves[0] / size, halves[0]), (halves[1] / size, halves[1]), (1.0, size)]
    trace, sq_norm = only_step(monitor)
    assert trace / sq_norm == pytest.approx(expected[0] / expected[1], rel=TOLERANCE)


def test_training_goes_on_as_if_the_monitor_were_not_there():
    class Nothing:
        def micro_batch(self, _size):
            return io.BytesIO()

    watched, plain = cnn(), cnn()
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (watched, plain)]
    train(rb.NoiseMonitor(watched, optimizers[0], every=2), watched, optimizers[0], 5)
    train(Nothing(), plain, optimizers[1], 5)

    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))


def test_one_step_in_so_many_is_measured_and_all_samples_are_counted():
    model = cnn()
    optimizer = sgd(model)
    monitor = rb.NoiseMonitor(model, optimizer, every=3)
    train(monitor, model, optimizer, 7)

    assert [(block.steps, block.samples, block.samples_seen) for block in monitor.stream.blocks] == [(1, 12, 12), (1, 12, 48), (1, 12, 84)]
    assert monitor.noise_scale.pilot_samples == 84


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_layers_are_named_as_in_the_model_and_their_ratio_is_the_whole():
    model = cnn()
    optimizer = sgd(model, lr=0.0)
    monitor = rb.NoiseMonitor(torch.compile(model), optimizer, every=1)
    for step in range(40):
        x, _ = samples(12, step)
        accumulate(monitor, model, x, torch.zeros(12, dtype=torch.long), (4, 4, 4))
        optimizer.step()
        optimizer.zero_grad()
    layers, whole = monitor.by_layer(), monitor.noise_scale

    assert list(layers) == ["0", "3"]
    assert all(estimate.low < estimate.value < estimate.high for estimate in layers.values())
    assert min(layer.value for layer in layers.values()) < whole.value < max(layer.value for layer in layers.values())


def test_a_layer_without_gradient_says_so_and_changes_nothing():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = cnn(), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    def measured(model):
        optimizer = sgd(model)
        monitor = rb.NoiseMonitor(model, optimizer, every=1)
        train(monitor, model, optimizer, 9)
        return monitor

    partly = measured(Partly())

    for mine, alone in zip(partly.stream.blocks, measured(cnn()).stream.blocks, strict=True):
        assert mine.trace_sums == pytest.approx((*alone.trace_sums, 0.0), rel=TOLERANCE)
        assert mine.sq_norm_sums == pytest.approx((*alone.sq_norm_sums, 0.0), rel=TOLERANCE)
    assert partly.by_layer()["unused"].status is Status.NO_GRADIENT


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_scale_of_mixed_precision_drops_out(set_to_none):
    def measured(scaler):
        model = cnn()
        optimizer = sgd(model, lr=0.01)
        monitor = rb.NoiseMonitor(model, optimizer, every=1, scaler=scaler)
        for step in range(6):
            accumulate(monitor, model, *samples(12, step), (4, 4, 4), scaler=scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=set_to_none)
        return monitor.stream

    scaled, plain = measured(GradScaler("cpu", init_scale=1024.0, growth_interval=2)), measured(None)

    for mine, expected in zip(scaled.blocks, plain.blocks, strict=True):
        assert mine.trace_sums == pytest.approx(expected.trace_sums, rel=1e-6)  # the weights agree to single precision: the scaler's
        assert mine.sq_norm_sums == pytest.approx(expected.sq_norm_sums, rel=1e-6)


@pytest.mark.parametrize(("set_to_none", "dropped", "non_finite", "steps"), [(True, 1, 0, 4), (False, 0, 1, 3)])
def test_a_step_with_an_infinity_is_left_out(set_to_none, dropped, non_finite, steps):
    """With zeroed instead of dropped gradients the step after it is lost too: it cannot be told from the one that was skipped."""
    model = cnn()
    optimizer = sgd(model)
    scaler = GradScaler("cpu", init_scale=4.0)
    monitor = rb.NoiseMonitor(model, optimizer, every=1, scaler=scaler)
    for step in range(5):
        factors = [1.0, math.inf if step == 2 else 1.0, 1.0]
        accumulate(monitor, model, *samples(12, step), (4, 4, 4), factors=factors, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)
    stream = monitor.stream

    assert (stream.dropped_steps, stream.non_finite_steps, sum(block.steps for block in stream.blocks)) == (dropped, non_finite, steps)
    assert np.isfinite([block.trace_sums for block in stream.blocks]).all()


def test_only_infinities_are_non_finite():
    model = cnn()
    optimizer = sgd(model, lr=0.0)
    monitor = rb.NoiseMonitor(model, optimizer, every=1)
    for step in range(3):
        accumulate(monitor, model, *samples(8, step), (4, 4), factors=[math.inf, 1.0])
        optimizer.step()
        optimizer.zero_grad()

    assert monitor.noise_scale.status is Status.NON_FINITE
    assert "not finite" in monitor.noise_scale.remarks[0]


def test_a_step_that_the_user_drops_leaves_no_trace():
    model = cnn()
    optimizer = sgd(model)
    x, y = samples(12)
    expected = expected_step(model, x, y, (4, 4, 4), (1, 1, 1))
    monitor = rb.NoiseMonitor(model, optimizer)
    accumulate(monitor, model, *samples(8, 7), (4, 4))
    optimizer.zero_grad()
    accumulate(monitor, model, x, y, (4, 4, 4))
    optimizer.step()

    assert only_step(monitor) == pytest.approx(expected, rel=TOLERANCE)
    assert monitor.stream.dropped_steps == 1


def test_gradients_that_were_not_cleared_or_changed_midway_leave_the_step_out():
    model = cnn()
    optimizer = sgd(model)
    monitor = rb.NoiseMonitor(model, optimizer, every=1)
    cross_entropy(model(samples(4)[0]), samples(4)[1]).backward()
    train(monitor, model, optimizer, 1)
    accumulate(monitor, model, *samples(4, 1), (4,))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    train(monitor, model, optimizer, 1)

    assert monitor.stream.inconsistent_steps == 2
    assert monitor.stream.blocks == ()
    assert "clear gradients" in monitor.noise_scale.remarks[0]


def test_zeroed_gradients_are_as_good_as_dropped_ones():
    streams = []
    for set_to_none in (True, False):
        model = cnn()
        optimizer = sgd(model)
        monitor = rb.NoiseMonitor(model, optimizer, every=1)
        train(monitor, model, optimizer, 4, set_to_none=set_to_none)
        streams.append(monitor.stream)

    assert streams[0] == streams[1]


def test_steps_of_one_micro_batch_say_nothing_and_the_remark_says_what_to_do():
    model = cnn()
    optimizer = sgd(model)
    monitor = rb.NoiseMonitor(model, optimizer, every=1)
    train(monitor, model, optimizer, 2, sizes=(4,))
    scale = monitor.noise_scale

    assert (scale.status, scale.value, monitor.stream.single_steps) == (Status.INDETERMINATE, None, 2)
    assert "NoiseMonitor.parts" in scale.remarks[0]


def test_batch_normalisation_is_said():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 4)).double()
    optimizer = sgd(model)
    monitor = rb.NoiseMonitor(model, optimizer, every=1)
    train(monitor, model, optimizer, 1)

    assert any("normalisation over 4 samples" in remark for remark in monitor.noise_scale.remarks)


def raise_(error, *_):
    raise error


def hooks_of(model, optimizer):
    return [p._backward_hooks for p in model.parameters() if p._backward_hooks] + list(optimizer._optimizer_step_pre_hooks.values())


def test_the_model_carries_no_hook_between_micro_batches_and_nothing_is_left_after_closing():
    model = cnn()
    optimizer = sgd(model)
    with rb.NoiseMonitor(model, optimizer, every=1) as monitor:
        accumulate(monitor, model, *samples(8), (4, 4))
        between = hooks_of(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    train(monitor, model, optimizer, 1)

    assert len(between) == 1
    assert hooks_of(model, optimizer) == []
    assert sum(block.steps for block in monitor.stream.blocks) == 1


def test_an_error_inside_a_block_leaves_no_hook_and_costs_that_step_only():
    model = cnn()
    optimizer = sgd(model)
    monitor = rb.NoiseMonitor(model, optimizer, every=1)
    with pytest.raises(TypeError, match="no loss"):
        accumulate(monitor, lambda x: raise_(TypeError("no loss")), *samples(4), (4,))
    with pytest.raises(TypeError, match="after backward"), monitor.micro_batch(4):
        raise_(TypeError("after backward"), cross_entropy(model(samples(4)[0]), samples(4)[1]).backward())
    assert len(hooks_of(model, optimizer)) == 1
    train(monitor, model, optimizer, 2)

    assert (monitor.stream.inconsistent_steps, sum(block.steps for block in monitor.stream.blocks)) == (1, 1)


def test_a_saved_state_goes_on_as_if_never_stopped():
    straight, stopped = cnn(), cnn()
    optimizers = [sgd(straight), sgd(stopped)]
    monitor = rb.NoiseMonitor(straight, optimizers[0], every=2)
    train(monitor, straight, optimizers[0], 150)

    first = rb.NoiseMonitor(stopped, optimizers[1], every=2)
    train(first, stopped, optimizers[1], 131)
    first.close()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = rb.NoiseMonitor(stopped, optimizers[1], every=2)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, stopped, optimizers[1], 19, seed=131)

    assert second.stream == monitor.stream
    assert second.noise_scale == monitor.noise_scale


def test_a_state_of_another_model_is_refused():
    model, other = cnn(), nn.Linear(2, 2)
    state = rb.NoiseMonitor(other, sgd(other)).state_dict()
    with pytest.raises(UsageError, match="same layers; got version 1 and 2 layers for 2"):
        rb.NoiseMonitor(model, sgd(model)).load_state_dict(state)


def test_a_long_run_is_kept_in_a_bounded_number_of_blocks():
    model = nn.Linear(2, 2).double()
    optimizer = sgd(model)
    monitor = rb.NoiseMonitor(model, optimizer, every=1)
    for _ in range(200):
        for _ in range(2):
            with monitor.micro_batch(1):
                model(torch.ones(1, 2).double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    blocks = monitor.stream.blocks

    assert [block.steps for block in blocks] == [4] * 50
    assert blocks[-1].samples_seen == 400


def test_the_planted_noise_is_recovered():
    """The loss |w - x|**2 / 2 has gradients w - x: their covariance is the data's, and the step size 0 leaves them so."""
    generator = torch.Generator().manual_seed(11)
    planted, dimension, steps = 60.0, 24, 400
    model = nn.Linear(dimension, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = sgd(model, lr=0.0)
    monitor = rb.NoiseMonitor(model, optimizer, every=1)
    values = []
    for _ in range(steps):
        for _ in range(4):
            x = torch.randn(8, dimension, generator=generator).double() * math.sqrt(planted / dimension)
            x[:, 0] += 1.0
            with monitor.micro_batch(8):
                ((model.weight - x).square().sum(1) / 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    values = np.array([[block.trace_sums[0], block.sq_norm_sums[0]] for block in monitor.stream.blocks]) / 8
    mean, error = values[:-1].mean(0), values[:-1].std(0, ddof=1) / math.sqrt(len(values) - 1)

    assert (np.abs(mean - (planted, 1.0)) < 4 * error).all()
    assert 4 * error[1] < planted / 32  # a mean square norm taken for |G|**2 would be off by S / b
    assert monitor.noise_scale.status is Status.OK


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda m, o, monitor: o.step(), "each optimizer step must follow a micro-batch"),
        (lambda m, o, monitor: monitor.micro_batch(0).__enter__(), "samples >= 1 and a finite weight > 0; got 0 and 1.0"),
        (lambda m, o, monitor: monitor.micro_batch(1, weight=math.inf).__enter__(), "finite weight > 0; got 1 and inf"),
        (lambda m, o, monitor: list(monitor.parts(torch.ones(3), torch.ones(2))), r"same number of rows, at least 1; got \[3, 2\]"),
        (lambda m, o, monitor: list(monitor.parts(*samples(4))), "must hold the backward pass"),
        (lambda m, o, monitor: rb.NoiseMonitor(m, sgd(cnn())), "must update parameters of the model"),
        (lambda m, o, monitor: rb.NoiseMonitor(m, o, every=0), "must be at least 1; got 0 and None"),
    ],
    ids=["unannounced step", "no samples", "infinite weight", "unequal tensors", "no backward", "foreign optimizer", "every 0"],
)
def test_misuse_is_refused_with_what_to_do(misuse, message):
    model = cnn()
    optimizer = sgd(model)
    with pytest.raises(UsageError, match=message):
        misuse(model, optimizer, rb.NoiseMonitor(model, optimizer))


def test_two_backward_passes_in_one_block_are_refused():
    model = cnn()
    monitor = rb.NoiseMonitor(model, sgd(model))
    loss = cross_entropy(model(samples(4)[0]), samples(4)[1])
    with pytest.raises(UsageError, match=r"one backward pass; 3\.\w+ received two gradients"), monitor.micro_batch(4):
        _ = loss.backward(retain_graph=True), loss.backward()


def test_a_sparse_gradient_is_refused_by_name():
    model = nn.Embedding(4, 2, sparse=True)
    monitor = rb.NoiseMonitor(model, sgd(model))
    with pytest.raises(UsageError, match="that of weight is sparse; build its layer with sparse=False"), monitor.micro_batch(2):
        model(torch.tensor([1, 2])).sum().backward()
