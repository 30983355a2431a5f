"""The training loop: steps, evaluations, checkpoints and the log, until the samples are used, the target is met or a signal comes."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rightbatch.engine.in_process import users_errors
from rightbatch.records.estimates import Estimate, NoiseScale
from rightbatch.records.training_log import EvaluationLine, EventLine, LogEvent, LogLine, StepLine
from rightbatch.records.training_run import TrainingFolder, TrainingState
from rightbatch.training.assembly import Parts
from rightbatch.training.checkpoint import State, save_checkpoint
from rightbatch.training.loader import BatchLoader
from rightbatch.training.log import TrainingLog
from rightbatch.training.peers import Wishes
from rightbatch.training.progress_words import evaluation_words, step_words
from rightbatch.training.request import KeepGoing, TrainingProgress, TrainingRequest
from rightbatch.training.stepper import StepOutcome
from rightbatch.training.stop_signals import StopSignals
from rightbatch.workload.ingredients import Batch

_MOST_WITHOUT_LOSS = 100
"""Steps in a row without a finite loss that are no accident: a scaler skips them all, and the weights stay finite."""


@dataclass
class _Since:
    """What happened since the last line of the log.

    Attributes:
        started_s: Seconds of training then.
        losses: Mean loss of each step, over this rank's samples, on the device.
        samples: Of each step, over all ranks.
        outcome: Of the last step.
        noise: Measured last.
    """

    started_s: float
    losses: list[Tensor] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    outcome: StepOutcome | None = None
    noise: Estimate | None = None

    def add(self, outcome: StepOutcome) -> None:
        self.losses.append(outcome.mean_loss)
        self.samples.append(outcome.samples)
        self.outcome = outcome

    def summed_losses(self) -> tuple[float, int, int, int]:
        """Sum up; waits for the device.

        Returns:
            Sum of the finite losses times their samples, these samples, the number of infinite losses, and of those that are no number.
        """
        pairs = list(zip(torch.stack(self.losses).tolist(), self.samples, strict=True))
        finite = [(loss, samples) for loss, samples in pairs if math.isfinite(loss)]
        infinite = sum(math.isinf(loss) for loss, _ in pairs)
        total, weight = sum(loss * samples for loss, samples in finite), sum(samples for _, samples in finite)
        return total, weight, infinite, len(pairs) - len(finite) - infinite


@dataclass
class Stopwatch:
    """Seconds of training: stands still while something else is done.

    Attributes:
        clock_s: Where the time comes from.
        before_s: Seconds of the sessions before.
    """

    clock_s: Callable[[], float]
    before_s: float = 0.0
    _started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._started_s = self.clock_s()

    @property
    def elapsed_s(self) -> float:
        """Seconds so far."""
        return self.before_s + self.clock_s() - self._started_s

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Count nothing of what is done within."""
        start_s = self.clock_s()
        try:
            yield
        finally:
            self._started_s += self.clock_s() - start_s


class TrainingLoop:
    """One session of a training; all ranks run one.

    Args:
        parts: What is trained.
        request: How.
        total_samples: Where to end.
        log: Takes lines; none on every rank but the first.
        folder: Where checkpoints go; none where nothing is kept.
        fingerprint: Of the training, for its checkpoints.
        progress: Where to say how it goes.
        signals: What may end it.
        keep_going: Asked on the first rank after each evaluation; the training ends where it says no.
        clock_s: Clock of the training time, the log and the checkpoints, in seconds.
    """

    def __init__(
        self,
        parts: Parts,
        request: TrainingRequest,
        *,
        total_samples: int,
        log: TrainingLog | None,
        folder: TrainingFolder | None,
        fingerprint: str,
        progress: TrainingProgress,
        signals: StopSignals,
        keep_going: KeepGoing | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = parts
        self._keep_going = keep_going
        self._request = request
        self._total_samples = total_samples
        self._log = log
        self._folder = folder
        self._fingerprint = fingerprint
        self._progress = progress
        self._signals = signals
        self._clock_s = clock_s
        self._watch = Stopwatch(clock_s)
        self._step = 0
        self._size = parts.size_at(0)
        self._micro_batch_size = parts.stepper.micro_batch_size
        self._evaluation: EvaluationLine | None = None
        self._ended: TrainingState | None = None
        self._steps_without_loss = 0
        self._saved_step = -1
        self._saved_s = self._logged_s = clock_s()
        self._since = _Since(0.0)

    def restore(self, state: State, progress: State) -> None:
        """Go on from a checkpoint.

        Args:
            state: Of the parts.
            progress: Of the loop.
        """
        self._parts.load(state)
        self._step = int(str(progress["step"]))
        self._size = int(str(progress["size"]))
        self._micro_batch_size = self._parts.stepper.micro_batch_size
        self._watch = Stopwatch(self._clock_s, before_s=float(str(progress["training_s"])))
        self._since = _Since(self._watch.elapsed_s)
        self._saved_step = self._step
        evaluation = progress["evaluation"]
        self._evaluation = None if evaluation is None else EvaluationLine.model_validate_json(str(evaluation))

    @property
    def is_complete(self) -> bool:
        """Whether all samples have been trained on."""
        return self._parts.stepper.samples_seen >= self._total_samples

    def event(self, event: LogEvent, detail: str = "") -> None:
        """Write that something happened."""
        self._write(EventLine(**self._place(), event=event, detail=detail))

    def run(self) -> TrainingState:
        """Train until the end, and return which one it was."""
        while not self._is_over():
            for batch in batches_left(self._parts.loader):
                self._take_step(batch)
                if self._is_over():
                    break
        self._flush()
        self._evaluate()
        state = self._end()
        if state is not TrainingState.DIVERGED:
            self._save()
        return state

    def _is_over(self) -> bool:
        return self._ended is not None or self.is_complete

    def _end(self) -> TrainingState:
        """How the training ended: as was noted on the way, or with its samples used."""
        if self._ended is not None:
            return self._ended
        return TrainingState.FINISHED if self._request.target is None else TrainingState.TARGET_MISSED

    def _take_step(self, batch: Batch) -> None:
        parts, before = self._parts, self._parts.stepper.samples_seen
        self._note_size(before)
        with users_errors():
            outcome = parts.stepper(batch, samples=parts.loader.batch_samples)
        self._step += 1
        self._since.add(outcome)
        if outcome.micro_batch_size < self._micro_batch_size:
            self.event(LogEvent.OUT_OF_MEMORY, f"micro-batches of {self._micro_batch_size} to {outcome.micro_batch_size}")
            self._micro_batch_size = outcome.micro_batch_size
        if outcome.monitor is not None:
            self._take_in_noise(outcome.monitor.noise_scale)
        now_s = self._clock_s()
        wishes = parts.peers.agree(
            Wishes(
                stop=self._signals.received is not None,
                save=parts.peers.rank == 0 and self._folder is not None and now_s - self._saved_s >= self._request.checkpoint_every_s,
                log=parts.peers.rank == 0 and now_s - self._logged_s >= self._request.log_every_s,
            )
        )
        every = self._request.evaluate_every
        is_due = parts.loader.epoch_is_delivered if every is None else before // every != parts.stepper.samples_seen // every
        if wishes.log or is_due or wishes.stop or wishes.save:
            self._flush()
        if is_due and self._ended is None:
            self._evaluate()
        if wishes.stop and self._ended is None:
            self._ended = TrainingState.INTERRUPTED
            self.event(LogEvent.INTERRUPTED, self._signals.received or "another rank")
        elif wishes.save and self._ended is None:
            self._save()

    def _note_size(self, samples_seen: int) -> None:
        """End the line of the log where the size changes, so that each line is of one size."""
        size = self._parts.size_at(samples_seen)
        if size == self._size:
            return
        self._flush()
        self.event(LogEvent.BATCH_SIZE, f"{self._size} to {size}")
        self._size = size

    def _take_in_noise(self, noise: NoiseScale) -> None:
        if noise.value is not None or noise.low is not None:
            self._since.noise = Estimate(value=noise.value, low=noise.low, high=noise.high, n=noise.n, status=noise.status)
        if self._parts.schedule is not None:
            self._parts.schedule.decide(noise)

    def _flush(self) -> None:
        """Write the line of the steps since the last one; end the training where its loss is not finite."""
        since, outcome = self._since, self._since.outcome
        if outcome is None:
            return
        loss, weight, infinite, no_number = self._parts.peers.totals(since.summed_losses())
        self._steps_without_loss = 0 if weight else self._steps_without_loss + len(since.losses)
        is_broken = infinite > 0 or (no_number > 0 and self._is_lost())
        training_s = self._watch.elapsed_s
        line = StepLine(
            **self._place(),
            global_batch_size=self._size,
            micro_batch_size=outcome.micro_batch_size,
            lr=float(outcome.lr),
            loss=loss / weight if weight and not is_broken else None,
            grad_norm=_finite(outcome.grad_norm),
            samples_per_s=sum(since.samples) / (training_s - since.started_s) if training_s > since.started_s else None,
            noise_scale=since.noise,
        )
        self._write(line)
        self._progress.update("training", self._fraction, step_words(line, self._total_samples, self._evaluation, self._request.target))
        self._since = _Since(training_s)
        self._logged_s = self._clock_s()
        if is_broken:
            self._ended = TrainingState.DIVERGED
            self.event(LogEvent.DIVERGED, "the loss is not finite")

    def _is_lost(self) -> bool:
        """Whether losses that are no number come from the weights, or go on for long; in a single batch it may be that nothing counts."""
        return not weights_are_finite(self._parts.model) or self._steps_without_loss >= _MOST_WITHOUT_LOSS

    def _evaluate(self) -> None:
        parts = self._parts
        samples = parts.stepper.samples_seen
        if parts.evaluator is None or self._ended is not None or (self._evaluation is not None and self._evaluation.samples == samples):
            return
        with self._watch.standing_still(), users_errors():
            found = parts.evaluator.evaluate(parts.average or parts.model, parts.stepper.micro_batch_size)
        line = EvaluationLine(
            **self._place(), loss=found.loss, metric=found.metric, evaluated_samples=found.samples, of_average=parts.average is not None
        )
        self._evaluation = line
        self._write(line)
        target = self._request.target
        self._progress.update("evaluation", self._fraction, evaluation_words(line, target))
        if target is not None and target.is_met_by(line):
            self._ended = TrainingState.TARGET_REACHED
            self.event(LogEvent.TARGET_REACHED, f"{evaluation_words(line, target)} after {samples} samples")
        elif self._keep_going is not None and not parts.peers.share(lambda: self._asked_on(line)):
            self._ended = TrainingState.STOPPED
            self.event(LogEvent.STOPPED, "by the caller")

    def _asked_on(self, line: EvaluationLine) -> bool:
        assert self._keep_going is not None, "only asked where there is somebody to ask"  # noqa: S101
        return bool(self._keep_going(line))

    def _save(self) -> None:
        """Write a checkpoint; all ranks take part, and the first one writes."""
        parts = self._parts
        if self._request.out is None or self._saved_step == self._step:
            return
        with self._watch.standing_still():
            state = parts.state()
            if self._folder is not None and self._log is not None:
                self.event(LogEvent.CHECKPOINT)
                progress: State = {
                    "step": self._step,
                    "samples": parts.stepper.samples_seen,
                    "size": self._size,
                    "training_s": self._watch.elapsed_s,
                    "log_position": self._log.position,
                    "evaluation": None if self._evaluation is None else self._evaluation.model_dump_json(),
                }
                save_checkpoint(self._folder.path, state | {"progress": progress}, step=self._step, fingerprint=self._fingerprint)
        self._saved_step, self._saved_s = self._step, self._clock_s()

    @property
    def _fraction(self) -> float:
        return self._parts.stepper.samples_seen / self._total_samples

    def _place(self) -> dict[str, float]:
        return {"step": self._step, "samples": self._parts.stepper.samples_seen, "training_s": self._watch.elapsed_s}

    def _write(self, line: LogLine) -> None:
        if self._log is not None:
            self._log.write(line)


def weights_are_finite(model: nn.Module) -> bool:
    """Return whether all parameters are finite, so that a loss that is no number may be one of a batch in which nothing counts.

    Waits for the device.
    """
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def batches_left(loader: BatchLoader) -> Iterator[Batch]:
    """Yield what is left of the epoch; errors of the dataset are the user's."""
    batches = iter(loader)
    while True:
        with users_errors():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def _finite(value: Tensor | None) -> float | None:
    if value is None or not bool(torch.isfinite(value)):
        return None
    return float(value)
