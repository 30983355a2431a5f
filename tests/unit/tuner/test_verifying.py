import math
from dataclasses import replace

import numpy as np
import pytest

from oracles.oracle_curves import ENVIRONMENT, law_s, timed, workload
from rightbatch.fits.branch import CHANCE_LOG_ERROR
from rightbatch.fits.branch_rate import best_rate
from rightbatch.fits.critical_batch import BEST_RATE_MEDIAN, GROWTH_WITH_PILOT_MEDIAN
from rightbatch.fits.lr_scaling import HOTTEST, rate_factor
from rightbatch.fits.step_time import fit_step_time
from rightbatch.fits.tradeoff import draw_costs, fit_tradeoff
from rightbatch.recommend.decision import recommend
from rightbatch.records.estimates import Estimate, NoiseScale, NoiseSnapshot, Status
from rightbatch.records.lr_range import LrRange
from rightbatch.records.plan import Constraints, Findings, Objective
from rightbatch.records.training import BranchMeasurements, BranchProbe, ProbeOutcome, TrainingProbe
from rightbatch.tuner.verifying import BRANCH_EPOCHS, MOST_BRANCHES, plan_verification

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
FIXED_S, RATE = 0.01, 10_000.0


def noise(value):
    estimate = Estimate(value=value, low=value / 1.3, high=value * 1.3, n=4096)
    snapshot = NoiseSnapshot(
        samples_seen=5000,
        noise_scale=estimate,
        grad_sq_norm=Estimate(value=1.0, low=0.9, high=1.1, n=4096),
        grad_noise_trace=Estimate(value=value, low=value, high=value, n=4096),
        micro_batch_size=8,
        micro_batch_count=512,
    )
    return NoiseScale(**estimate.model_dump(), snapshots=(snapshot,), pilot_samples=5000)


def findings(scale=100.0, branches=None, **changes):
    parts = {
        "step_time": fit_step_time(timed({b: law_s(b, FIXED_S, RATE) for b in SIZES})),
        "loader": None,
        "noise_scale": noise(scale),
        "memory": None,
        "workload": workload(**changes),
        "constraints": Constraints(),
        "branches": branches,
    }
    draws = draw_costs(**parts, rng=np.random.default_rng(0))
    tradeoff = fit_tradeoff(draws, noise_scale=parts["noise_scale"], objective=Objective())
    return Findings(
        environment=ENVIRONMENT,
        recommendation=recommend(**parts, objective=Objective(), draws=draws, tradeoff=tradeoff),
        tradeoff=tradeoff,
        measured_at="2026-11-24T00:00:00+00:00",
        duration_s=1.0,
        **{name: parts[name] for name in ("workload", "memory", "step_time", "loader", "noise_scale")},
    )


def losses_of(size, samples, critical, progress=1.0):
    """A planted law: a size needs 1 + size / critical times the samples to any loss, over the progress that its rate makes."""
    at = np.linspace(samples / 16, samples, 16)
    return tuple((int(s), 3 - 0.25 * math.log(s * progress / (1 + size / critical))) for s in at)


def carry_out(plan, critical, *, fails_from=math.inf, best_rate=1.0):
    measured = BranchMeasurements(checkpoint_samples=5000, checkpoint_batch_size=64, evaluated_samples=512, target_loss=None, probes=())
    while (branch := plan.next_branch(measured)) is not None:
        size = branch.global_batch_size
        x = branch.lr_over_rule / best_rate
        losses = losses_of(size, branch.most_samples, critical, max(2 * x - x * x, 0.05))
        if size >= fails_from:
            losses = tuple((at, 5.0 + at) for at, _ in losses)
        result = TrainingProbe(
            global_batch_size=size, lr=0.1, lr_over_rule=branch.lr_over_rule, outcome=ProbeOutcome.STOPPED, samples=losses[-1][0]
        )
        probe = BranchProbe(micro_batch_size=size, accumulation_steps=1, result=result, losses=losses)
        judged, target = plan.conclude(probe, measured)
        probes = (*measured.probes, probe.model_copy(update={"result": judged}))
        measured = measured.model_copy(update={"probes": probes, "target_loss": target})
    return measured


@pytest.mark.parametrize("critical", [30.0, 400.0, 5000.0])
def test_training_moves_the_belief_about_the_critical_size_towards_the_planted_one(critical):
    before = findings()
    plan = plan_verification(before, 60.0)

    measured = carry_out(plan, critical)
    after = findings(branches=measured)

    # What grows after the checkpoint is not seen by branches: the planted critical size there is the run's over the prior's growth.
    truth = math.log(GROWTH_WITH_PILOT_MEDIAN * critical)
    prior, posterior = before.tradeoff.critical_batch_size, after.tradeoff.critical_batch_size
    assert 2 <= len(measured.probes) <= MOST_BRANCHES
    assert abs(math.log(posterior.value) - truth) < max(abs(math.log(prior.value) - truth), 0.4)
    assert after.recommendation.evidence_level == 3


@pytest.mark.parametrize("best_rate", [0.6, 1.0, 1.6])
def test_training_moves_the_rate_towards_the_planted_best_one(best_rate):
    before = findings()

    measured = carry_out(plan_verification(before, 60.0), 400.0, best_rate=best_rate)
    after = findings(branches=measured).recommendation

    over_rule = after.lr.over_rule
    assert over_rule.value == pytest.approx(best_rate, rel=0.15)
    assert over_rule.low < best_rate < over_rule.high
    assert after.plan.lr == pytest.approx(after.lr.base_lr * after.lr.factor * over_rule.value)


def test_a_size_far_from_those_trained_is_charged_for_what_its_rate_may_be_off():
    measured = carry_out(plan_verification(findings(), 60.0), 400.0)
    draws = drawn_after(measured, 100.0)
    sizes = np.array([measured.probes[0].result.global_batch_size, 16 * measured.probes[0].result.global_batch_size], dtype=np.float64)

    charged = draws.steps(sizes) * sizes / draws.critical_batch_size[:, None] / np.exp(draws.curves.log_samples(sizes))

    near, far = charged.mean(axis=0)
    assert 1 <= near < far - 0.02


def test_no_branch_is_taken_for_more_exact_than_chance_allows():
    measured = carry_out(plan_verification(findings(), 60.0), 400.0)

    assert min(probe.result.log_error for probe in measured.probes[1:]) >= CHANCE_LOG_ERROR


def test_a_workload_without_a_rate_is_checked_at_the_rule_alone():
    plan = plan_verification(findings(lr=None), 60.0)

    assert {branch.lr_over_rule for branch in plan.branches} == {1.0}
    assert findings(lr=None, branches=carry_out(plan, 400.0)).recommendation.lr.over_rule is None


def test_first_branch_is_the_recommended_size_and_each_setting_is_trained_once():
    before = findings()

    measured = carry_out(plan_verification(before, 60.0), 400.0)

    settings = [(probe.result.global_batch_size, probe.result.lr_over_rule) for probe in measured.probes]
    assert settings[0] == (before.recommendation.plan.global_batch_size, 1.0)
    assert len(set(settings)) == len(settings)
    assert measured.probes[0].result.outcome is ProbeOutcome.REACHED


def test_no_branch_may_take_much_longer_than_the_best_so_far():
    plan = plan_verification(findings(), 60.0)
    pace_s = {size: law_s(size, FIXED_S, RATE) / size for size in SIZES}

    measured = carry_out(plan, 30.0)

    first = measured.probes[0]
    longest_s = first.losses[-1][0] * pace_s[first.result.global_batch_size]
    for probe in measured.probes[1:]:
        assert probe.losses[-1][0] * pace_s[probe.result.global_batch_size] <= 1.1 * longest_s


def test_a_size_that_fails_and_all_beyond_it_are_not_chosen_any_more():
    plan = plan_verification(findings(scale=3000.0), 60.0)
    first = plan.branches[plan.first].global_batch_size

    measured = carry_out(plan, 5000.0, fails_from=first + 1)
    after = findings(scale=3000.0, branches=measured)

    results = [probe.result for probe in measured.probes if probe.result.lr_over_rule <= 1]
    failed = [result.global_batch_size for result in results if result.outcome is ProbeOutcome.FAILED]
    assert failed
    assert max(after.recommendation.equivalent_batch_sizes) < min(failed)
    assert max(point.global_batch_size for point in after.tradeoff.points) >= min(failed)  # still shown, and what it would cost


def test_branches_end_with_so_many_epochs_however_long_the_budget():
    plan = plan_verification(findings(train_size=2000), 3600.0)

    assert plan.branches[plan.first].most_samples == BRANCH_EPOCHS * 2000
    assert plan.checkpoint.most_samples < plan.branches[plan.first].most_samples


def test_learning_rates_of_the_branches_follow_the_size():
    plan = plan_verification(findings(), 60.0)

    factors = {branch.global_batch_size: branch.lr_factor / branch.lr_over_rule for branch in plan.branches}
    assert factors[128] == pytest.approx(1.0)
    assert factors[32] < factors[64] < 1 < factors[256]


def test_no_branch_has_more_than_twice_the_tuned_rate_over_its_size():
    plan = plan_verification(findings(scale=20.0), 60.0)

    hottest = {size: max(b.lr_over_rule for b in plan.branches if b.global_batch_size == size) for size in (64, 128, 256)}
    assert max(branch.lr_factor * 128 / branch.global_batch_size for branch in plan.branches if branch.global_batch_size >= 64) <= 2 + 1e-9
    assert hottest[64] < hottest[128] == hottest[256] == 2


def drawn_after(measured, scale):
    given = {"loader": None, "noise_scale": noise(scale), "memory": None, "workload": workload(), "constraints": Constraints()}
    timings = fit_step_time(timed({b: law_s(b, FIXED_S, RATE) for b in SIZES}))
    return draw_costs(step_time=timings, **given, branches=measured, rng=np.random.default_rng(0))


def test_the_rate_of_a_small_size_stays_below_twice_the_tuned_one_over_its_size():
    curves = drawn_after(carry_out(plan_verification(findings(scale=20.0), 60.0), 400.0, best_rate=2.0), 20.0).curves

    given = best_rate(curves, 64).value * rate_factor("SGD", 20.0, 128, 64)
    assert given / (64 / 128) == pytest.approx(HOTTEST, rel=1e-3)
    assert best_rate(replace(curves, rates=replace(curves.rates, limit=None)), 64).value > 1.05 * best_rate(curves, 64).value


def test_a_rate_that_failed_at_the_chosen_size_is_not_given_though_rates_about_it_trained():
    measured = carry_out(plan_verification(findings(), 60.0), 400.0, best_rate=1.0)
    first = measured.probes[0].result
    given = best_rate(drawn_after(measured, 100.0).curves, first.global_batch_size).value
    failing = first.model_copy(update={"lr_over_rule": given, "outcome": ProbeOutcome.FAILED})
    with_failing = (*measured.probes, measured.probes[0].model_copy(update={"result": failing}))

    after = best_rate(drawn_after(measured.model_copy(update={"probes": with_failing}), 100.0).curves, first.global_batch_size).value

    trained = [p.result for p in with_failing if p.result.global_batch_size == first.global_batch_size]
    assert min(trained, key=lambda result: abs(math.log(after / result.lr_over_rule))).outcome is not ProbeOutcome.FAILED


def test_chance_and_the_median_of_the_best_rate_are_counted_in_what_to_train_next():
    candidates = plan_verification(findings(), 60.0).candidates

    assert candidates.log_error == CHANCE_LOG_ERROR
    assert np.exp(np.median(candidates.curves.rates.log_best)) == pytest.approx(BEST_RATE_MEDIAN, rel=0.03)


def test_a_tested_rate_takes_the_place_of_the_workloads_own():
    tested = LrRange(value=0.4, low=0.2, high=0.8, n=5, status=Status.OK, batch_size=64, optimizer="SGD", divergence_edge=None, verdicts=())

    plan = plan_verification(findings(lr_batch_size=None).model_copy(update={"lr_range": tested}), 60.0)

    factors = {branch.global_batch_size: branch.lr_factor / branch.lr_over_rule for branch in plan.branches}
    assert factors[64] == pytest.approx(0.4 / 0.1)


@pytest.mark.parametrize(
    ("changed", "budget_s", "reason"),
    [
        ({"noise_scale": None}, 60.0, "gradient noise left no prediction"),
        ({"noise_scale": NoiseScale(value=None, low=None, high=None, n=0, status=Status.INDETERMINATE, snapshots=(), pilot_samples=0)},
         60.0, "gradient noise left no prediction"),
        ({}, 0.05, "give a larger --budget"),
    ],
)  # fmt: skip
def test_without_anything_to_check_the_reason_is_said(changed, budget_s, reason):
    assert reason in plan_verification(findings().model_copy(update=changed), budget_s)
