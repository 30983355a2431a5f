"""Which samples each batch holds, and how far the training has come: the part of the loader that is saved."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from rightbatch.errors import UsageError
from rightbatch.training.batch_schedule import SettingSource

_STATE_VERSION = 1


class DrawnBatch(NamedTuple):
    """One rank's share of a global batch, on its way to whatever fetches it."""

    epoch: int
    start: int
    """Samples of the epoch in front of the global batch."""
    indices: list[int]
    """Of this rank's samples in the dataset."""


class ScheduledSampler:
    """Draws the batches of one epoch after another, each at the size its schedule says when it is drawn.

    Workers fetch ahead: a batch is first drawn, later delivered. The position is that of the delivered samples, and the sizes of batches
    that were drawn and not delivered are kept, so that whoever starts again from the position draws these very batches.

    Args:
        dataset_size: Samples in the dataset.
        batch_size: Size of every global batch, in samples, where there is no schedule.
        schedule: Says the size of a global batch by the samples drawn before it.
        shuffle: Whether an epoch's order is random; it is then a function of the seed and the epoch alone.
        seed: Seed of the orders.
        rank: Number of this process among those that share a global batch.
        world_size: How many those are.
        drop_last: Whether a last batch that is smaller than the schedule says is left out.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        *,
        schedule: SettingSource | None,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ) -> None:
        self._identity = {"dataset_size": dataset_size, "seed": seed, "shuffle": shuffle, "drop_last": drop_last}
        self._dataset_size, self._batch_size, self._schedule = dataset_size, batch_size, schedule
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._rank, self._world_size = rank, world_size
        self._pending: deque[int] = deque()
        self.epoch = 0
        self.position = 0
        """Samples of the epoch that were delivered, over all ranks."""
        self.samples_seen = 0
        """Samples that were delivered, over all epochs and ranks."""
        next(self._sizes_left(self._size_at(copy.deepcopy(schedule))))  # raises where there cannot be a batch

    def __iter__(self) -> Iterator[DrawnBatch]:
        """Draw what is left of the epoch, from the delivered position on."""
        order = self._order()
        start, known = self.position, len(self._pending)
        for number, size in enumerate(self._sizes_left(self._size_at(self._schedule))):
            if number >= known:
                self._pending.append(size)
            yield DrawnBatch(self.epoch, start, order[self._share(start, size)].tolist())
            start += size

    def deliver(self) -> int:
        """Count the earliest batch that is pending as delivered; return its global size in samples."""
        size = self._pending.popleft()
        self.position += size
        self.samples_seen += size
        return size

    def start_next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch += 1
        self.position = 0
        self._pending.clear()

    @property
    def is_exhausted(self) -> bool:
        """Whether the epoch has no further batch by the present schedule; nothing is drawn by asking."""
        return next(self._sizes_left(self._size_at(copy.deepcopy(self._schedule))), None) is None

    def batches_left(self) -> int:
        """Return how many batches the epoch still has by the present schedule; nothing is drawn by asking."""
        if self._schedule is not None or self._pending:
            return len(self._foreseen())
        whole, rest = divmod(self._dataset_size - self.position, self._batch_size)
        has_tail = not self._drop_last and (rest >= self._world_size or (whole == 0 and rest > 0))
        return whole + has_tail

    def epoch_samples(self) -> int:
        """Return how many samples the epoch delivers in all by the present schedule; nothing is drawn by asking."""
        return self.position + sum(self._foreseen()) if self._drop_last else self._dataset_size

    def _foreseen(self) -> list[int]:
        return list(self._sizes_left(self._size_at(copy.deepcopy(self._schedule))))

    def state_dict(self) -> dict[str, object]:
        """Return where the training is, in plain numbers and lists."""
        position = {"epoch": self.epoch, "position": self.position, "samples_seen": self.samples_seen, "pending": list(self._pending)}
        return {"version": _STATE_VERSION, **position, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a saved state is.

        Raises:
            UsageError: The state is of another order of samples, or of another version.
        """
        wanted = {"version": _STATE_VERSION, **self._identity}
        got = {key: state.get(key) for key in wanted}
        if got != wanted:
            names = [key for key in wanted if got[key] != wanted[key]]
            raise UsageError(
                f"a loader's state must be of a loader with the same {', '.join(names)}; got {', '.join(str(got[name]) for name in names)} "
                f"for {', '.join(str(wanted[name]) for name in names)}; build the loader as the saved one was, or start without the state."
            )
        self.epoch, self.position, self.samples_seen = state["epoch"], state["position"], state["samples_seen"]
        self._pending = deque(state["pending"])

    def _sizes_left(self, size_at: Callable[[int], int]) -> Iterator[int]:
        start = self.position
        samples_before_epoch = self.samples_seen - self.position
        for size in list(self._pending):
            yield self._checked(size, start)
            start += size
        while start < self._dataset_size:
            wanted, left = size_at(samples_before_epoch + start), self._dataset_size - start
            if self._drop_last and wanted > left:
                self._check_not_all_is_dropped(wanted, start)
                return
            size = left if left - wanted < self._world_size and not self._drop_last else wanted  # too small a tail joins
            yield self._checked(size, start)
            start += size

    def _size_at(self, schedule: SettingSource | None) -> Callable[[int], int]:
        if schedule is None:
            return lambda _: self._batch_size
        return lambda samples_seen: schedule.setting_at(samples_seen).global_batch_size

    def _checked(self, size: int, start: int) -> int:
        if size < self._world_size:
            raise UsageError(
                f"a global batch must hold a sample for each of the {self._world_size} ranks; got {size} after {start} samples of epoch "
                f"{self.epoch}; take a larger batch, more samples or fewer ranks."
            )
        return size

    def _check_not_all_is_dropped(self, wanted: int, start: int) -> None:
        if start == 0:
            raise UsageError(
                f"with drop_last the dataset must fill one batch; got {self._dataset_size} samples for a batch of {wanted}; take a smaller "
                "batch or drop_last=False."
            )

    def _share(self, start: int, size: int) -> slice:
        """This rank's part of a global batch: contiguous, the first ranks with one sample more where it does not come out even."""
        each, more = divmod(size, self._world_size)
        first = start + self._rank * each + min(self._rank, more)
        return slice(first, first + each + (self._rank < more))

    def _order(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        if not self._shuffle:
            return np.arange(self._dataset_size)
        return np.random.default_rng((self._seed, self.epoch)).permutation(self._dataset_size)
