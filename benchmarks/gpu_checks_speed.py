"""GPU checks of time and energy: the step-time curve, powers of two, memory format, compilation, the clock and the meter."""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gpu_checks_context import CheckResult, Context, Ratio, context_for, paired_ratio
from rightbatch.engine.meters import EnergyMeter
from rightbatch.engine.process_state import preserved_process_state
from rightbatch.engine.rig import Rig
from rightbatch.engine.step import train_step
from rightbatch.fits.step_time import INCONSISTENT_FIT, candidate_sizes, fit_step_time
from rightbatch.probes import step_time
from rightbatch.records.measurements import Contention, StepTimeMeasurements

_SECONDS_A_ROUND = 0.05
_CLOCK_ERROR = 0.05
_LEAST_POWER_W, _MOST_POWER_W = 5.0, 2000.0
_QUIET = Contention(load_average_1m=0.0, cpu_count=1, other_processes_cpu=0.0)


def _seconds(context: Context, least_s: float, share: float = 1.0) -> float:
    """Seconds that one part of a check may take: its share of what is left, but enough to say something."""
    return max(least_s, share * min(context.left_s(), 3600.0))


def step_time_curve(context: Context) -> CheckResult:
    """Time a range of sizes as the probe does, and fit the law: its error, its knee."""
    rig = context.rig(context.networks()["residual"]())
    largest = context.scale.largest_timed
    budget_s = _seconds(context, 2.0, 0.8)
    machine = step_time.contention(rig)
    scan = step_time.scan(rig, largest=largest, budget_s=budget_s * 0.3, affordable_step_s=budget_s * 0.1)
    sizes = candidate_sizes(scan, largest=scan[-1][0])
    measured = step_time.measure(
        rig, sizes, is_decided=_after(context.scale.rounds), budget_s=budget_s * 0.6, machine=machine, largest_affordable=None
    )
    curve = fit_step_time(measured)
    times = ", ".join(f"{point.micro_batch_size}: {(point.step_time_s.value or 0) * 1000:.3g}" for point in curve.points)
    return CheckResult(
        name="step time",
        value=None if curve.fit_error is None else round(curve.fit_error, 4),
        unit="largest relative distance of a median from the law",
        goal=f"<= {INCONSISTENT_FIT}, where the law is no longer believed",
        holds=curve.fit_error is not None and curve.fit_error <= INCONSISTENT_FIT,
        detail=f"status {curve.status}; knee {curve.knee}, best {curve.best}, half saturation {curve.half_saturation or 0:.3g}, "
        f"exponent {curve.exponent or 0:.3g}; {len(measured.optimizer_times_s)} rounds; ms by size {times}; {' '.join(curve.reasons)}",
    )


def _after(rounds: int):
    return lambda measured: len(measured.optimizer_times_s) >= rounds


def powers_of_two(context: Context) -> CheckResult:
    """Compare the time a sample at a power of two with that of its neighbours, interleaved, with tensor cores at work."""
    ratios: dict[str, Ratio] = {}
    make = context.networks()["residual"]
    with _tensor_cores():
        for precision in ("fp32", "bf16"):
            rig = context.rig(replace(make(), precision=precision))
            for power in context.scale.powers:
                sizes = (power - 1, power, power + 1, power + 8)
                parts = 2 * len(context.scale.powers) - len(ratios) // 3
                measured = step_time.measure(
                    rig,
                    sizes,
                    is_decided=_after(context.scale.rounds),
                    budget_s=_seconds(context, 1.0, 0.9 / parts),
                    machine=_QUIET,
                    largest_affordable=None,
                )
                ratios |= _against(power, measured, precision)
    dearest = max(ratios, key=lambda name: ratios[name].value)
    return CheckResult(
        name="powers of two",
        value=round(ratios[dearest].value, 4),
        unit="time a sample over that at the power of two, largest",
        goal="none: a figure; below 1 the neighbour is cheaper",
        holds=None,
        detail="; ".join(f"{name} {ratio}" for name, ratio in ratios.items()),
    )


def _against(power: int, measured: StepTimeMeasurements, precision: str) -> dict[str, Ratio]:
    """Time a sample over that at the power, for every other size."""
    by_size = {point.micro_batch_size: [seconds / point.micro_batch_size for seconds in point.step_times_s] for point in measured.points}
    others = [size for size in by_size if size != power]
    return {f"{precision} {size}/{power}": paired_ratio(by_size[size], by_size[power]) for size in others}


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let float32 matrix products and convolutions use tf32."""
    convolutions = torch.backends.cudnn.allow_tf32
    with preserved_process_state():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = convolutions


def interleaved_times_s(rigs: Sequence[Rig], size: int, rounds: int) -> list[list[float]]:
    """Time one size on several rigs in turns, warmed up; return seconds of a step by rig and round."""
    trainees = [(rig, rig.new_trainee(), rig.typical_batch(size)) for rig in rigs]
    for _, trainee, batch in trainees:
        for _ in range(3):
            train_step(trainee, [batch])
    steps = 1
    times: list[list[float]] = [[] for _ in trainees]
    for turn in range(rounds + 1):
        for index, (rig, trainee, batch) in enumerate(trainees):
            start_s = rig.meters.clock.now_s()
            for _ in range(steps):
                train_step(trainee, [batch])
            times[index].append((rig.meters.clock.now_s() - start_s) / steps)
        if turn == 0:  # the first round only tells how many steps fill a round
            steps = max(1, min(50, int(_SECONDS_A_ROUND / max(min(map(min, times)), 1e-6))))
            times = [[] for _ in trainees]
    return times


def channels_last(context: Context) -> CheckResult:
    """Compare the step time with and without the channels-last memory format, in float32 and under bf16."""
    make = context.networks()["residual"]
    ratios: dict[str, Ratio] = {}
    with _tensor_cores():
        for precision in ("fp32", "bf16"):
            plain = replace(make(), precision=precision)
            rigs = [context.rig(replace(plain, channels_last=True)), context.rig(plain)]
            with_it, without = interleaved_times_s(rigs, context.scale.timed_size, context.scale.rounds)
            ratios[precision] = paired_ratio(with_it, without)
    return CheckResult(
        name="channels last",
        value=round(ratios["bf16"].value, 4),
        unit="step time with it over without, bf16",
        goal="none: a figure",
        holds=None,
        detail=f"b = {context.scale.timed_size}: " + "; ".join(f"{name} {ratio}" for name, ratio in ratios.items()),
    )


def compiled(context: Context) -> CheckResult:
    """Compare the step time with and without ``torch.compile``, in a process that is ended when compiling takes too long."""
    cap_s = min(context.scale.compile_cap_s, _seconds(context, 10.0))
    output = capped_output([sys.executable, str(Path(__file__).resolve()), "--device", str(context.device)], cap_s)
    detail = f"b = {context.scale.timed_size}: " if output else ""
    ratio = Ratio(**json.loads(output.splitlines()[-1])) if output else None
    return CheckResult(
        name="compile",
        value=None if ratio is None else round(ratio.value, 4),
        unit="step time with it over without",
        goal=f"it runs within {cap_s:.0f} s; the ratio is a figure",
        holds=ratio is not None,
        detail=f"{detail}{ratio}" if ratio else f"given up after {cap_s:.0f} s",
    )


def capped_output(command: Sequence[str], cap_s: float) -> str | None:
    """Run a command with everything that it starts; return what it prints, or none when it was ended after so many seconds.

    Raises:
        RuntimeError: It failed.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, complaint = process.communicate(timeout=cap_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        raise RuntimeError((complaint.strip().splitlines() or [f"ended with {process.returncode}"])[-1])
    return output


def _compile_here(device: torch.device) -> Ratio:
    context = context_for(device, data=None)
    plain = context.networks()["residual"]()
    rigs = [context.rig(replace(plain, compile=True)), context.rig(plain)]
    with _tensor_cores():
        return paired_ratio(*interleaved_times_s(rigs, context.scale.timed_size, context.scale.rounds))


def clock(context: Context) -> CheckResult:
    """Compare the synchronised clock with the device's own events around the same kernels."""
    rig = context.rig(context.networks()["residual"]())
    matrix = torch.randn(4096, 4096, device=context.device)
    ratios = []
    for _ in range(context.scale.rounds):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_s = rig.meters.clock.now_s()
        begun.record()
        for _ in range(20):
            torch.mm(matrix, matrix)
        ended.record()
        elapsed_s = rig.meters.clock.now_s() - start_s
        ratios.append(elapsed_s / (begun.elapsed_time(ended) / 1000))
    ratio = paired_ratio(ratios, [1.0] * len(ratios))
    return CheckResult(
        name="clock",
        value=round(ratio.value, 4),
        unit="synchronised clock over device events",
        goal=f"1 to {1 + _CLOCK_ERROR}",
        holds=1 - 1e-3 <= ratio.value <= 1 + _CLOCK_ERROR,
        detail=f"20 products of 4096 x 4096: {ratio}",
    )


def energy(context: Context) -> CheckResult:
    """Read the energy counter around steps: it must never fall, must rise under work, and give a power that a card can draw."""
    rig = context.rig(context.networks()["residual"]())
    meter: EnergyMeter | None = rig.meters.energy
    if meter is None:
        raise RuntimeError("the driver counts no energy for this device, or NVML does not answer")
    trainee, batch = rig.new_trainee(), rig.typical_batch(context.scale.timed_size)
    train_step(trainee, [batch])
    start_s = rig.meters.clock.now_s()
    readings, steps = [meter.energy_j()], 0
    while rig.meters.clock.now_s() - start_s < 2.0:
        train_step(trainee, [batch])
        steps += 1
        readings.append(meter.energy_j())
    elapsed_s = rig.meters.clock.now_s() - start_s
    readings.append(meter.energy_j())
    used = readings[-1] - readings[0]
    power_w = used / elapsed_s
    never_falls = all(after >= before for before, after in itertools.pairwise(readings))
    return CheckResult(
        name="energy",
        value=round(used, 3),
        unit="J",
        goal=f"> 0, never falling, {_LEAST_POWER_W:.0f} to {_MOST_POWER_W:.0f} W",
        holds=used > 0 and never_falls and _LEAST_POWER_W <= power_w <= _MOST_POWER_W,
        detail=f"{steps} steps of b = {context.scale.timed_size} in {elapsed_s:.2f} s: {power_w:.0f} W, {used / steps:.3g} J a step; "
        f"{'never fell' if never_falls else 'fell'} over {len(readings)} readings",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the ratio of step times with and without torch.compile, as JSON.")
    parser.add_argument("--device", required=True)
    print(json.dumps(vars(_compile_here(torch.device(parser.parse_args().device)))))
