"""What each GPU check makes of what it measures: goals that are met by a little and missed by a little, on planted numbers."""

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import findings_samples
import gpu_checks_gradients as gradients
import gpu_checks_memory as memory
import gpu_checks_speed as speed
import gpu_checks_tuner as tuner
from gpu_checks_context import REHEARSAL, Context, NetMemory, paired_ratio
from gpu_checks_devices import CountedHost
from gpu_checks_nets import learnable, networks
from rightbatch.records.estimates import Certificate
from rightbatch.records.measurements import AllocationKind, AllocationTable, LiveMoment, MemoryTrace, Outcome
from rightbatch.units import MIB

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FIXED, PER_SAMPLE, RESULT = 32 * MIB, 4 * MIB, 1 * MIB
SIZES = (7, 32, 100)


def trace():
    """Weights of 32 MiB, 4 MiB a sample kept, then a convolution whose result is 1 MiB a sample."""
    table = AllocationTable(
        fixed_bytes=(FIXED, 0, 0),
        per_sample_bytes=(0, PER_SAMPLE, RESULT),
        per_sample_squared_bytes=(0, 0, 0),
        rounding_bytes=(1, 1, 1),
        death=(-1, -1, -1),
        kind=(AllocationKind.PARAMETER, AllocationKind.ACTIVATION, AllocationKind.ACTIVATION),
        module=(0, 0, 0),
        operation=(0, 0, 1),
        modules=("",),
        operations=("aten.empty", "aten.convolution"),
    )
    moment = LiveMoment(fixed_bytes=FIXED, per_sample_bytes=PER_SAMPLE + RESULT, module="", operation="aten.convolution")
    return MemoryTrace(batch_sizes=(2, 3, 5), recorded_on="device", event_count=3, moments=(moment,), consistent=True, allocations=table)


def live(size):
    return FIXED + (PER_SAMPLE + RESULT) * size


def net(allocated=live, reserved=live, name="planted"):
    return NetMemory(
        name=name,
        trace=trace(),
        allocated_bytes={size: int(allocated(size)) for size in SIZES},
        reserved_bytes={size: int(reserved(size)) for size in SIZES},
    )


def context_of(*nets, device=CUDA, memory_nets=None, **options):
    scale = replace(REHEARSAL, memory_nets=memory_nets or len(nets), **options)
    return Context(device=device, counters=None, scale=scale, measured=list(nets))


@pytest.mark.parametrize(
    ("allocated", "holds"),
    [
        (live, True),
        (lambda size: live(size) + 2 * RESULT * size, True),  # the most scratch that forecasts take
        (lambda size: live(size) * 0.995, True),
        (lambda size: live(size) + 2.1 * RESULT * size, False),
        (lambda size: live(size) * 0.98, False),
        (lambda size: live(size) * (0.9 if size == 7 else 1), False),  # a small size counts as well
    ],
)
def test_the_trace_holds_between_no_scratch_and_twice_a_convolutions_result(allocated, holds):
    result = memory.trace_against_counters(context_of(net(), net(allocated, name="second")))
    assert result.holds is holds
    assert ("outside the range: none" in result.detail) is holds
    if not holds:
        assert result.detail.endswith("outside the range: second")
        assert result.value == round(max((allocated(size) / live(size) - 1 for size in SIZES), key=abs), 5)


@pytest.mark.parametrize("check", [memory.trace_against_counters, memory.calibration, memory.replayed_allocator])
def test_a_network_that_time_left_out_fails_the_checks_of_all_networks(check):
    assert check(context_of(net(), net())).holds
    missing = check(context_of(net(), memory_nets=2))
    assert missing.holds is False


@pytest.mark.parametrize(
    ("wrong_by", "reserved_wrong_by", "device", "holds"),
    [
        (1.0, 1.0, CUDA, True),
        (1.04, 1.0, CUDA, True),
        (1.06, 1.0, CUDA, False),
        (1.0, 1.2, CUDA, True),
        (1.0, 1.5, CUDA, False),
        (1.0, 1.5, CPU, True),  # the counted host replays what it is compared with
        (1.06, 1.0, CPU, False),
    ],
)
def test_calibration_is_judged_by_what_it_predicts_for_the_largest_size(wrong_by, reserved_wrong_by, device, holds):
    def grown(factor):
        return lambda size: 1.1 * live(size) * (factor if size == 100 else 1) + 5 * MIB

    result = memory.calibration(context_of(net(grown(wrong_by), grown(reserved_wrong_by)), device=device))
    assert result.value == pytest.approx(1 - 1 / wrong_by, abs=1e-3)
    assert result.holds is holds
    assert ("not checked on a CPU" in result.goal) is (device is CPU)


@pytest.mark.parametrize(
    ("reserved", "holds"),
    [
        (lambda size: live(size) + 15 * MIB, True),
        (lambda size: live(size) - 15 * MIB, True),
        (lambda size: live(size) + 3 * RESULT * size + 25 * MIB, False),
        (lambda size: live(size) - 25 * MIB, False),
    ],
)
def test_the_replay_holds_within_one_segment_of_the_range_of_scratch(reserved, holds):
    result = memory.replayed_allocator(context_of(net(reserved=reserved)))
    assert result.holds is holds
    assert result.detail.endswith(f"outside the range: {'none' if holds else 'planted'}")


@dataclass
class PlannedRetries:
    """An allocator that retries from some size on, and notes what it was allowed."""

    first_size: int
    out_of_memory_from: int = 2**62
    size: int = 0
    count: int = 0

    def __post_init__(self):
        self.allowed = []

    def synchronize(self):
        if self.size >= self.out_of_memory_from:
            raise torch.OutOfMemoryError("planned")
        self.count += self.size >= self.first_size

    def max_memory_allocated(self):
        return 0

    max_memory_reserved = max_memory_allocated

    def reset_peak(self):
        pass

    empty_cache = reset_peak

    def retries(self):
        return self.count

    def allow(self, capacity_bytes):
        self.allowed.append(capacity_bytes)


@pytest.fixture
def without_steps(monkeypatch):
    def two_steps(rig, size):
        two_steps.counters.size = size

    monkeypatch.setattr(memory, "_two_steps", two_steps)
    monkeypatch.setattr(memory.memory, "trace", lambda rig: trace())
    return two_steps


CALM, BUSY = 80, 138
"""Planted: 512 MiB hold the weights and (512 - 32) / 5 = 96 samples without scratch, and fewer with it."""


@pytest.mark.parametrize(
    ("counters", "value", "holds"),
    [
        (PlannedRetries(first_size=90), 0, True),
        (PlannedRetries(first_size=10), 1, False),
        (PlannedRetries(first_size=1000), 0, False),
        (PlannedRetries(first_size=1000, out_of_memory_from=110), 0, True),
        (PlannedRetries(first_size=1000, out_of_memory_from=10), -1, False),
    ],
)
def test_retries_begin_between_the_least_forecast_and_a_quarter_above_the_greatest(without_steps, counters, value, holds):
    without_steps.counters = counters
    context = replace(context_of(allowed_bytes=512 * MIB, memory_nets=1), device=CPU, counters=counters)
    result = memory.allocator_retries(context)
    assert (result.value, result.holds) == (value, holds)
    assert counters.allowed == [512 * MIB, None]
    smaller, larger = (int(words.split()[0].rstrip(":")) for words in result.detail.split("b = ")[1:])
    assert smaller < 96 < larger == int(1.25 * 96) + 1


def test_the_bound_on_the_allocator_is_lifted_when_the_check_breaks(without_steps, monkeypatch):
    counters = PlannedRetries(first_size=90)
    without_steps.counters = counters
    monkeypatch.setattr(counters, "retries", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.allocator_retries(replace(context_of(memory_nets=1, allowed_bytes=512 * MIB), device=CPU, counters=counters))
    assert counters.allowed[-1] is None


def test_a_counted_host_sees_every_storage_of_a_step_and_nothing_between_steps():
    host = CountedHost()
    host.reset_peak()
    kept = torch.empty(3 * MIB, dtype=torch.uint8)
    torch.empty(2 * MIB, dtype=torch.uint8)
    assert host.max_memory_allocated() == 5 * MIB
    view = kept[:MIB]
    assert host.max_memory_allocated() == 5 * MIB
    host.empty_cache()
    torch.empty(64 * MIB, dtype=torch.uint8)
    assert host.max_memory_allocated() == 0
    assert view.numel() == MIB


def test_a_scale_that_overflows_is_halved_until_the_gradient_is_finite():
    workload = learnable(8, 4, 16, precision="fp16")
    loud = replace(workload, loss=lambda output, target: 40.0 * cross_entropy(output, target))
    context = Context(device=CPU, counters=None)
    rig = context.rig(loud)
    trainee = rig.new_trainee()
    scaled = gradients._gradient(rig, trainee, range(16))
    assert trainee.scaler.get_scale() < 2**16
    plain_rig = context.rig(replace(loud, precision="fp32"))
    plain = gradients._gradient(plain_rig, plain_rig.new_trainee(), range(16))
    assert float((scaled - plain).norm() / plain.norm()) < 0.05


def test_a_gradient_that_no_scale_makes_finite_fails_the_check_of_half_precision(monkeypatch):
    monkeypatch.setattr(gradients, "_gradient", lambda rig, trainee, samples: torch.tensor([float("inf")]))
    result = gradients.half_precision(context_of(memory_nets=1, device=CPU))
    assert result.holds is False
    assert "not all finite" in result.detail


@pytest.mark.parametrize(("off", "holds"), [(0.0, True), (1e-3, False)])
def test_noise_on_the_device_is_held_against_the_cpu(monkeypatch, off, holds):
    exact, gradient = gradients._gradients, gradients._gradient

    def on_the_device(context, precision, device):
        factor = 1 + off if device is CUDA else 1.0
        with monkeypatch.context() as patch:
            patch.setattr(gradients, "_gradient", lambda *arguments: factor * gradient(*arguments))
            return exact(context, precision, CPU)

    monkeypatch.setattr(gradients, "_gradients", on_the_device)
    assert gradients.noise(context_of(memory_nets=1)).holds is holds


def findings(points=None, certificate=None, **changes):
    sample = findings_samples.good()
    curve = sample.memory.model_copy(update={"points": sample.memory.points if points is None else points, "certificate": certificate})
    return sample.model_copy(update={"memory": curve} | changes)


def points(*outcomes):
    first = findings_samples.good().memory.points[0]
    return tuple(first.model_copy(update={"outcome": outcome, "purpose": "approach"}) for outcome in outcomes)


PROOF = Certificate(micro_batch_size=129, outcome=Outcome.OUT_OF_MEMORY, holds=True)
RAN, OOM, KILLED = Outcome.RAN, Outcome.OUT_OF_MEMORY, Outcome.KILLED


@pytest.mark.parametrize(
    ("outcomes", "certificate", "errors", "holds"),
    [
        ([RAN] * 6, PROOF, 0, True),
        ([RAN] * 7, PROOF, 0, False),
        ([RAN, RAN, OOM], PROOF, 1, False),
        ([RAN, KILLED], PROOF, 1, False),
        ([RAN] * 3, None, 0, False),
        ([RAN] * 3, PROOF.model_copy(update={"holds": False}), 0, False),
    ],
)
def test_a_ceiling_is_proven_by_few_probes_no_failure_before_the_proof_and_a_proof_that_fails(outcomes, certificate, errors, holds):
    asked = []

    def find(source, request):
        asked.append(request)
        proof = points(OOM)[0].model_copy(update={"purpose": "proof"})
        return findings((*points(*outcomes), proof), certificate)

    result = tuner.proven_ceiling(replace(context_of(memory_nets=1, device=CPU), find=find, end_s=1e9))
    assert (result.value, result.holds) == (errors, holds)
    assert all(request.certify and request.limit_bytes == REHEARSAL.limit_bytes for request in asked)


@pytest.mark.parametrize(("duration_s", "has_plan", "holds"), [(9.1, True, True), (9.3, True, False), (5.0, False, False)])
def test_find_holds_with_a_plan_within_its_budget_and_a_little(duration_s, has_plan, holds):
    def find(source, request):
        assert request.budget_s == REHEARSAL.find_budget_s == 8.0
        sample = findings(duration_s=duration_s)
        if has_plan:
            return sample
        return sample.model_copy(update={"recommendation": sample.recommendation.model_copy(update={"plan": None})})

    result = tuner.whole_run(replace(context_of(memory_nets=1, device=CPU), find=find, end_s=1e9))
    assert result.holds is holds
    assert "not CIFAR-10" in result.detail
    assert (result.value is None) is not has_plan


def test_the_finder_and_find_are_told_the_time_that_is_left():
    seen = []

    def find(source, request):
        seen.append(request.budget_s)
        return findings((*points(RAN),), PROOF)

    context = replace(context_of(memory_nets=1, device=CPU), find=find, clock_s=lambda: 0.0)
    tuner.proven_ceiling(replace(context, end_s=12.0))
    tuner.whole_run(replace(context, end_s=6.5))
    assert seen == [12.0, 6.5]


def test_the_finder_that_finds_nothing_fails_the_check():
    with pytest.raises(RuntimeError, match="found nothing about the memory of residual"):
        tuner.proven_ceiling(replace(context_of(memory_nets=1, device=CPU), find=lambda *_: findings(memory=None)))


def test_a_ratio_is_a_median_over_paired_rounds_and_needs_two():
    ratio = paired_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0, 50.0])
    assert (ratio.value, ratio.n) == (2.0, 3)
    assert ratio.low <= 2.0 <= ratio.high
    with pytest.raises(ValueError, match="needs two rounds of each; got 1 and 1"):
        paired_ratio([1.0], [1.0])


def test_two_settings_are_timed_in_turns_on_the_same_size():
    rigs = [Context(device=CPU, counters=None).rig(networks(8, 4)["smooth"]()) for _ in range(2)]
    times = speed.interleaved_times_s(rigs, 2, rounds=3)
    assert [len(by_round) for by_round in times] == [3, 3]
    assert all(seconds > 0 for by_round in times for seconds in by_round)


def test_a_command_over_its_time_is_ended_and_one_that_fails_says_why():
    assert speed.capped_output([sys.executable, "-c", "print(7)"], 60) == "7\n"
    assert speed.capped_output([sys.executable, "-c", "import time; time.sleep(60)"], 0.3) is None
    with pytest.raises(RuntimeError, match="ValueError: no compiler"):
        speed.capped_output([sys.executable, "-c", "raise ValueError('no compiler')"], 60)
    with pytest.raises(RuntimeError, match="ended with 3"):
        speed.capped_output([sys.executable, "-c", "raise SystemExit(3)"], 60)


@pytest.mark.parametrize(
    ("output", "value", "holds"), [('noise\n{"value": 0.8, "low": 0.7, "high": 0.9, "n": 5}\n', 0.8, True), (None, None, False)]
)
def test_compiling_holds_when_it_ends_in_time(monkeypatch, output, value, holds):
    caps = []
    monkeypatch.setattr(speed, "capped_output", lambda command, cap_s: caps.append(cap_s) or output)
    result = speed.compiled(replace(context_of(memory_nets=1, device=CPU), clock_s=lambda: 0.0, end_s=15.0))
    assert (result.value, result.holds) == (value, holds)
    assert caps == [15.0]
    assert ("given up after 15 s" in result.detail) is not holds
