"""The loader: batches at the size that the plan or its schedule says, every sample once an epoch, wherever the training is interrupted."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from rightbatch.engine.loader_workers import end_workers, workers_are_alive
from rightbatch.errors import UsageError
from rightbatch.records.plan import BatchPlan
from rightbatch.training.batch_sampler import ScheduledSampler
from rightbatch.training.batch_schedule import SettingSource
from rightbatch.training.seeded_fetch import SeededFetch
from rightbatch.workload.ingredients import Batch, SizedDataset, check_dataset


class BatchLoader:
    """Loads a dataset in global batches of the plan's size, or of whatever size a schedule asks for at that point of the training.

    A whole training, which goes on from ``checkpoint.pt`` if there is one::

        plan = rb.find(workload)
        loader = rb.BatchLoader(dataset, plan, num_workers=2)
        stepper = rb.Stepper(model, optimizer, F.cross_entropy, plan)
        parts = {"model": model, "optimizer": optimizer, "loader": loader, "stepper": stepper}
        if Path("checkpoint.pt").exists():
            for name, state in torch.load("checkpoint.pt", weights_only=True).items():
                parts[name].load_state_dict(state)
        while loader.epoch < 10:
            for batch in loader:
                outcome = stepper(batch, samples=loader.batch_samples)
            print(f"epoch {loader.epoch}: {loader.samples_seen} samples, loss {outcome.loss:.3f}")
            torch.save({name: part.state_dict() for name, part in parts.items()}, "checkpoint.pt")

    One ``for`` is what is left of the epoch: the whole of it, or after ``break`` or ``load_state_dict`` the rest. A batch counts as
    delivered once the body of the ``for`` gets it; what workers fetched ahead does not count, and comes again. The epoch advances when its
    ``for`` ends, so a state saved in the body of the last batch resumes with an empty rest. All iterators of a loader share its place: each
    batch goes to the one that asks first, and all end with the epoch.

    *Order.* A function of the seed and the epoch, whatever the sizes, workers and ranks.

    *Size.* The schedule is asked when a batch is drawn. Workers draw ahead, ``prefetch_factor`` batches each, so a decision taken during
    the training holds after the batches they have begun. The sizes of these are in the state, so a resumed run sees the same ones. Save
    the schedule's state beside the loader's.

    *Random transforms.* Python's, NumPy's and torch's global generators are seeded for every batch, from its place in the training, and
    put back in the training process: samples are the same for any number of workers, and after resuming. A generator that the dataset
    owns is the dataset's to seed.

    *Ranks.* Each global batch is cut into contiguous shares, one a rank, that differ by at most one sample; a tail with fewer samples
    than ranks joins the batch before it. ``batch_samples`` is what the stepper needs to weigh the shares.

    *Last batch.* It may be small. A network with batch normalisation cannot train on one sample per micro-batch: ``drop_last=True``.

    Args:
        dataset: Map-style: a length, and samples by index; ``__getitems__`` is used where it has one.
        plan: What ``rb.find`` returned, or a ``rb.BatchPlan`` of your own.
        schedule: Says the global batch size by samples seen; ``None`` keeps the plan's.
        shuffle: Whether each epoch has a random order of its own.
        seed: Seed of the orders and of random transforms; the same on all ranks.
        num_workers: Processes that load; ``None`` takes the plan's number, 0 where it has none.
        collate_fn: Makes a batch of a list of samples; ``None`` takes ``torch.utils.data.default_collate``.
        drop_last: Whether a last batch that is smaller than asked for is left out of each epoch.
        pin_memory: Whether batches lie in pinned memory; ``None`` pins where CUDA is available.
        prefetch_factor: Batches that each worker fetches ahead; ``None`` takes torch's default, 2.
        persistent_workers: Whether workers stay between epochs. They do not see what is done to the dataset meanwhile.
        worker_init_fn: Called in each worker with its number; there ``get_worker_info().dataset.dataset`` is the dataset.
        multiprocessing_context: How workers start: ``fork``, ``spawn`` or ``forkserver``; ``None`` takes the platform's way.
        timeout_s: Longest wait for a batch from a worker, in seconds; 0 waits for ever.
        rank: Number of this process among those that train together; ``None`` asks ``torch.distributed``, 0 where that is not in use.
        world_size: How many those are; ``None`` likewise.

    Raises:
        UsageError: The plan is for another number of ranks, or an argument cannot be used.
        WorkloadError: The dataset is not map-style, or empty.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        plan: BatchPlan,
        *,
        schedule: SettingSource | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int | None = None,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        drop_last: bool = False,
        pin_memory: bool | None = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = True,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: str | None = None,
        timeout_s: float = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        check_dataset("dataset", dataset)
        rank, world_size = _place(rank, world_size)
        if plan.world_size != world_size:
            raise UsageError(
                f"the plan must be for as many ranks as train; it is for {plan.world_size}, and there are {world_size}; call rb.find under "
                "the same launcher, or give a BatchPlan with that world_size."
            )
        if seed < 0:
            raise UsageError(f"seed must be 0 or more; got {seed}; give any other number.")
        self._sampler = ScheduledSampler(
            len(dataset),
            plan.global_batch_size,
            schedule=schedule,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        workers = (plan.num_workers or 0) if num_workers is None else num_workers
        self._torch_loader: DataLoader[Batch] = DataLoader(
            SeededFetch(dataset, collate_fn or default_collate, seed=seed, rank=rank),
            batch_size=None,
            sampler=self._sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers and workers > 0,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            timeout=timeout_s,
            generator=torch.Generator(),  # else each epoch would draw from the training's own
        )
        self._batches: Iterator[Batch] | None = None
        self._fetched: list[Batch] = []
        self._batch_samples = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's share of each batch that is left of the epoch, collated, on the host."""
        if not workers_are_alive(self._torch_iterator):  # an interrupt ends them too
            self.close()
        return self._rest_of_epoch(self.epoch)

    def __len__(self) -> int:
        """Return how many batches are left of the epoch by the present schedule."""
        return self._sampler.batches_left()

    @property
    def dataset(self) -> SizedDataset:
        """The dataset that is loaded."""
        fetch = self._torch_loader.dataset
        assert isinstance(fetch, SeededFetch), "the constructor wraps the dataset"  # noqa: S101
        return fetch.dataset

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0; it advances when its ``for`` ends."""
        return self._sampler.epoch

    @property
    def epoch_is_delivered(self) -> bool:
        """Whether no batch of the current epoch is left by the present schedule: in the body of the ``for``, whether this is its last."""
        return self._sampler.is_exhausted

    @property
    def epoch_samples_seen(self) -> int:
        """Samples of the current epoch that were delivered, over all ranks."""
        return self._sampler.position

    @property
    def samples_seen(self) -> int:
        """Samples that were delivered, over all epochs and ranks."""
        return self._sampler.samples_seen

    @property
    def samples_per_epoch(self) -> int:
        """Samples that the current epoch delivers over all ranks; with ``drop_last``, by the present schedule."""
        return self._sampler.epoch_samples()

    @property
    def batch_samples(self) -> int:
        """Samples of the batch delivered last, over all ranks; 0 before the first."""
        return self._batch_samples

    def state_dict(self) -> dict[str, object]:
        """Return where the training is, in plain numbers and lists (``torch.load(weights_only=True)`` reads it); the same on all ranks."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the next ``for`` is the rest of its epoch.

        The number of workers may be another one. So may the number of ranks and their shares, but not their transforms.

        Raises:
            UsageError: The state is of another dataset size, seed, ``shuffle`` or ``drop_last``, or of another version.
        """
        self._sampler.load_state_dict(state)
        self._batch_samples = 0
        self._leave_stream()

    def close(self) -> None:
        """End the workers now; a later ``for`` starts new ones and goes on from the same place."""
        end_workers(self._torch_iterator)
        self._batches = self._torch_loader._iterator = None  # noqa: SLF001  # torch would take up workers that have ended

    def _rest_of_epoch(self, epoch: int) -> Iterator[Batch]:
        while self.epoch == epoch and self._fetch():
            yield self._fetched.pop()  # a name for it would keep it in memory while the next is fetched

    def _fetch(self) -> bool:
        """Count a batch as delivered and put it ready; at the epoch's end advance the epoch, and return False."""
        try:
            if self._batches is None:
                self._batches = iter(self._torch_loader)
            self._fetched.append(next(self._batches))
            self._batch_samples = self._sampler.deliver()
        except StopIteration:
            self._leave_stream()
            self._sampler.start_next_epoch()
            return False
        except BaseException:
            self._fetched.clear()
            self.close()
            raise
        return True

    @property
    def _torch_iterator(self) -> object:
        """Torch's iterator; with workers that persist, between epochs too."""
        return self._torch_loader._iterator if self._batches is None else self._batches  # noqa: SLF001

    def _leave_stream(self) -> None:
        """Begin a new stream of batches next time, with the workers of this one if they persist."""
        if self._torch_loader.persistent_workers:
            self._batches = None
        else:
            self.close()


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks, as given or as torch.distributed says."""
    if (rank is None) != (world_size is None):
        raise UsageError(f"rank and world_size are given together or not at all; got {rank} and {world_size}; give both.")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise UsageError(f"rank must be from 0 to world_size - 1; got rank {rank} of {world_size}; number the ranks from 0.")
    return rank, world_size


def _as_it_is(batch: Batch) -> Batch:
    return batch
