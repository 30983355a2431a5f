"""Powers of two, tested instead of believed in: is one faster than the sizes beside it?"""

from collections.abc import Sequence

import numpy as np

from rightbatch.fits.intervals import median_estimate
from rightbatch.records.estimates import PowerOfTwo
from rightbatch.records.measurements import StepTimePoint

_SMALLEST = 16
"""Below it one sample more or less is too large a change."""
_STEP = 8
_BOOTSTRAP_SEED = 20240608


def neighbours(knee: int, largest: int) -> tuple[int, ...]:
    """The largest power of two b up to the knee, with b - 1, b + 1 and b + 8; none when they do not fit below ``largest``.

    Args:
        knee: Micro-batch size near which the test matters.
        largest: Largest micro-batch that may be timed.
    """
    size = 1 << (max(knee, 1).bit_length() - 1)
    while size + _STEP > largest and size >= _SMALLEST:
        size //= 2
    return (size - 1, size, size + 1, size + _STEP) if size >= _SMALLEST else ()


def fit_power_of_two(points: Sequence[StepTimePoint]) -> PowerOfTwo | None:
    """Ratios of step times round by round, with bootstrap 95 % intervals over the rounds.

    The mean of b - 1 and b + 1 is what a smooth law gives at b, to second order. The multiple of eight is compared by its time a sample,
    which falls a little with the size below the knee.

    Args:
        points: Sizes b - 1, b, b + 1 and b + 8, each with as many rounds.

    Returns:
        None without points.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if not points:
        return None
    below, power, above, multiple = points
    times = {point.micro_batch_size: np.asarray(point.step_times_s) for point in points}
    size, further = power.micro_batch_size, multiple.micro_batch_size
    between = (times[below.micro_batch_size] + times[above.micro_batch_size]) / 2
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    return PowerOfTwo(
        size=size,
        relative_time=median_estimate((times[size] / between).tolist(), rng),
        multiple_of_eight=further,
        multiple_relative_time=median_estimate((times[further] / further / (times[size] / size)).tolist(), rng),
    )
