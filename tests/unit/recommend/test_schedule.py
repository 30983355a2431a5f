"""A schedule is proposed from what was measured, or read as written; either way it is coupled to the plan."""

import math

import pytest

from oracles.oracle_schedule import findings, noise_along
from rightbatch.errors import UsageError
from rightbatch.fits.batch_schedule import setting_at
from rightbatch.fits.schedule_text import FORMS
from rightbatch.recommend.schedule import propose, requested_schedule
from rightbatch.records.estimates import BranchCurve, Estimate, Status, Tradeoff
from rightbatch.records.plan import Constraints
from rightbatch.records.schedule import ConstantSize, SizeCoupling

TOTAL = 200_000


def rising(x):
    return 20.0 + 2000.0 * (x / TOTAL)


def found(**changes):
    return findings(noise_along(rising, range(0, TOTAL + 1, TOTAL // 24)), **changes)


@pytest.mark.parametrize("kind", FORMS)
def test_every_kind_is_proposed_with_the_plans_coupling(kind):
    schedule = propose(found(), kind, TOTAL)

    assert schedule.kind == kind
    assert schedule.coupling == SizeCoupling(base_batch_size=64, optimizer="SGD", noise_scale_samples=found().noise_scale.value)


@pytest.mark.parametrize("kind", ["linear", "geometric", "milestones"])
def test_growth_goes_from_the_best_size_at_the_beginning_to_that_at_the_end(kind):
    schedule = propose(found(), kind, TOTAL)
    first, last = (setting_at(schedule, position).global_batch_size for position in (0, TOTAL))

    assert first == pytest.approx(math.sqrt(1.3 * rising(TOTAL / 96) * 160), rel=0.2)
    assert last == pytest.approx(math.sqrt(1.3 * rising(TOTAL) * 160), rel=0.2)


def test_noise_adaptive_schedule_starts_at_the_plan_within_the_sizes_that_may_be_used():
    schedule = propose(found(constraints=Constraints(max_global_batch_size=500)), "noise", TOTAL)

    assert (schedule.start, schedule.smallest, schedule.largest) == (64, 16, 500)
    assert (schedule.half_saturation, schedule.calibration) == (pytest.approx(160, rel=0.01), 1.3)


def test_branches_give_the_calibration():
    critical = Estimate(value=2.3 * 3 * found().noise_scale.value, low=None, high=None, n=1)
    branches = BranchCurve(status=Status.OK, checkpoint_samples=1, evaluated_samples=1, target_loss=1.0, points=())
    given = found(branches=branches, tradeoff=Tradeoff(status=Status.OK, critical_batch_size=critical, points=()))

    assert propose(given, "noise", TOTAL).calibration == pytest.approx(3.0)


def test_growth_instead_of_decay_stops_at_the_critical_batch_size():
    schedule = propose(found(), "grow", TOTAL)

    assert schedule.at_samples == (TOTAL // 2, 3 * TOTAL // 4)
    assert schedule.largest == round(1.3 * found().noise_scale.value)


def test_bare_name_is_proposed_and_a_full_word_is_read_and_coupled():
    coupling = propose(found(), "constant", TOTAL).coupling

    assert requested_schedule("noise", found(), TOTAL) == propose(found(), "noise", TOTAL)
    assert requested_schedule("96", found(), TOTAL) == ConstantSize(global_batch_size=96, coupling=coupling)
    with pytest.raises(UsageError, match="a batch schedule is 64"):
        requested_schedule("adaptive:64", found(), TOTAL)


def test_proposal_without_noise_or_law_or_plan_says_what_to_do():
    without_plan = found().recommendation.model_copy(update={"plan": None})

    with pytest.raises(UsageError, match="needs a measured noise scale"):
        propose(found().model_copy(update={"noise_scale": None}), "linear", TOTAL)
    with pytest.raises(UsageError, match="needs b_half of the step time"):
        propose(found().model_copy(update={"step_time": None}), "noise", TOTAL)
    with pytest.raises(UsageError, match="starts from a plan"):
        propose(found().model_copy(update={"recommendation": without_plan}), "constant", TOTAL)


def test_constant_size_needs_the_plan_alone():
    bare = found().model_copy(update={"noise_scale": None, "step_time": None})

    assert propose(bare, "constant", TOTAL).global_batch_size == 64


def test_a_written_schedule_is_coupled_although_every_gradient_was_the_same():
    same = found().noise_scale.model_copy(update={"value": 0.0, "low": 0.0, "high": 0.0})

    schedule = requested_schedule("linear:16..64@1000", found().model_copy(update={"noise_scale": same}), TOTAL)

    assert schedule.coupling == SizeCoupling(base_batch_size=64, optimizer="SGD")
