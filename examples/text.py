"""A tiny transformer that tells from which module of Python's standard library a line of source code was taken.

Run: rightbatch find examples/text.py:workload

The text is on every machine that has Python, so nothing is downloaded; it differs a little between versions of Python. The task
is made up to have text of unequal lengths and a model that is not a CNN: lines such as "return result" cannot be told apart.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

import rightbatch as rb

MODULES = ("_pydecimal", "argparse", "difflib", "pickletools", "statistics", "subprocess", "tarfile", "typing")
LONGEST = 80  # bytes of a line that are read
PADDING = 0  # a byte that no line contains


class Net(nn.Module):
    """Bytes and positions -> one transformer layer -> mean over the bytes -> classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width, padding_idx=PADDING)
        self.positions = nn.Embedding(LONGEST, width)
        self.encoder = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True)
        self.classes = nn.Linear(width, len(MODULES))

    def forward(self, lines: Tensor) -> Tensor:
        padding = lines == PADDING
        hidden = self.bytes(lines) + self.positions.weight[: lines.shape[1]]
        hidden = self.encoder(hidden, src_key_padding_mask=padding).masked_fill(padding.unsqueeze(-1), 0.0)
        return self.classes(hidden.sum(dim=1) / (~padding).sum(dim=1, keepdim=True))


def labelled_lines() -> list[tuple[Tensor, int]]:
    """Read the modules' lines of 16 bytes or more, without indentation, each with the number of its module."""
    samples = []
    for label, module in enumerate(MODULES):
        source = Path(importlib.util.find_spec(module).origin).read_bytes()
        lines = (line.strip()[:LONGEST] for line in source.splitlines())
        samples += [(torch.tensor(list(line)), label) for line in lines if len(line) >= 16]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    return [samples[index] for index in order]


def pad(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Make one batch: lines are filled up to the longest one among them."""
    lines, labels = zip(*samples, strict=True)
    return nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=PADDING), torch.tensor(labels)


def workload(width: int = 32) -> rb.Workload:
    """A tiny transformer on lines of Python."""
    samples = labelled_lines()
    return rb.Workload(
        model=lambda: Net(width),
        train=samples[len(samples) // 5 :],
        valid=samples[: len(samples) // 5],
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
        lr_batch_size=64,
        collate_fn=pad,
        metric=lambda scores, labels: (scores.argmax(dim=1) == labels).float().mean().item(),
    )
