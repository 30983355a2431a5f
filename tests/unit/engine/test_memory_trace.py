"""The peak that small sizes predict is the peak that a larger size has, to the byte; what cannot be predicted is said."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from cases import MEMORY_CASES, DataDependent, MoreStepsForMore, images, rig_of, sgd
from rightbatch.engine.memory_trace import Allocation, AllocationLog, UnmatchedLogsError, match, record
from rightbatch.engine.rig import held_tensors
from rightbatch.engine.step import train_step
from rightbatch.probes import memory
from rightbatch.workload.ingredients import Workload

NEVER = 2**62


def log_of_two_steps(rig, size):
    trainee = rig.new_trainee(compiled=False)
    batch = rig.typical_batch(size)

    def two_steps():
        train_step(trainee, [batch])
        train_step(trainee, [batch])

    return record(size, held_tensors(trainee, batch), two_steps)


def replayed_peak(log):
    """Live bytes after each allocation, summed anew each time."""
    rows = log.allocations
    return max(sum(row.size_bytes for row in rows[: index + 1] if row.death > index) for index in range(len(rows)))


def predicted_peak(moments, size):
    return max(m.fixed_bytes + m.per_sample_bytes * size + m.per_sample_squared_bytes * size**2 for m in moments)


@pytest.fixture
def native_kernels():
    """oneDNN rounds the workspace of an LSTM up by size, which is no polynomial; torch's own kernels do not."""
    torch._C._set_mkldnn_enabled(False)  # noqa: FBT003  # torch.backends.mkldnn.flags also touches TF32, and warns about it
    yield
    torch._C._set_mkldnn_enabled(True)  # noqa: FBT003


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("case", MEMORY_CASES, ids=lambda case: case.name)
def test_predicted_peak_is_the_recorded_peak_to_the_byte(case):
    rig = rig_of(case.workload())
    trace = memory.trace(rig)
    assert trace.recorded_on == "device", trace.remark
    assert trace.consistent
    for size in (7, 13, 32):
        assert predicted_peak(trace.moments, size) == replayed_peak(log_of_two_steps(rig, size)), size


@pytest.mark.parametrize("case", MEMORY_CASES, ids=lambda case: case.name)
def test_with_the_machines_own_kernels_a_prediction_is_exact_or_refused(case):
    rig = rig_of(case.workload())
    trace = memory.trace(rig)
    if trace.recorded_on == "device":
        assert predicted_peak(trace.moments, 7) == replayed_peak(log_of_two_steps(rig, 7))
    else:
        assert case.name == "LSTM"
        assert "mkldnn_rnn_layer in rnn follows no polynomial" in trace.remark


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
    moments = match([log_from(rows, size) for size in (2, 3, 5, 7)])
    for size in (1, 2, 4, 9, 31, 1000):
        assert predicted_peak(moments, size) == replayed_peak(log_from(rows, size))


@settings(deadline=None, derandomize=True)
@given(random_lifetimes())
def test_no_kept_moment_is_dominated_by_another(rows):
    kept = [(m.fixed_bytes, m.per_sample_bytes, m.per_sample_squared_bytes) for m in match([log_from(rows, size) for size in (2, 3, 5, 7)])]
    assert not any(a is not b and all(x >= y for x, y in zip(a, b, strict=True)) for a in kept for b in kept)


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
