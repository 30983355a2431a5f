"""Which trials to run next, given those that have ended: a pure function of settings and results.

The design is written as if every trial were trained when it is asked for. Each time it is run again from the start on the results so
far; a branch of it that needs a result which is not there yet stops, and its trial is one of the next. So what is trained depends on what
came out, never on the order in which it came out.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rightbatch.records.sweep import SweepSettings, TrialResult, TrialSpec, TrialStatus

REACH = 2
"""Doublings or halvings of the first rate of a size that are tried while none reaches the target."""
CONTENDS = 1.25
"""A rate within this factor of the best on the first seed is tried on all of them; a trial beyond it is stopped."""
EXTRA_RATES = 2
"""Smaller rates that are tried when every rate fails on some seed, or its first seed was lucky."""
LUCKY = 1.5
"""The first seed was lucky when all of them take so many times its samples."""
SLACK_OF_SEEDS = 3.0
"""A seed that takes so many times the fewest samples of the first one fails."""
SLACK_OF_NEIGHBOUR = 3.0
"""Twice or half the size may take so many times the samples: the law of the trade-off allows twice."""
MOST_OVER_FEWEST = 6.0
"""A size that takes so many times the fewest samples known before it cannot be the answer."""
TYPICAL_RATES, TYPICAL_CONTENDERS = 3.5, 1.5
"""Rates that a size is climbed with, and those tried on all seeds, on average; for the expected cost (theory page)."""

Rule = Callable[[int, int], float]
"""(tuned size, other size) -> learning rate there over the tuned one, by the scaling rule."""


@dataclass(frozen=True)
class Climb:
    """The rates of one size that reached the target with the first seed.

    Attributes:
        samples: Samples to the target, by exponent of the rate.
    """

    samples: dict[int, float]

    @property
    def best(self) -> int:
        """Exponent of the rate with the fewest samples; the smaller one of two alike."""
        return min(self.samples, key=lambda exponent: (self.samples[exponent], exponent))

    @property
    def fewest(self) -> float:
        """Samples of the best."""
        return self.samples[self.best]


def next_trials(settings: SweepSettings, rule: Rule, results: Iterable[TrialResult]) -> tuple[TrialSpec, ...]:
    """Return every trial that can be run now, those that most others wait for first; none when the sweep is complete.

    Args:
        settings: Of the sweep.
        rule: How the rate follows the size.
        results: Of the trials that have ended, in any order.
    """
    asked = _Asked(results)
    _Design(settings, rule, asked).run()
    return tuple(asked.missing)


def expected_trials(settings: SweepSettings) -> int:
    """Number of trials that a sweep takes on average."""
    return round(len(settings.sizes) * (TYPICAL_RATES + TYPICAL_CONTENDERS * (settings.seeds - 1)))


def rate_at(settings: SweepSettings, exponent: int) -> float:
    """The rate that is the first one times a power of two, to six digits."""
    return float(f"{settings.first_lr * 2.0**exponent:.6g}")


class _WaitingError(Exception):
    """A result is needed that is not there yet."""


class _Asked:
    """The results so far, and what was asked for beyond them."""

    def __init__(self, results: Iterable[TrialResult]) -> None:
        self._known: dict[tuple[int, float, int], list[TrialResult]] = {}
        for result in results:
            spec = result.spec
            self._known.setdefault((spec.global_batch_size, spec.lr, spec.seed), []).append(result)
        self.missing: dict[TrialSpec, None] = {}

    def trials(self, specs: Sequence[TrialSpec]) -> list[TrialResult]:
        """Return the result of each.

        Raises:
            _WaitingError: One at least has not ended.
        """
        found = [self._find(spec) for spec in specs]
        self.missing.update({spec: None for spec, result in zip(specs, found, strict=True) if result is None})
        known = [result for result in found if result is not None]
        if len(known) < len(specs):
            raise _WaitingError
        return known

    def _find(self, spec: TrialSpec) -> TrialResult | None:
        known = self._known.get((spec.global_batch_size, spec.lr, spec.seed), [])
        return next((result for result in sorted(known, key=lambda result: result.spec.most_samples) if _answers(result, spec)), None)


def _answers(result: TrialResult, spec: TrialSpec) -> bool:
    """Whether training again with another limit could not say more."""
    return result.status is not TrialStatus.ABORTED or result.spec.most_samples >= spec.most_samples


@dataclass(frozen=True)
class _Design:
    settings: SweepSettings
    rule: Rule
    asked: _Asked

    def run(self) -> None:
        """Ask for everything that the results so far allow to ask for: rates first, because further sizes wait for them."""
        climbs: dict[int, Climb] = {}
        try:
            first = self._first_size(climbs)
        except _WaitingError:
            return
        if first is None:
            return
        sizes = self.settings.sizes
        upwards = [size for size in sizes if size > first] if first == self.settings.first_size else []
        downwards = [size for size in reversed(sizes) if size < first]
        for way in (upwards, downwards):
            self._go(way, first, climbs)
        for size, climb in climbs.items():
            self._seeds(size, climb)

    def _first_size(self, climbs: dict[int, Climb]) -> int | None:
        """Climb the first size; one at which nothing arrives gives way to the next smaller one, at which more does."""
        settings = self.settings
        exponent, before = 0.0, settings.first_size
        for size in (size for size in reversed(settings.sizes) if size <= settings.first_size):
            exponent += math.log2(self.rule(before, size)) if size != before else 0.0
            climb = self._climb(size, round(exponent), settings.most_samples)
            if climb is not None:
                climbs[size] = climb
                return size
            before = size
        return None

    def _go(self, way: Sequence[int], first: int, climbs: dict[int, Climb]) -> None:
        """Climb one size after the other, each from what the one before found; a size at which nothing arrives ends the way."""
        is_outward = self.settings.order == "outward"
        before, fewest = first, climbs[first].fewest
        for size in way:
            try:
                climb = self._climb_from(before, climbs[before], size, MOST_OVER_FEWEST * fewest)
            except _WaitingError:
                climb = None
            if climb is not None:
                climbs[size] = climb
            if is_outward and climb is None:
                return
            if is_outward and climb is not None:
                before, fewest = size, min(fewest, climb.fewest)

    def _climb_from(self, before: int, parent: Climb, size: int, most_samples: float) -> Climb | None:
        """Climb a size from the best rate of another one, moved by the rule."""
        slack = SLACK_OF_NEIGHBOUR * max(1.0, size / before / 2)
        start = parent.best + round(math.log2(self.rule(before, size)))
        return self._climb(size, start, min(most_samples, slack * parent.fewest))

    def _climb(self, size: int, start: int, most_samples: float) -> Climb | None:
        """Walk from a rate while the samples to the target become fewer; none when no rate arrives in time."""
        reached: dict[int, float] = {}
        tried: set[int] = set()

        def improves(exponent: int) -> bool:
            tried.add(exponent)
            fewest = min(reached.values(), default=math.inf)
            result = self.asked.trials([self._spec(size, exponent, 0, min(most_samples, CONTENDS * fewest))])[0]
            if result.samples_to_target is None:
                return False
            reached[exponent] = result.samples_to_target
            return result.samples_to_target < fewest

        for direction in (1, -1) if improves(start) else (-1, 1):
            at = Climb(reached).best if reached else start
            while at + direction not in tried and (reached or abs(at + direction - start) <= REACH):
                at += direction
                if not improves(at) and reached:
                    break
        return Climb(reached) if reached else None

    def _seeds(self, size: int, climb: Climb) -> None:
        """Try every rate that came near the best, or could still win, on all seeds."""
        try:
            self._try_seeds(size, climb)
        except _WaitingError:
            return

    def _try_seeds(self, size: int, climb: Climb) -> None:
        seeds, fewest = self.settings.seeds, climb.fewest
        order = sorted(climb.samples, key=lambda exponent: (climb.samples[exponent], exponent))
        smaller = range(min(climb.samples) - 1, min(climb.samples) - 1 - EXTRA_RATES, -1)
        incumbent = math.inf
        for exponent in (*order, *smaller):
            first = climb.samples.get(exponent)
            if first is None and incumbent <= LUCKY * fewest:
                return
            if first is not None and first > max(CONTENDS * fewest, incumbent):
                continue
            most = min(SLACK_OF_SEEDS * fewest, seeds * incumbent)
            if first is None:
                first = self.asked.trials([self._spec(size, exponent, 0, most)])[0].samples_to_target
            if first is None:
                continue
            most = min(most, seeds * incumbent - first)
            others = self.asked.trials([self._spec(size, exponent, seed, most) for seed in range(1, seeds)])
            samples = [first, *(other.samples_to_target for other in others if other.samples_to_target is not None)]
            if len(samples) == seeds:
                incumbent = min(incumbent, sum(samples) / seeds)

    def _spec(self, size: int, exponent: int, seed: int, most_samples: float) -> TrialSpec:
        most = min(math.ceil(most_samples), self.settings.most_samples)
        return TrialSpec(global_batch_size=size, lr=rate_at(self.settings, exponent), seed=seed, most_samples=max(most, size))
