"""What fixed sizes and batch schedules cost along a run whose noise scale changes.

Symbols: b global batch size, B noise scale, c = B_crit / B, t(b) step time, p progress: the steps that a noiseless run would need.
A step at size b makes progress 1 / (1 + c B / b).
"""

from dataclasses import dataclass

import numpy as np

from rightbatch.fits.batch_schedule import setting_at
from rightbatch.fits.intervals import FloatArray
from rightbatch.records.schedule import BatchSchedule, NoiseAdaptive

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class RunDraws:
    """Draws of a run and of the device: rows are draws.

    Attributes:
        critical: c B along the run, shape (draws, cells).
        progress: Of each cell, shape (draws, cells).
        sizes: Global batch sizes considered, ascending, shape (sizes,).
        step_time_s: At each, shape (draws, sizes).
    """

    critical: FloatArray
    progress: FloatArray
    sizes: FloatArray
    step_time_s: FloatArray

    @classmethod
    def along(
        cls, critical: FloatArray, reference_size: float, total_samples: int, sizes: FloatArray, step_time_s: FloatArray
    ) -> "RunDraws":
        """A run whose noise is known by cells of equal samples at a reference size: each holds dp = dx / (b0 + c B)."""
        return cls(critical, total_samples / critical.shape[1] / (reference_size + critical), sizes, step_time_s)

    def fixed(self) -> tuple[FloatArray, FloatArray]:
        """Time and samples of every fixed size, shape (draws, sizes): S(b) = P + Q / b with P = sum dp, Q = sum dp c B."""
        noiseless, noisy = self.progress.sum(axis=1), (self.progress * self.critical).sum(axis=1)
        steps = noiseless[:, None] + noisy[:, None] / self.sizes[None, :]
        return np.asarray(steps * self.step_time_s), np.asarray(steps * self.sizes[None, :])

    def scheduled(self, chosen: IntArray) -> tuple[FloatArray, FloatArray]:
        """Time and samples of a schedule that takes size number ``chosen`` in each cell, one number a draw each."""
        steps = self.progress * (1 + self.critical / self.sizes[chosen])
        times_s = np.take_along_axis(self.step_time_s, chosen, axis=1)
        return np.asarray((steps * times_s).sum(axis=1)), np.asarray((steps * self.sizes[chosen]).sum(axis=1))

    def best(self) -> IntArray:
        """Number of the size of least time in each cell, shape (draws, cells): the least that any schedule can take."""
        costs = (1 + self.critical[:, :, None] / self.sizes) * self.step_time_s[:, None, :]
        return np.asarray(costs.argmin(axis=2))

    def by_samples(self, schedule: BatchSchedule) -> IntArray:
        """Numbers of the sizes of a schedule that depends on samples alone: cells one after the other, samples added up."""
        seen = np.zeros(len(self.critical))
        chosen = np.empty(self.critical.shape, dtype=np.int64)
        for cell in range(self.critical.shape[1]):
            chosen[:, cell] = self.nearest(np.array([setting_at(schedule, int(x)).global_batch_size for x in seen], dtype=np.float64))
            size = self.sizes[chosen[:, cell]]
            seen += self.progress[:, cell] * (size + self.critical[:, cell])
        return chosen

    def by_noise(self, schedule: NoiseAdaptive, relative_calibration: float) -> IntArray:
        """Numbers of the sizes that the noise-adaptive rule takes in each cell.

        Args:
            schedule: Its bounds and b_half.
            relative_calibration: Its c over the true one, the same in all draws: an error of c misleads the choice of a fixed size as well.
        """
        wanted = np.sqrt(relative_calibration * schedule.half_saturation * self.critical)
        return self.nearest(np.clip(wanted, schedule.smallest, schedule.largest))

    def nearest(self, sizes: FloatArray) -> IntArray:
        """Numbers of the nearest sizes, in ratio."""
        middles = np.log(self.sizes[1:] * self.sizes[:-1]) / 2
        return np.asarray(np.searchsorted(middles, np.log(sizes)))
