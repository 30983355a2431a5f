"""What the learning-rate range test concluded."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from rightbatch.records.estimates import Estimate, Status
from rightbatch.records.record import Record


class LrVerdict(Record):
    """What one fixed rate did in comparison with the best."""

    lr: PositiveFloat
    loss: float | None
    """Mean loss at the end of its runs; none when it diverged."""
    excess: Estimate | None
    """Loss over that of the best rate, on the same batches; none when it diverged."""
    is_tied: bool
    """Whether it cannot be told from the best rate."""


class LrRange(Record):
    """A learning rate that short runs chose, at one batch size."""

    value: float | None
    low: float | None
    """Half a step of the grid below the smallest rate that ties with the best; none when no smaller rate was seen to do worse."""
    high: float | None
    """Half a step of the grid above the largest; none when no larger rate was seen to do worse."""
    n: NonNegativeInt
    """Training samples of all runs together."""
    status: Status
    batch_size: PositiveInt
    optimizer: str
    divergence_edge: PositiveFloat | None
    """Smallest rate that diverged above all that did not; none when none did."""
    verdicts: tuple[LrVerdict, ...]
    """In ascending order of the rate."""
    remarks: tuple[str, ...] = ()
