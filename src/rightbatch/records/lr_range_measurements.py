"""What the learning-rate range test saw: losses at rates that grow, then at a few fixed ones."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from rightbatch.records.record import Record


class LrRangePoint(Record):
    """One learning rate: a step of the sweep, or a short run at it."""

    lr: PositiveFloat
    smoothed_loss: float | None
    """Moving average up to this step of the sweep, or mean over ``tail_losses``; none when it was not finite."""
    samples: PositiveInt
    """Training samples of the run, or of the sweep up to this step."""
    diverged: bool
    """Whether the loss was not finite, or rose above the limit beyond which the test takes no rate further."""
    tail_losses: tuple[float, ...] = ()
    """Mean losses of the last batches of a run, each before its update; empty for a step of the sweep and for a run that diverged."""


class LrRangeRound(Record):
    """Short runs of equal samples from one checkpoint over the same batches in the same order."""

    still_losses: tuple[float, ...]
    """Losses of the batches of ``tail_losses`` at the checkpoint itself."""
    runs: tuple[LrRangePoint, ...]


class LrRangeMeasurements(Record):
    """A sweep of growing rates, then rounds of fixed ones."""

    batch_size: PositiveInt
    optimizer: str
    pilot_samples: NonNegativeInt
    """Samples between the first weights and the checkpoint that the runs start from."""
    sweep: tuple[LrRangePoint, ...]
    """From the first weights, ascending."""
    rounds: tuple[LrRangeRound, ...]
    """The first holds every rate; each later one the rates that survived, over other batches."""
    stopped_by: Literal["decided", "budget", "failure"]
    """Why no further rate was tried: none was asked for, the time ended, or nothing could be trained at all."""
    remark: str = ""
