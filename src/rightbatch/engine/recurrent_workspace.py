"""The workspace of oneDNN's LSTM: parts of the layer's states and gates, each of which starts on a page of its own.

One call of ``aten.mkldnn_rnn_layer`` is one layer in one direction over T steps of b sequences, with I inputs and H hidden values. In
training it keeps, for the backward pass, in elements of e bytes and with rows padded by ``_row_bytes``

    gates T b 4H · hidden T b H · states 2 (T + 1) b max(I, H) · cells 2 (T + 1) b H
    gradients, always in 4 bytes: of states and of layers 2 (T + 1) b max(I, H) each · of cells 2 (T + 1) b H

Source: ``set_conf``, ``get_good_ld`` and ``set_offsets`` of oneDNN's ``src/cpu/rnn/rnn_utils``; version 3.12 was compared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PAGE_BYTES = 4096
_OPERATION = "aten.mkldnn_rnn_layer"
_LSTM = 2
_ROW_ALIGNMENT_BYTES = 64
_ALIASING_ELEMENTS = 256
_GRADIENT_BYTES = 4


def is_workspace(operation: str, result: Tensor) -> bool:
    """Whether what an operation returned is such a workspace."""
    return operation == _OPERATION and result.dtype is torch.uint8


def paged_parts(inputs: Sequence[object], size_bytes: int) -> tuple[int, ...]:
    """Return the bytes of the parts of a workspace before each is rounded up to pages.

    Args:
        inputs: What the operation was given.
        size_bytes: Size of the workspace.

    Returns:
        The parts; none when the layer is no LSTM, or the size is not what the parts add up to.
    """
    if len(inputs) < 10 or inputs[9] != _LSTM:
        return ()
    sequences, weight = inputs[0], inputs[2]
    if not isinstance(sequences, Tensor) or not isinstance(weight, Tensor) or sequences.ndim != 3:
        return ()
    steps, count, width = sequences.shape
    hidden, size = weight.shape[1], sequences.element_size()
    widest = max(width, hidden)
    kept, gradients = (2 * (steps + 1) * count * _row_bytes(widest, bytes_) for bytes_ in (size, _GRADIENT_BYTES))
    cells = 2 * (steps + 1) * count * hidden
    parts = (
        steps * count * _row_bytes(4 * hidden, size),
        steps * count * _row_bytes(hidden, size),
        kept,
        cells * size,
        gradients,
        gradients,
        cells * _GRADIENT_BYTES,
    )
    return parts if sum(-(-part // PAGE_BYTES) for part in parts) * PAGE_BYTES == size_bytes else ()


def _row_bytes(length: int, element_bytes: int) -> int:
    """Bytes of a row, in whole cache lines, and one more where rows would otherwise fall on the same cache sets."""
    alignment = _ROW_ALIGNMENT_BYTES // element_bytes
    padded = -(-length // alignment) * alignment
    return (padded + alignment if padded % _ALIASING_ELEMENTS == 0 else padded) * element_bytes
