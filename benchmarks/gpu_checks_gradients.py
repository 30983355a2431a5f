"""GPU checks of gradients: the noise measured there and on the CPU, and half precision with a scaler."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from gpu_checks_context import CheckResult, Context
from gpu_checks_nets import learnable
from rightbatch.engine.gradients import GradientBlocks, flat_gradient
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import Trainee, backward_mean, clear_gradients, train_step

_NORM_ERROR = 1e-6
_HALF_ERROR = 0.05
_HALF_STEPS = 5
_MOST_HALVINGS = 20
"""The scale begins at 2**16; a gradient that overflows without any scale is infinite."""


def noise(context: Context) -> CheckResult:
    """Compare norms and dot products of the same micro-batches' gradients in float64 on the device and on the CPU."""
    make = partial(_gradients, context)
    there, here = make("fp64", context.device), make("fp64", torch.device("cpu"))
    single = make("fp32", context.device)
    error = max(_error(there.sq_norm_sums(), here.sq_norm_sums()), _error(_flat(there), _flat(here)))
    return CheckResult(
        name="gradient noise",
        value=error,
        unit="relative difference of norms and dot products",
        goal=f"<= {_NORM_ERROR:g}",
        holds=error <= _NORM_ERROR,
        detail=f"{context.scale.noise_batches} micro-batches of {context.scale.noise_size}, float64, {context.device} against cpu; "
        f"float32 on {context.device} differs by {_error(single.sq_norm_sums(), here.sq_norm_sums()):.2g}",
    )


def _gradients(context: Context, precision: str, device: torch.device) -> GradientBlocks:
    """Gradients of consecutive micro-batches at the same weights, one block each."""
    size, count = context.scale.noise_size, context.scale.noise_batches
    rig = context.rig(learnable(context.scale.side, context.scale.width, size * count, precision=precision), device)
    trainee = rig.new_trainee()
    blocks = GradientBlocks(count, torch.device("cpu"))
    for index in range(count):
        blocks.add(_gradient(rig, trainee, range(index * size, (index + 1) * size)))
    return blocks


def _gradient(rig: Rig, trainee: Trainee, samples: Sequence[int]) -> torch.Tensor:
    """Return the mean gradient of some samples, a scaler's scale divided out; the scale is halved while it overflows, as steps would do."""
    for _ in range(_MOST_HALVINGS):
        clear_gradients(trainee)
        backward_mean(trainee, [rig.real_batch(samples)])
        gradient = flat_gradient(trainee.parameters)
        clear_gradients(trainee)
        if trainee.scaler is None:
            return gradient
        scale = trainee.scaler.get_scale()
        if torch.isfinite(gradient).all():
            return gradient / scale
        trainee.scaler.update(scale / 2)
    return gradient / scale


def _flat(blocks: GradientBlocks) -> list[float]:
    return [value for row in blocks.gram() for value in row]


def _error(found: Sequence[float], true: Sequence[float]) -> float:
    """Largest difference over the largest value: dot products near zero have no relative error of their own."""
    largest = max(map(abs, true))
    return max(abs(first - second) for first, second in zip(found, true, strict=True)) / largest


def half_precision(context: Context) -> CheckResult:
    """Compare the unscaled gradient under fp16 with a scaler with that in float32; then train a few steps."""
    size = context.scale.noise_size
    plain = learnable(context.scale.side, context.scale.width, 4 * size)
    norms: dict[str, float] = {}
    is_finite = True
    for precision in ("fp32", "fp16", "bf16"):
        rig = context.rig(replace(plain, precision=precision))
        trainee = rig.new_trainee()
        gradient = _gradient(rig, trainee, range(size))
        is_finite &= bool(torch.isfinite(gradient).all())
        norms[precision] = float(torch.linalg.vector_norm(gradient.double()))
        for _ in range(_HALF_STEPS):
            train_step(trainee, [rig.real_batch(range(size))])
        is_finite &= all(bool(torch.isfinite(parameter).all()) for parameter in trainee.parameters)
    errors = {precision: norm / norms["fp32"] - 1 for precision, norm in norms.items()}
    return CheckResult(
        name="half precision",
        value=round(errors["fp16"], 5),
        unit="norm under fp16, unscaled, over that in float32, less 1",
        goal=f"within {_HALF_ERROR:.0%}, under bf16 too; every gradient and weight finite",
        holds=is_finite and all(abs(error) <= _HALF_ERROR for error in errors.values()),
        detail=f"b = {size}; bf16 {errors['bf16']:+.3%}; after {_HALF_STEPS} steps {'all finite' if is_finite else 'not all finite'}",
    )
