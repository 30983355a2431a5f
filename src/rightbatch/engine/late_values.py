"""Numbers computed on a device and read later, so that the host need not wait for them."""

from collections import deque
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

_MOST_WAITING = 256
"""Vectors held on a device that cannot copy beside its work; then the host waits for the oldest."""


class _Arrival(Protocol):
    """The event after a copy."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class LateValues:
    """Vectors on their way to the host, first in, first out.

    A CUDA device copies them into pinned memory beside its other work; an event tells when each has arrived.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, _Arrival | None]] = deque()

    def put(self, vector: Float[Tensor, " value"]) -> None:
        """Send a vector off; it must not be changed afterwards."""
        if vector.device.type != "cuda":
            self._waiting.append((vector, None))
            return
        with torch.cuda.device(vector.device):
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            on_host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)
            arrived.record()
        self._waiting.append((on_host, arrived))

    def take(self, *, wait: bool) -> list[list[float]]:
        """Return the vectors that have arrived, in order; with ``wait``, all of them.

        Without ``wait`` this makes the host wait only when more than 256 vectors pile up on a device that is neither CPU nor CUDA.
        """
        taken = []
        while self._waiting:
            vector, arrived = self._waiting[0]
            if arrived is not None and wait:
                arrived.synchronize()
            elif arrived is not None:
                if not arrived.query():
                    break
            elif not wait and vector.device.type != "cpu" and len(self._waiting) <= _MOST_WAITING:
                break
            taken.append(vector.tolist())
            self._waiting.popleft()
        return taken
