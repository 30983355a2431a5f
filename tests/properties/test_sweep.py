"""What holds for every sweep, whatever its trainings come to."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planted_sweeps import settings_of, summary, sweep
from rightbatch.fits.sweep import fit_sweep
from rightbatch.records.sweep import SweepResult, TrialPoint, TrialResult, TrialStatus
from rightbatch.sweeps.design import next_trials


class AnyOutcome:
    """Trainings without any law: what each comes to hangs on its size, rate and seed alone, by chance."""

    def __init__(self, draw: int, share_failing: float) -> None:
        self.draw, self.share_failing = draw, share_failing

    def train(self, spec):
        rng = np.random.default_rng([self.draw, spec.global_batch_size, round(1e9 * spec.lr) % 2**32, spec.seed])
        fails, diverges = rng.random(2) < self.share_failing
        needed = math.inf if fails else float(rng.uniform(100, 20_000))
        arrives = needed <= spec.most_samples
        status = TrialStatus.COMPLETE if arrives else TrialStatus.DIVERGED if diverges else TrialStatus.ABORTED
        samples = max(1, round(min(needed, spec.most_samples)))
        return TrialResult(
            spec=spec,
            status=status,
            steps=1,
            samples=samples,
            training_s=1.0,
            samples_to_target=needed if arrives else None,
            steps_to_target=1.0 if arrives else None,
            seconds_to_target=1.0 if arrives else None,
            history=(TrialPoint(samples=samples, training_s=1.0, value=0.5),),
        )


OUTCOMES = st.builds(AnyOutcome, st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
SETTINGS = st.builds(
    lambda sizes, seeds, order, most, first: settings_of(
        sizes=tuple(sorted(sizes)), first_size=sorted(sizes)[first % len(sizes)], seeds=seeds, order=order, most_samples=most
    ),
    st.sets(st.integers(1, 2000), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from(["outward", "at once"]),
    st.sampled_from([2000, 20_000]),
    st.integers(0, 4),
)


def linear(tuned: int, other: int) -> float:
    return other / tuned


@settings(max_examples=60, deadline=None)
@given(OUTCOMES, SETTINGS, st.integers(0, 2**31))
def test_which_trials_are_run_does_not_hang_on_the_order_in_which_they_end(law, sweep_settings, seed):
    rng = np.random.default_rng(seed)

    in_turn = sweep(law, sweep_settings, linear)
    by_chance = sweep(law, sweep_settings, linear, pick=lambda waiting: waiting[int(rng.integers(len(waiting)))])

    assert {result.spec for result in in_turn} == {result.spec for result in by_chance}
    assert len({result.spec for result in in_turn}) == len(in_turn)


@settings(max_examples=60, deadline=None)
@given(OUTCOMES, SETTINGS, st.integers(0, 2**31))
def test_what_was_run_is_never_asked_for_again_whatever_part_of_it_is_known(law, sweep_settings, seed):
    results = sweep(law, sweep_settings, linear)
    rng = np.random.default_rng(seed)
    known = [result for result in results if rng.random() < 0.7]

    asked = next_trials(sweep_settings, linear, known)

    assert not set(asked) & {result.spec for result in known}
    assert set(asked) <= {result.spec for result in results}


@settings(max_examples=40, deadline=None)
@given(OUTCOMES, SETTINGS)
def test_every_sweep_comes_to_a_result_that_reads_back(law, sweep_settings):
    results = sweep(law, sweep_settings, linear)

    result = fit_sweep(sweep_settings, summary(), results, is_complete=True, device_name="any")

    assert SweepResult.model_validate_json(result.model_dump_json(), strict=True) == result
    assert sum(count for _, count in result.trials) == len(results)
    critical = result.critical_batch_size
    if critical.value is not None and critical.low is not None:
        assert critical.low <= critical.value <= (critical.high or math.inf)
    if result.best_size is not None:
        assert result.best_size in result.equivalent_sizes
