"""The check of an answer by training: which sizes to train from one checkpoint, in which order, and when to stop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightbatch.engine.rig import STAND_IN_LR
from rightbatch.fits import branch as branch_fit
from rightbatch.fits.critical_batch import branch_curves, critical_belief
from rightbatch.fits.lr_range import with_tested_rate
from rightbatch.fits.lr_scaling import couple_lr, known_noise_scale, rate_limit
from rightbatch.fits.tradeoff import N_DRAWS
from rightbatch.recommend.probing import Candidates, choose_probed, next_probe, setting_of
from rightbatch.records.plan import Findings
from rightbatch.records.training import BranchMeasurements, BranchPlan, BranchProbe, ProbeOutcome, TrainingProbe

FIRST_SHARE = 0.2
"""Share of the budget for the first branch, and as much for the checkpoint before it: leaves time for two or three more branches."""
CHECKPOINT_EPOCHS, BRANCH_EPOCHS = 2, 4
"""No more, however much time there is: past a few epochs a small dataset is memorised, and what is compared is no run's any more."""
FEWEST_STEPS = 12
"""A size of which fewer steps fit into the time of the first branch is not trained."""
MOST_BRANCHES = 8
RATES = (1.0, 0.5, 2**-0.5, 2**0.5, 2.0)
"""Learning rates of a size, over the rule's: the first branch takes the rule's own."""
LEAST_GAIN = 0.003
"""A branch is much shorter than the run that is decided, so it may take its time for less regret than a whole training may."""
_STAND_IN_LR_BATCH = 64
"""Where the workload does not say at which size its rate was tuned, its rate is taken as this size's."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What to train, decided from what was trained so far: sent to where the probes run.

    Attributes:
        branches: One branch of each size, ascending, each as long in time as the first.
        candidates: The same sizes, with what is believed of them.
        first: Place of the size that was recommended.
        checkpoint: How to train to where the branches part.
        noise_micro_batch_size: Samples of one micro-batch where the gradient noise is measured there: those of the pilot.
    """

    checkpoint: BranchPlan
    branches: tuple[BranchPlan, ...]
    candidates: Candidates
    first: int
    noise_micro_batch_size: int

    def next_branch(self, measured: BranchMeasurements) -> BranchPlan | None:
        """Return the size that would be chosen now, if it was not trained yet, else the one that tells most for its time; none to stop.

        A branch is stopped when it has taken as long as the best so far.
        """
        if not measured.probes:
            return self.branches[self.first]
        results = tuple(probe.result for probe in measured.probes)
        reached = [result for result in results if result.outcome is ProbeOutcome.REACHED]
        if not reached or len(results) >= MOST_BRANCHES:
            return None
        pace_s = dict(zip(self.candidates.sizes.astype(int).tolist(), np.exp(self.candidates.log_time[0]).tolist(), strict=True))
        best_s = min(result.samples * pace_s[result.global_batch_size] for result in reached)
        trained = {setting_of(result) for result in results}  # the same samples in the same order would come to the same loss
        index = choose_probed(self.candidates, results).index
        if self.candidates.settings[index] in trained:
            least_gain = LEAST_GAIN if len(results) > 1 else -math.inf  # one beside the first is always trained: that was asked for
            proposal = next_probe(self.candidates, results, best_log_time=math.log(best_s), least_gain=least_gain, without=trained)
            if proposal is None:
                return None
            index = proposal.index
        branch = self.branches[index]
        size = branch.global_batch_size
        return branch.model_copy(update={"most_samples": max(size, round(best_s / pace_s[size] / branch_fit.TARGET_SHARE))})

    def is_beyond(self, losses: Sequence[tuple[int, float]], target_loss: float) -> bool:
        """Whether the last two losses are at the target: one alone may be luck."""
        return len(losses) > 1 and max(loss for _, loss in losses[-2:]) <= target_loss

    def conclude(self, probe: BranchProbe, measured: BranchMeasurements) -> tuple[TrainingProbe, float | None]:
        """Say what a branch came to, and the target loss, which the first branch sets."""
        is_first = not measured.probes
        first = probe.losses if is_first else measured.probes[0].losses
        target = branch_fit.target_loss(first) if is_first else measured.target_loss
        result = probe.result
        if target is None:  # the first branch itself cannot be told from standing still: it says nothing about its size
            return result, None
        error = math.hypot(branch_fit.CHANCE_LOG_ERROR, branch_fit.log_error(probe.losses) if len(probe.losses) > 1 else 0.0)
        reached = branch_fit.samples_to_loss(probe.losses, target)
        outcome = ProbeOutcome.REACHED if reached else branch_fit.judged(probe, first=first, loss=target)
        ratio = None if outcome is ProbeOutcome.FAILED else branch_fit.log_ratio(probe.losses, first)
        if ratio is not None:
            samples = math.exp(ratio) * (branch_fit.samples_to_loss(first, target) or first[-1][0])
            return result.model_copy(update={"outcome": ProbeOutcome.REACHED, "samples": samples, "log_error": error}), target
        return result.model_copy(update={"outcome": outcome, "log_error": error}), target


def plan_verification(findings: Findings, budget_s: float, *, rng_seed: int = 0) -> Verification | str:
    """Decide how to check an answer by training within a time.

    Args:
        findings: The answer, with its trade-off and noise scale.
        budget_s: Seconds for the checkpoint and all branches.
        rng_seed: Seed of the draws.

    Returns:
        The plan; or a sentence that says why there is nothing to train.
    """
    plan, tradeoff, noise = findings.recommendation.plan, findings.tradeoff, findings.noise_scale
    belief = None if noise is None else critical_belief(noise, np.random.default_rng(rng_seed), N_DRAWS)
    if plan is None or tradeoff is None or noise is None or belief is None:
        return "The answer was not checked by training, because the gradient noise left no prediction to check."
    points = [point for point in tradeoff.points if point.global_batch_size <= findings.workload.train_size]
    pace_s = {point.global_batch_size: 1 / point.samples_per_s for point in points}
    if plan.global_batch_size not in pace_s or plan.world_size > 1:
        return "The answer was not checked by training: several ranks would have to train together."
    first_samples = min(int(FIRST_SHARE * budget_s / pace_s[plan.global_batch_size]), BRANCH_EPOCHS * findings.workload.train_size)
    time_s = first_samples * pace_s[plan.global_batch_size]
    points = [point for point in points if time_s / pace_s[point.global_batch_size] >= FEWEST_STEPS * point.global_batch_size]
    if plan.global_batch_size not in {point.global_batch_size for point in points} or len(points) < 2:
        return (
            f"The answer was not checked by training: in {first_samples} samples fewer than two sizes take {FEWEST_STEPS} steps; "
            "give a larger --budget, or more data."
        )
    base = with_tested_rate(findings.workload, findings.lr_range)
    rates = RATES if base.lr is not None and base.lr_batch_size is not None else RATES[:1]  # without both the plan names no rate
    base = base.model_copy(update={"lr_batch_size": base.lr_batch_size or _STAND_IN_LR_BATCH})
    noise_samples = known_noise_scale(noise)
    limit = rate_limit(base, noise_samples)
    tested_over_own = (base.lr or STAND_IN_LR) / (findings.workload.lr or STAND_IN_LR)
    branches = tuple(
        BranchPlan(
            micro_batch_size=point.micro_batch_size,
            accumulation_steps=point.accumulation_steps,
            lr_factor=rate * tested_over_own * couple_lr(base, noise_samples, point.global_batch_size).factor,
            lr_over_rule=rate,
            most_samples=max(int(time_s / pace_s[point.global_batch_size]), FEWEST_STEPS * point.global_batch_size),
        )
        for point in points
        for rate in rates
        if limit is None or rate <= limit.over_rule(np.array([point.global_batch_size]))[0]
    )
    sizes = np.array([branch.global_batch_size for branch in branches], dtype=np.float64)
    at_checkpoint, over_run = branch_curves(belief, middle=plan.global_batch_size, rng=np.random.default_rng(rng_seed))
    log_time = np.log([pace_s[branch.global_batch_size] for branch in branches])[None, :]
    first = next(i for i, branch in enumerate(branches) if branch.global_batch_size == plan.global_batch_size)
    checkpoint_samples = min(branches[first].most_samples, CHECKPOINT_EPOCHS * findings.workload.train_size)
    return Verification(
        checkpoint=branches[first].model_copy(update={"most_samples": checkpoint_samples}),
        branches=branches,
        candidates=Candidates(
            sizes=sizes,
            log_time=log_time,
            curves=at_checkpoint,
            run=over_run,
            lr_over_rule=np.array([branch.lr_over_rule for branch in branches]),
            log_error=branch_fit.CHANCE_LOG_ERROR,
        ),
        first=first,
        noise_micro_batch_size=noise.snapshots[-1].micro_batch_size if noise.snapshots else branches[first].micro_batch_size,
    )


def no_branches(remark: str) -> BranchMeasurements:
    """Return the measurements that say why nothing was trained."""
    return BranchMeasurements(
        checkpoint_samples=0, checkpoint_batch_size=1, evaluated_samples=0, target_loss=None, probes=(), remark=remark
    )
