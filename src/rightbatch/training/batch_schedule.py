"""The batch schedule of a training: one piecewise-constant function of samples, which the loader and the stepper both ask."""

from collections.abc import Mapping
from typing import Any, Protocol

from rightbatch.errors import UsageError
from rightbatch.fits.batch_schedule import latest_noise, next_size, setting_at
from rightbatch.records.estimates import NoiseScale, Status
from rightbatch.records.schedule import BatchSchedule, BatchSetting, NoiseAdaptive, SizeDecision

_STATE_VERSION = 1


class SettingSource(Protocol):
    """What says which size, rate and company the step after so many samples trains with."""

    def setting_at(self, samples_seen: int) -> BatchSetting:
        """Return the setting of the step that begins after ``samples_seen`` samples, counted over all epochs and ranks."""
        ...


class DynamicBatch:
    """A batch schedule in use: give the same one to the loader and to the stepper.

    All kinds but the noise-adaptive one depend on the samples alone. A noise-adaptive schedule takes decisions; each holds from beyond the
    last position that anyone has asked about, so that a loader which draws ahead and a stepper which follows see the same sizes::

        schedule = rb.DynamicBatch(configured)
        for batch in loader:          # BatchLoader(..., schedule=schedule)
            stepper(batch)            # Stepper(..., schedule=schedule)
            schedule.decide(stepper.monitor.noise_scale)

    On several ranks every rank holds one and takes the same decisions at the same steps, from the same reduced noise.

    Args:
        schedule: Of any kind.
    """

    def __init__(self, schedule: BatchSchedule) -> None:
        self._schedule = schedule
        self._decisions: list[SizeDecision] = []
        self._frontier = -1

    @property
    def schedule(self) -> BatchSchedule:
        """The schedule as it was configured."""
        return self._schedule

    @property
    def decisions(self) -> tuple[SizeDecision, ...]:
        """Decisions so far, ascending in samples; none for schedules that take none."""
        return tuple(self._decisions)

    @property
    def is_adaptive(self) -> bool:
        """Whether ``decide`` can change anything."""
        return isinstance(self._schedule, NoiseAdaptive)

    def setting_at(self, samples_seen: int) -> BatchSetting:
        """What the step that begins after ``samples_seen`` samples trains with; once told, it never changes.

        Raises:
            UsageError: The position is negative.
        """
        if samples_seen < 0:
            raise UsageError(f"samples_seen counts the samples of the run so far, so it must be at least 0; got {samples_seen}.")
        self._frontier = max(self._frontier, samples_seen)
        return setting_at(self._schedule, samples_seen, self._decisions)

    def decide(self, noise: NoiseScale) -> bool:
        """Go over to another size if the latest noise scale asks for one; return whether it does.

        Args:
            noise: Of the run, such as ``NoiseMonitor.noise_scale``; its last snapshot counts.
        """
        if not isinstance(self._schedule, NoiseAdaptive):
            return False
        latest = latest_noise(noise)
        current = self._decisions[-1].global_batch_size if self._decisions else self._schedule.start
        size = next_size(self._schedule, current, latest)
        if size == current:
            return False
        scale = latest.low if latest.status is Status.AT_LEAST else latest.value
        decision = SizeDecision(samples_seen=self._frontier + 1, global_batch_size=size, noise_scale_samples=scale)
        if self._decisions and self._decisions[-1].samples_seen == decision.samples_seen:
            self._decisions.pop()  # nobody has asked about it yet
        self._decisions.append(decision)
        return True

    def state_dict(self) -> dict[str, object]:
        """Return the decisions and how far anyone has asked, in plain numbers and lists (``torch.load(weights_only=True)`` reads it)."""
        return {
            "version": _STATE_VERSION,
            "kind": self._schedule.kind,
            "frontier": self._frontier,
            "decisions": [[d.samples_seen, d.global_batch_size, d.noise_scale_samples] for d in self._decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; decisions taken here before are dropped.

        Raises:
            UsageError: The state is of another version or of another kind of schedule.
        """
        if state.get("version") != _STATE_VERSION or state.get("kind") != self._schedule.kind:
            raise UsageError(
                f"a schedule's state must be of version {_STATE_VERSION} and of the same kind; got version {state.get('version')} of "
                f"{state.get('kind')} for {self._schedule.kind}; resume with the schedule that the training began with."
            )
        self._frontier = int(state["frontier"])
        self._decisions = [
            SizeDecision(samples_seen=samples, global_batch_size=size, noise_scale_samples=scale)
            for samples, size, scale in state["decisions"]
        ]
