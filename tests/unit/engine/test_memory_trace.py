"""The peak that small sizes predict is the peak that a larger size has, to the byte; what cannot be predicted is said."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cases import MEMORY_CASES, DataDependent, MoreStepsForMore, images, rig_of, sgd
from rightbatch.engine.allocation_laws import UnmatchedLogsError, join, moments
from rightbatch.engine.memory_trace import Allocation, AllocationLog
from rightbatch.fits.memory import traced_peak_bytes
from rightbatch.probes import memory
from rightbatch.records.measurements import AllocationKind
from rightbatch.workload.ingredients import Workload

NEVER = 2**62


def log_of_two_steps(rig, size):
    return memory.record_step(rig, size)


def match(logs):
    return moments(join(logs)[0])


def replayed_peak(log):
    """Live bytes after each allocation, summed anew each time."""
    rows = log.allocations
    return max(sum(row.size_bytes for row in rows[: index + 1] if row.death > index) for index in range(len(rows)))


def predicted_peak(found, size):
    return max(m.fixed_bytes + m.per_sample_bytes * size + m.per_sample_squared_bytes * size**2 for m in found)


@pytest.mark.parametrize("case", MEMORY_CASES, ids=lambda case: case.name)
def test_predicted_peak_is_the_recorded_peak_to_the_byte(case):
    rig = rig_of(case.workload())
    trace = memory.trace(rig)
    assert trace.recorded_on == "device", trace.remark
    assert trace.consistent, trace.remark
    for size in (1, 7, 13, 32, 200):
        assert traced_peak_bytes(trace, size) == replayed_peak(log_of_two_steps(rig, size)), size


def test_affine_laws_need_three_recordings_and_quadratic_ones_four():
    plain, contrastive = (next(case for case in MEMORY_CASES if name in case.name) for name in ("plain", "quadratic"))
    assert memory.trace(rig_of(plain.workload())).batch_sizes == (1, 2, 113)
    assert memory.trace(rig_of(contrastive.workload())).batch_sizes == (1, 2, 3, 113)


def sparse_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 6, sparse=True), nn.Flatten(), nn.Linear(24, 3))


def recurrent(*, bidirectional: bool) -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(6, 11, num_layers=2, bidirectional=bidirectional, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0][:, -1]

    return Last()


def test_the_indices_and_values_of_sparse_gradients_are_counted():
    train = [(torch.arange(4) * 7 % (index + 1), index % 3) for index in range(40)]
    rig = rig_of(Workload(model=sparse_embedding, train=train, loss=cross_entropy, optimizer=sgd))
    trace = memory.trace(rig)
    assert trace.consistent, trace.remark
    log = log_of_two_steps(rig, 50)
    assert traced_peak_bytes(trace, 50) == replayed_peak(log)
    values_of_four_words = 50 * 4 * 6 * 4
    assert values_of_four_words in {row.size_bytes for row in log.allocations if row.kind is AllocationKind.GRADIENT}


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_lstm_is_exact_part_by_part(bidirectional):
    train = [(torch.zeros(9, 6), index % 11) for index in range(40)]
    rig = rig_of(Workload(model=partial(recurrent, bidirectional=bidirectional), train=train, loss=cross_entropy, optimizer=sgd))
    trace = memory.trace(rig)
    assert trace.consistent, trace.remark
    for size in (1, 6, 77, 400):
        assert traced_peak_bytes(trace, size) == replayed_peak(log_of_two_steps(rig, size)), size


def test_an_lstm_whose_parts_are_unknown_is_never_called_exact(monkeypatch):
    monkeypatch.setattr("rightbatch.engine.memory_trace.paged_parts", lambda *_: ())
    train = [(torch.zeros(1, 6), index % 11) for index in range(40)]
    rig = rig_of(Workload(model=partial(recurrent, bidirectional=True), train=train, loss=cross_entropy, optimizer=sgd))
    trace = memory.trace(rig)
    assert not trace.consistent
    assert "workspace of aten.mkldnn_rnn_layer in rnn is rounded up to pages" in trace.remark
    for size in (1, 6, 77, 400):
        assert traced_peak_bytes(trace, size) >= replayed_peak(log_of_two_steps(rig, size)), size


def test_every_allocation_has_a_kind_and_the_kinds_add_up():
    rig = rig_of(MEMORY_CASES[1].workload())
    trace = memory.trace(rig)
    table = trace.allocations
    fixed = dict.fromkeys(AllocationKind, 0)
    for kind, size_bytes, death in zip(table.kind, table.fixed_bytes, table.death, strict=True):
        fixed[kind] += size_bytes if death < 0 else 0
    assert fixed[AllocationKind.PARAMETER] == fixed[AllocationKind.GRADIENT] == trace.parameter_bytes
    assert fixed[AllocationKind.OPTIMIZER_STATE] == trace.optimizer_state_bytes
    kept_for_backward = {
        operation for operation, kind in zip(table.operation, table.kind, strict=True) if kind is AllocationKind.ACTIVATION
    }
    assert "aten.max_pool2d_with_indices" in {table.operations[index] for index in kept_for_backward}


def test_recomputed_activations_are_freed_by_the_end_of_the_backward_pass():
    rig = rig_of(next(case for case in MEMORY_CASES if "checkpointing" in case.name).workload())
    table = memory.trace(rig).allocations
    outliving = [
        s for s, d, k in zip(table.per_sample_bytes, table.death, table.kind, strict=True) if d < 0 and k is AllocationKind.TEMPORARY
    ]
    assert sum(outliving) == 0


def test_accumulation_holds_the_gradients_during_the_second_micro_batch():
    rig = rig_of(MEMORY_CASES[0].workload())
    once, twice, thrice = (memory.trace(rig, accumulation_steps=count) for count in (1, 2, 3))
    at_64 = [predicted_peak(trace.moments, 64) for trace in (once, twice, thrice)]
    loss_bytes = 4
    assert at_64[0] < at_64[1] <= at_64[0] + once.gradient_bytes + loss_bytes
    assert at_64[2] <= at_64[1] + loss_bytes


def test_evaluation_holds_neither_gradients_nor_activations():
    rig = rig_of(MEMORY_CASES[1].workload())
    trace = memory.evaluation_trace(rig)
    assert AllocationKind.ACTIVATION not in trace.allocations.kind
    assert predicted_peak(trace.moments, 64) < predicted_peak(memory.trace(rig).moments, 64)


def test_a_moving_average_of_the_weights_is_held_and_updated():
    average = partial(torch.optim.swa_utils.AveragedModel, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    plain = MEMORY_CASES[0].workload()
    rig = rig_of(replace(plain, average=average))
    trace, without = memory.trace(rig), memory.trace(rig_of(plain))
    held = sum(s for s, k in zip(trace.allocations.fixed_bytes, trace.allocations.kind, strict=True) if k is AllocationKind.AVERAGE)
    assert held >= without.parameter_bytes
    assert predicted_peak(trace.moments, 9) == replayed_peak(log_of_two_steps(rig, 9))
    assert predicted_peak(trace.moments, 9) >= predicted_peak(without.moments, 9) + without.parameter_bytes


def test_alternatives_change_what_their_name_says():
    rig = rig_of(MEMORY_CASES[5].workload())
    peaks = {other.change: predicted_peak(other.trace.moments, 256) for other in memory.alternatives(rig)}
    now = predicted_peak(memory.trace(rig).moments, 256)
    assert set(peaks) == {"bf16", "checkpointing", "sgd", "adam"}
    assert peaks["sgd"] < now < peaks["adam"]
    assert peaks["checkpointing"] < now


def test_the_recorded_peak_holds_what_must_be_live_at_once():
    rig = rig_of(MEMORY_CASES[1].workload())
    trace = memory.trace(rig)
    parameters = sum(p.nbytes for p in rig.new_trainee().model.parameters())
    assert trace.parameter_bytes == trace.gradient_bytes == parameters
    assert trace.optimizer_state_bytes >= 2 * parameters
    assert trace.input_bytes_per_sample == 2 * 8 * 8 * 4 + 8
    assert predicted_peak(trace.moments, 32) > parameters + trace.optimizer_state_bytes + 32 * trace.input_bytes_per_sample


def test_allocations_quadratic_in_the_batch_are_matched_with_four_sizes():
    rig = rig_of(next(case for case in MEMORY_CASES if "quadratic" in case.name).workload())
    logs = [log_of_two_steps(rig, size) for size in (2, 3, 5, 7)]
    assert any(moment.per_sample_squared_bytes > 0 for moment in match(logs))
    with pytest.raises(UnmatchedLogsError, match="follows no polynomial of the size"):
        match(logs[:3])


@pytest.mark.parametrize("model", [DataDependent, MoreStepsForMore])
def test_a_network_whose_allocations_follow_no_law_is_reported_and_never_predicted(model):
    rig = rig_of(Workload(model=partial(model), train=images(40), loss=cross_entropy, optimizer=sgd))
    trace = memory.trace(rig)
    assert trace.recorded_on == "none"
    assert trace.moments == ()
    assert not trace.consistent
    assert "the ceiling is searched for by measuring alone" in trace.remark


def test_moments_name_the_module_and_the_operation_of_the_peak():
    trace = memory.trace(rig_of(MEMORY_CASES[5].workload()))
    peak = max(trace.moments, key=lambda m: m.fixed_bytes + 1000 * m.per_sample_bytes)
    assert peak.operation.startswith("aten.")
    assert any(moment.module for moment in trace.moments)


def test_recording_leaves_no_mode_behind():
    memory.trace(rig_of(MEMORY_CASES[0].workload()))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


laws = st.tuples(st.integers(0, 50), st.integers(0, 9), st.integers(0, 2))


@st.composite
def random_lifetimes(draw):
    """Laws of random allocations, and after which allocation each is freed."""
    rows = draw(st.lists(st.tuples(laws, st.integers(1, 12) | st.just(NEVER)), min_size=1, max_size=25))
    return [(law, min(index + life, NEVER)) for index, (law, life) in enumerate(rows)]


def log_from(rows, size):
    allocations = [Allocation(f + s * size + q * size * size, "m", "op", death) for (f, s, q), death in rows]
    return AllocationLog(size, allocations)


@settings(deadline=None, derandomize=True)
@given(random_lifetimes())
def test_undominated_moments_reach_the_largest_sum_of_live_bytes_at_every_size(rows):
    found = match([log_from(rows, size) for size in (2, 3, 5, 7)])
    for size in (1, 2, 4, 9, 31, 1000):
        assert predicted_peak(found, size) == replayed_peak(log_from(rows, size))


@settings(deadline=None, derandomize=True)
@given(random_lifetimes())
def test_no_kept_moment_is_dominated_by_another(rows):
    kept = [(m.fixed_bytes, m.per_sample_bytes, m.per_sample_squared_bytes) for m in match([log_from(rows, size) for size in (2, 3, 5, 7)])]
    assert not any(a is not b and all(x >= y for x, y in zip(a, b, strict=True)) for a in kept for b in kept)


@settings(deadline=None, derandomize=True)
@given(random_lifetimes(), st.lists(st.sampled_from((1, 1, 8, 64)), min_size=25, max_size=25))
def test_allocations_that_are_rounded_up_reach_the_same_peak_when_replayed(rows, multiples):
    def rounded_log(size):
        log = log_from(rows, size)
        for allocation, multiple in zip(log.allocations, multiples, strict=False):
            if multiple > 1:
                allocation.rounding_bytes, allocation.unrounded_bytes = multiple, allocation.size_bytes
                allocation.size_bytes = -(-allocation.size_bytes // multiple) * multiple
        return log

    found = match([rounded_log(size) for size in (2, 3, 5, 7)])
    trace = memory.no_trace("").model_copy(update={"moments": found})
    for size in (1, 2, 4, 9, 31, 1000):
        assert traced_peak_bytes(trace, size) == replayed_peak(rounded_log(size))


def test_a_storage_lives_as_long_as_in_the_log_where_it_lived_longest():
    early = AllocationLog(2, [Allocation(8, "", "a", 1), Allocation(8, "", "b", NEVER)])
    late = AllocationLog(3, [Allocation(12, "", "a", NEVER), Allocation(12, "", "b", NEVER)])
    check = AllocationLog(5, [Allocation(20, "", "a", 1), Allocation(20, "", "b", NEVER)])
    assert predicted_peak(match([early, late, check]), 10) == 80


def test_logs_of_different_operations_are_refused():
    first = AllocationLog(2, [Allocation(8, "", "aten.add")])
    second = AllocationLog(3, [Allocation(12, "", "aten.mul")])
    with pytest.raises(UnmatchedLogsError, match=r"operation 0 is aten\.add at one size and aten\.mul at another"):
        match([first, second, second])


def test_logs_of_different_lengths_are_refused():
    with pytest.raises(UnmatchedLogsError, match=r"number of allocations changes with the size \(1, 2, 1\)"):
        match([AllocationLog(b, [Allocation(8, "", "a")] * n) for b, n in ((2, 1), (3, 2), (5, 1))])


@pytest.mark.parametrize("sizes", [(64, 64, 64, 128), (8, 12, 32, 40), (2, 3, 10, 21)])
def test_allocations_that_follow_no_polynomial_are_refused(sizes):
    with pytest.raises(UnmatchedLogsError, match="no polynomial"):
        match([AllocationLog(b, [Allocation(v, "", "a")]) for b, v in zip((2, 3, 5, 7), sizes, strict=True)])
