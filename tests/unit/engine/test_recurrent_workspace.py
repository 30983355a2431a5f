"""The workspace of oneDNN's LSTM is the sum of its parts, each in whole pages."""

import pytest
import torch

from rightbatch.engine.recurrent_workspace import PAGE_BYTES, is_workspace, paged_parts

LSTM, GRU = 2, 3


def run_layer(steps, count, width, hidden, dtype=torch.float32):
    """Run one layer as ``nn.LSTM`` does in training; return what it was given and its workspace."""
    weights = [torch.zeros(4 * hidden, rows, dtype=dtype) for rows in (width, hidden)]
    biases = [torch.zeros(4 * hidden, dtype=dtype) for _ in range(2)]
    states = [torch.zeros(1, count, hidden, dtype=dtype) for _ in range(2)]
    settings = (False, [], LSTM, hidden, 1, True, False, False, True)
    inputs = (torch.zeros(steps, count, width, dtype=dtype), *weights, *biases, *states, *settings)
    return inputs, torch.ops.aten.mkldnn_rnn_layer(*inputs)[3]


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@needs_onednn
@pytest.mark.parametrize(
    ("steps", "count", "width", "hidden"),
    [
        (1, 1, 1, 1),
        (24, 3, 16, 24),
        (5, 130, 7, 13),
        (8, 100, 64, 64),
        (3, 5, 300, 16),
        (7, 33, 5, 192),
        (2, 9, 256, 256),
        (40, 2, 100, 600),
    ],
)
def test_parts_in_whole_pages_add_up_to_the_workspace(steps, count, width, hidden):
    inputs, workspace = run_layer(steps, count, width, hidden)
    parts = paged_parts(inputs, workspace.nbytes)
    assert is_workspace("aten.mkldnn_rnn_layer", workspace)
    assert len(parts) == 7
    assert sum(-(-part // PAGE_BYTES) * PAGE_BYTES for part in parts) == workspace.nbytes


@needs_onednn
def test_parts_are_proportional_to_the_number_of_sequences():
    one, many = (paged_parts(inputs, workspace.nbytes) for inputs, workspace in (run_layer(6, count, 9, 20) for count in (1, 50)))
    assert many == tuple(50 * part for part in one)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16")
def test_half_of_the_parts_are_half_as_large_in_bfloat16():
    inputs, workspace = run_layer(9, 32, 48, 48, torch.bfloat16)
    halved, whole = paged_parts(inputs, workspace.nbytes), paged_parts(*_single(9, 32, 48, 48))
    assert [2 * half == full for half, full in zip(halved, whole, strict=True)] == [True, False, False, True, False, False, False]


def _single(*shape):
    inputs, workspace = run_layer(*shape)
    return inputs, workspace.nbytes


@needs_onednn
def test_a_workspace_that_does_not_add_up_has_no_known_parts():
    inputs, workspace = run_layer(4, 3, 5, 6)
    assert paged_parts(inputs, workspace.nbytes + PAGE_BYTES) == ()
    assert paged_parts((*inputs[:9], GRU, *inputs[10:]), workspace.nbytes) == ()
    assert paged_parts(inputs[:9], workspace.nbytes) == ()
