"""How long an optimizer step takes at each micro-batch size: interleaved rounds, synchronised, warmed up."""

from collections.abc import Callable, Sequence

from rightbatch.engine.rig import Rig
from rightbatch.engine.step import Trainee, apply_update, backward_mean, clear_gradients, train_step
from rightbatch.records.measurements import Contention, StepTimeMeasurements, StepTimePoint
from rightbatch.workload.ingredients import Batch

_ROUND_S = 0.05
_MOST_ROUNDS = 60
_FEWEST_ROUNDS = 3
_FEWEST_NEIGHBOUR_ROUNDS, _MOST_NEIGHBOUR_ROUNDS = 5, 15
_GAIN_THAT_COUNTS = 1.03


def contention(rig: Rig) -> Contention:
    """Measure what else uses the machine."""
    return rig.meters.contention()


def scan(rig: Rig, *, largest: int, budget_s: float, affordable_step_s: float) -> tuple[tuple[int, float], ...]:
    """Time sizes 1, 2, 4, ... once each, until more samples no longer raise the throughput, or the budget ends.

    Args:
        rig: The workload on its device.
        largest: Largest size to try.
        budget_s: Seconds the scan may take.
        affordable_step_s: No size is tried whose step would take longer, going by the last one.

    Returns:
        (size, seconds of one step) in ascending order; at least one pair.
    """
    clock = rig.meters.clock
    trainee = rig.new_trainee()
    end_s = clock.now_s() + budget_s
    found: list[tuple[int, float]] = []
    size = min(largest, _smallest(rig))
    while True:
        rig.say(f"scanning: {size} samples a step")
        batch = rig.typical_batch(size)
        train_step(trainee, [batch])
        found.append((size, _mean_step_s(rig, trainee, batch, steps=1)))
        following = min(2 * size, largest)
        next_s = found[-1][1] * following / size
        if size >= largest or _is_flat(found) or next_s > affordable_step_s or clock.now_s() + 2 * next_s > end_s:
            return tuple(found)
        size = following


def _smallest(rig: Rig) -> int:
    """Two samples: batch normalisation cannot train on one."""
    return min(2, rig.train_size)


def _is_flat(found: Sequence[tuple[int, float]]) -> bool:
    """Whether three doublings in a row brought no throughput."""
    rates = [size / seconds for size, seconds in found]
    return len(rates) > 6 and max(rates[-3:]) < _GAIN_THAT_COUNTS * max(rates[:-3])


def measure(
    rig: Rig,
    sizes: Sequence[int],
    *,
    is_decided: Callable[[StepTimeMeasurements], bool],
    budget_s: float,
    machine: Contention,
    largest_affordable: int | None,
) -> StepTimeMeasurements:
    """Time every size in interleaved rounds until the intervals decide or the budget ends; at least three rounds.

    After three rounds, a size that has used more than its equal share of the budget sits the others out: one slow size must not
    leave the fast ones with a handful of rounds, which one disturbance can spoil.

    Args:
        rig: The workload on its device.
        sizes: Micro-batch sizes, in samples.
        is_decided: Says whether the measurements so far are precise enough.
        budget_s: Seconds the rounds may take.
        machine: What else used the machine, kept beside the times.
        largest_affordable: Kept beside the times.
    """
    clock = rig.meters.clock
    trainee = rig.new_trainee()
    batches = {size: rig.typical_batch(size) for size in sizes}
    tallies = {size: _Tally(_steps_in_a_round(rig, trainee, batches[size])) for size in sizes}
    optimizer_times: list[float] = []
    start_s = clock.now_s()
    last_s = 0.0
    while True:
        rounds = len(optimizer_times) + 1
        rig.say(f"round {rounds} over {len(sizes)} sizes")
        for size, tally in tallies.items():
            if rounds <= _FEWEST_ROUNDS or tally.spent_s <= budget_s / len(sizes):
                tally.add_round(rig, trainee, batches[size])
        optimizer_times.append(_optimizer_s(rig, trainee, batches[sizes[0]]))
        measured = StepTimeMeasurements(
            points=tuple(tally.point(size) for size, tally in tallies.items()),
            optimizer_times_s=tuple(optimizer_times),
            contention=machine,
            largest_affordable=largest_affordable,
        )
        elapsed_s = clock.now_s() - start_s
        is_over = rounds >= _FEWEST_ROUNDS and elapsed_s + (elapsed_s - last_s) > budget_s
        last_s = elapsed_s
        if is_over or rounds >= _MOST_ROUNDS or is_decided(measured):
            return measured


def measure_neighbours(rig: Rig, sizes: Sequence[int], *, budget_s: float) -> tuple[StepTimePoint, ...]:
    """Time a few sizes that lie close together, in interleaved rounds: five at least, fifteen at most, until the budget ends.

    Args:
        rig: The workload on its device.
        sizes: Micro-batch sizes, in samples.
        budget_s: Seconds the rounds may take.

    Returns:
        One point a size, in the order of ``sizes``; equal places in ``step_times_s`` belong to one round.
    """
    clock = rig.meters.clock
    end_s = clock.now_s() + budget_s
    trainee = rig.new_trainee()
    batches = {size: rig.typical_batch(size) for size in sizes}
    tallies = {size: _Tally(_steps_in_a_round(rig, trainee, batches[size])) for size in sizes}
    for rounds in range(_MOST_NEIGHBOUR_ROUNDS):
        if rounds >= _FEWEST_NEIGHBOUR_ROUNDS and clock.now_s() > end_s:
            break
        rig.say(f"powers of two: round {rounds + 1}")
        for size, tally in tallies.items():
            tally.add_round(rig, trainee, batches[size])
    return tuple(tally.point(size) for size, tally in tallies.items())


class _Tally:
    """Rounds of one size."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._times_s: list[float] = []
        self._joules: list[float] = []

    @property
    def spent_s(self) -> float:
        """Seconds of all rounds."""
        return sum(self._times_s) * self._steps

    def add_round(self, rig: Rig, trainee: Trainee, batch: Batch) -> None:
        """Time one round, and count its energy where that is counted. A short round begins with a step that is not timed."""
        if self._steps > 1:
            train_step(trainee, [batch])
        energy = rig.meters.energy
        start_j = 0.0 if energy is None else energy.energy_j()
        self._times_s.append(_mean_step_s(rig, trainee, batch, steps=self._steps))
        if energy is not None:
            self._joules.append((energy.energy_j() - start_j) / self._steps)

    def point(self, size: int) -> StepTimePoint:
        """Return the rounds as a record; energy only if every round used some."""
        joules = tuple(self._joules) if all(value > 0 for value in self._joules) else ()
        return StepTimePoint(micro_batch_size=size, step_times_s=tuple(self._times_s), energy_per_step_j=joules)


def _steps_in_a_round(rig: Rig, trainee: Trainee, batch: Batch) -> int:
    """Warm a size up, and return how many steps fill a twentieth of a second."""
    train_step(trainee, [batch])
    return max(1, min(50, int(_ROUND_S / max(_mean_step_s(rig, trainee, batch, steps=1), 1e-6))))


def _mean_step_s(rig: Rig, trainee: Trainee, batch: Batch, *, steps: int) -> float:
    start_s = rig.meters.clock.now_s()
    for _ in range(steps):
        train_step(trainee, [batch])
    return max((rig.meters.clock.now_s() - start_s) / steps, 1e-9)


def _optimizer_s(rig: Rig, trainee: Trainee, batch: Batch) -> float:
    """Return the seconds of one update, measured apart from forward and backward."""
    clear_gradients(trainee)
    backward_mean(trainee, [batch])
    start_s = rig.meters.clock.now_s()
    apply_update(trainee)
    return max(0.0, rig.meters.clock.now_s() - start_s)
