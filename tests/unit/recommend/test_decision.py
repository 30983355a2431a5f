import numpy as np
import pytest

from oracles.oracle_curves import ENVIRONMENT, QUIET, law_s, loader, memory, noise, timed, workload
from oracles.oracle_memory import attempt, peak_of, trace_of
from oracles.oracle_noise import gaussian_gradients, norms_of
from rightbatch.errors import UsageError
from rightbatch.fits.step_time import fit_step_time
from rightbatch.fits.tradeoff import draw_costs, fit_tradeoff
from rightbatch.recommend import judge, recommend
from rightbatch.records.estimates import Status
from rightbatch.records.measurements import GradientNoiseMeasurements, Measurements, MemoryLimit, MemoryMeasurements
from rightbatch.records.plan import Binding, Constraints, Goal, Objective
from rightbatch.records.training import BranchMeasurements, BranchProbe, ProbeOutcome, SweepEvidence, TrainingProbe
from rightbatch.units import MIB

SIZES = (16, 32, 64, 128, 256, 512, 1024)
AFFINE = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in SIZES}, jitter=0.002, energy={b: 1.0 + b for b in SIZES}))


def _recommend(goal=Goal.TIME, **changes):
    shared = {
        "step_time": AFFINE,
        "loader": None,
        "noise_scale": noise(),
        "memory": memory(1024),
        "workload": workload(),
        "constraints": Constraints(),
    }
    shared, objective = {**shared, **changes}, Objective(goal=goal)
    draws = draw_costs(**shared, rng=np.random.default_rng(0))
    tradeoff = fit_tradeoff(draws, noise_scale=shared["noise_scale"], objective=objective)
    return recommend(**shared, objective=objective, draws=draws, tradeoff=tradeoff)


def _measurements(**changes):
    rng = np.random.default_rng(1)
    trace = trace_of((MIB, MIB // 8, 0))
    parts = {
        "workload": workload(),
        "memory": MemoryMeasurements(
            trace=trace,
            limit=MemoryLimit(limit_bytes=200 * MIB, source="--limit"),
            points=(attempt(trace, lambda b: peak_of(trace, b), 200 * MIB, 1024),),
            largest_allowed=60_000,
            largest_allowed_source="dataset",
            stopped_by="limit",
            allocator="fake",
        ),
        "step_time": timed({b: law_s(b, 0.02, 8000.0) for b in SIZES}, jitter=0.01),
        "gradient_noise": GradientNoiseMeasurements(
            snapshots=tuple(
                norms_of(
                    gaussian_gradients(rng, samples=480, noise_scale=100.0, dimension=200),
                    micro_batch_size=4,
                    block_counts=(6,) * 20,
                    samples_seen=seen,
                )
                for seen in (0, 2000)
            ),
            pilot_batch_size=32,
            pilot_lr=0.1,
            pilot_samples=2000,
            batch_norm=False,
        ),
    }
    return Measurements(**{**parts, **changes})


def _judge(measurements, *, constraints=None, goal=Goal.TIME, rng_seed=0):
    return judge(
        measurements,
        environment=ENVIRONMENT,
        objective=Objective(goal=goal),
        constraints=constraints or Constraints(),
        measured_at="2024-01-01T00:00:00Z",
        duration_s=1.0,
        rng_seed=rng_seed,
    )


def test_time_goal_takes_the_interior_optimum():
    answer = _recommend()

    assert answer.status == "ok"
    assert answer.plan.global_batch_size in (128, 256, 512)
    assert answer.binding_constraint is Binding.OPTIMUM
    assert answer.evidence_level == 1
    assert answer.plan.global_batch_size in answer.equivalent_batch_sizes
    assert answer.plan.lr == pytest.approx(0.1 * answer.lr.factor)
    assert answer.expected_regret > 0


def test_samples_goal_takes_less_and_accuracy_no_more_than_time():
    by_goal = {goal: _recommend(goal).plan.global_batch_size for goal in (Goal.TIME, Goal.SAMPLES, Goal.ACCURACY)}

    assert by_goal[Goal.SAMPLES] < by_goal[Goal.TIME]
    assert by_goal[Goal.ACCURACY] <= by_goal[Goal.TIME]


def test_accuracy_goal_prefers_a_power_of_two():
    sizes = (20, 32, 40, 64, 100, 128, 200, 256, 300)
    flat = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in sizes}))

    chosen = _recommend(Goal.ACCURACY, step_time=flat, memory=None).plan.global_batch_size

    assert chosen & (chosen - 1) == 0


def test_energy_goal_uses_the_meter_and_refuses_without():
    assert _recommend(Goal.ENERGY).plan is not None
    with pytest.raises(UsageError, match="energy meter"):
        _recommend(Goal.ENERGY, step_time=fit_step_time(timed(dict.fromkeys(SIZES, 0.01))))


def test_memory_binds_when_a_larger_micro_batch_would_be_faster():
    steep = fit_step_time(timed({b: 0.02 + b / 1e5 for b in (16, 32, 64, 128)}))

    answer = _recommend(step_time=steep, memory=memory(128), noise_scale=noise(2000.0), workload=workload(couples_samples=True))

    assert answer.plan.global_batch_size == 128
    assert answer.binding_constraint is Binding.MEMORY


def test_budget_binds_when_larger_sizes_could_not_be_timed():
    steep = fit_step_time(timed({b: 0.02 + b / 1e5 for b in (16, 32, 64, 128)}))

    answer = _recommend(step_time=steep, memory=memory(4096), noise_scale=noise(2000.0), workload=workload(couples_samples=True))

    assert answer.binding_constraint is Binding.BUDGET


def test_dataset_or_max_batch_binds_when_it_ends_the_search():
    steep = fit_step_time(timed({b: 0.02 + b / 1e5 for b in (16, 32, 64, 128)}))
    shared = {"step_time": steep, "noise_scale": noise(2000.0)}

    by_dataset = _recommend(memory=memory(128, stopped_by="cap"), workload=workload(train_size=200), **shared)
    by_request = _recommend(memory=memory(128, stopped_by="cap"), constraints=Constraints(max_global_batch_size=128), **shared)

    assert by_dataset.binding_constraint is Binding.DATASET
    assert by_request.binding_constraint is Binding.MAX_BATCH


def test_smallest_binds_when_nothing_smaller_was_timed():
    assert _recommend(noise_scale=noise(0.15)).binding_constraint is Binding.SMALLEST


def test_loader_binds_and_its_advice_has_the_numbers():
    answer = _recommend(loader=loader(1500.0))

    assert answer.binding_constraint is Binding.LOADER
    assert any("delivers 1500 samples/s with 2 workers" in sentence for sentence in answer.advice)
    assert any(s.change == "no loader limit" and s.global_batch_size > answer.plan.global_batch_size for s in answer.sensitivities)
    assert answer.plan.num_workers == 2


def test_accumulation_reaches_a_wanted_global_batch_above_the_ceiling():
    slow_update = fit_step_time(timed({b: 0.5 + b / 8000 for b in (16, 32)}, optimizer_s=0.49))

    answer = _recommend(step_time=slow_update, memory=memory(32), noise_scale=noise(3000.0))

    plan = answer.plan
    assert plan.accumulation_steps > 1
    assert plan.global_batch_size == plan.micro_batch_size * plan.accumulation_steps


def test_without_noise_the_plan_is_the_knee():
    answer = _recommend(noise_scale=None)

    assert answer.status == "inconclusive"
    assert answer.plan.global_batch_size == AFFINE.knee
    assert (answer.evidence_level, answer.expected_regret) == (0, None)
    assert "measure the gradient noise" in answer.advice[0]


def test_undetermined_noise_repeats_its_remedy():
    answer = _recommend(noise_scale=noise(status=Status.INDETERMINATE).model_copy(update={"remarks": ("Give more samples.",)}))

    assert answer.status == "inconclusive"
    assert answer.advice[0].endswith("Give more samples.")


@pytest.mark.parametrize(
    ("estimate", "word"), [(noise(factor=30.0), "sweep"), (noise(status=Status.AT_LEAST), "gradients"), (noise(pilot_samples=0), "pilot")]
)
def test_too_wide_a_belief_is_inconclusive_and_says_what_to_measure(estimate, word):
    answer = _recommend(noise_scale=estimate)

    assert answer.status == "inconclusive"
    assert answer.plan is not None
    assert word in answer.advice[0]


def test_unstable_timings_keep_the_plan():
    busy = QUIET.model_copy(update={"reasons": ("Load average 8 on 4 cores.",)})
    curve = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in SIZES}, contention=busy))

    answer = _recommend(step_time=curve)

    assert answer.status == "unstable"
    assert answer.plan is not None
    assert any("Load average 8" in sentence for sentence in answer.advice)


def test_unstable_timings_are_the_first_advice():
    busy = QUIET.model_copy(update={"reasons": ("Load average 8 on 4 cores.",)})
    curve = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in SIZES}, contention=busy))

    answer = _recommend(step_time=curve, noise_scale=noise(status=Status.INDETERMINATE))

    assert answer.advice[0].startswith("The timings are not reliable")
    assert answer.advice[1].startswith("The plan rests on speed alone")


def test_nothing_fits_has_no_plan():
    answer = _recommend(memory=memory(None, status=Status.NOTHING_FITS))

    assert (answer.status, answer.plan) == ("nothing_fits", None)
    assert "1.00 MiB" in answer.advice[0]


def test_comparisons_are_draw_wise_and_name_their_evidence():
    sizes = (16, 100, 256, 1000)
    answer = _recommend(step_time=fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in sizes})), memory=memory(1000))

    by_label = {comparison.label: comparison for comparison in answer.comparisons}
    assert set(by_label) == {"32", "64", "128", "256", "power of two above", "largest that fits", "best throughput"}
    assert by_label["256"].evidence == "measured"
    assert by_label["64"].evidence == "extrapolated"
    own = [c for c in answer.comparisons if c.global_batch_size == answer.plan.global_batch_size]
    assert all(c.relative_time.low == c.relative_time.high == pytest.approx(1.0) for c in own)
    assert by_label["largest that fits"].relative_samples.value > 1


def test_sensitivities_move_with_the_noise_scale_and_the_memory():
    answer = _recommend(noise_scale=noise(150.0))

    changes = {s.change: s.global_batch_size for s in answer.sensitivities}
    assert changes["noise scale 4x smaller"] < answer.plan.global_batch_size < changes["noise scale 4x larger"]
    assert "half the memory" in changes


def test_half_the_memory_still_holds_the_largest_timed_size_that_needs_less():
    sizes = (16, 96, 384, 800)
    curve = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in sizes}))

    answer = _recommend(step_time=curve, memory=memory(800), noise_scale=noise(20_000.0), workload=workload(couples_samples=True))

    assert answer.plan.global_batch_size == 800
    assert {s.change: s.global_batch_size for s in answer.sensitivities}["half the memory"] == 384


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_norm": True, "train_size": 256 * 40 + 1}, "last micro-batch of one"),
        ({"train_size": 1500}, "An epoch is only"),
        ({"loss_reduction": "sum"}, "The loss is a sum"),
        ({"couples_samples": True}, "as in contrastive learning: another size trains for something else"),
        ({"loss_parameter_count": 7}, "Trainable parameters of the loss itself, 7 here, are not trained"),
        ({"lr_batch_size": None}, "give lr_batch_size="),
    ],
)
def test_advice_names_what_to_mind(changes, words):
    assert any(words in sentence for sentence in _recommend(workload=workload(**changes)).advice)
    assert not any(words in sentence for sentence in _recommend().advice)


@pytest.mark.parametrize(("beyond", "is_said"), [(1, True), (2, True), (3, False)])
def test_lone_sample_is_counted_by_rank_as_a_distributed_sampler_deals_them_out(beyond, is_said):
    """Of two samples more than whole steps each rank gets one; of one more too, since it is repeated."""
    constraints = Constraints(world_size=2)
    plan = _recommend(constraints=constraints).plan
    size = plan.global_batch_size * 40 + beyond
    answer = _recommend(workload=workload(batch_norm=True, train_size=size), constraints=constraints)

    assert (answer.plan.global_batch_size, answer.plan.world_size) == (plan.global_batch_size, 2)
    said = [sentence.partition(" leave ")[0] for sentence in answer.advice if "last micro-batch of one" in sentence]
    assert said == ([f"{-(-size // 2)} samples a rank"] if is_said else [])


def test_advice_names_an_evaluation_batch_that_would_not_fit():
    curve = memory(1024)

    small, large = (_recommend(memory=curve.model_copy(update={"evaluation_ceiling": size})) for size in (8, 8192))

    assert any("Evaluation is predicted to fit no more than 8 samples" in sentence for sentence in small.advice)
    assert not any("Evaluation" in sentence for sentence in large.advice)


def test_judge_recovers_a_planted_answer():
    findings = _judge(_measurements())

    assert findings.noise_scale.low <= 100 <= findings.noise_scale.high
    assert findings.recommendation.plan.global_batch_size in (64, 128, 256)
    assert findings.memory.ceiling == 1024


def test_judge_takes_the_noise_at_a_later_checkpoint_into_the_runs():
    gradients = gaussian_gradients(np.random.default_rng(5), samples=480, noise_scale=400.0, dimension=200)
    later = norms_of(gradients, micro_batch_size=4, block_counts=(6,) * 20, samples_seen=20_000)
    checked = BranchMeasurements(
        checkpoint_samples=20_000,
        checkpoint_batch_size=64,
        evaluated_samples=512,
        target_loss=None,
        probes=(),
        checkpoint_norms=later,
    )

    before, after = _judge(_measurements()).noise_scale, _judge(_measurements(branches=checked)).noise_scale

    assert [snapshot.samples_seen for snapshot in after.snapshots] == [0, 2000, 20_000]
    assert after.value > 1.3 * before.value


def test_plan_takes_no_rate_that_no_branch_trained_with_however_the_noise_moved_the_rule():
    gradients = gaussian_gradients(np.random.default_rng(5), samples=480, noise_scale=1000.0, dimension=200)
    later = norms_of(gradients, micro_batch_size=4, block_counts=(6,) * 20, samples_seen=20_000)
    size, rates = _judge(_measurements()).recommendation.plan.global_batch_size, (0.02, 0.03, 0.04)

    def probe(lr, over_rule):
        result = TrainingProbe(global_batch_size=size, lr=lr, lr_over_rule=over_rule, outcome=ProbeOutcome.REACHED, samples=1000 / lr)
        return BranchProbe(micro_batch_size=size, accumulation_steps=1, result=result, losses=((1000, 1.0),))

    checked = BranchMeasurements(
        checkpoint_samples=20_000,
        checkpoint_batch_size=size,
        evaluated_samples=512,
        target_loss=1.0,
        probes=tuple(probe(lr, over_rule) for lr, over_rule in zip(rates, (0.5, 1.0, 2.0), strict=True)),
        checkpoint_norms=later,
    )

    plan = _judge(_measurements(branches=checked)).recommendation.plan

    assert plan.global_batch_size == size
    assert rates[0] <= plan.lr <= rates[-1] * (1 + 1e-6)


def test_judge_of_one_part_alone_has_no_plan_or_the_knee():
    memory_only = _judge(_measurements(step_time=None, gradient_noise=None))
    speed_only = _judge(_measurements(memory=None, gradient_noise=None))

    assert (memory_only.recommendation.status, memory_only.recommendation.plan) == ("inconclusive", None)
    assert memory_only.tradeoff is None
    assert speed_only.recommendation.plan.global_batch_size == speed_only.step_time.knee


def test_recommendation_and_tradeoff_rest_on_the_same_draws():
    findings = _judge(_measurements())

    chosen = findings.recommendation.plan.global_batch_size
    point = next(p for p in findings.tradeoff.points if p.global_batch_size == chosen)
    assert findings.recommendation.expected_regret == pytest.approx(point.regret, abs=1e-12)


def test_no_allowed_size_is_said():
    answer = _recommend(constraints=Constraints(max_global_batch_size=3))

    assert answer.plan is None
    assert "raise --max-global-batch" in answer.advice[0]


def _swept(sizes):
    probes = tuple(
        TrainingProbe(global_batch_size=b, lr=0.1, outcome=ProbeOutcome.REACHED, samples=4000 * (1 + b / 120), log_error=0.05)
        for b in sizes
    )
    return SweepEvidence(target="accuracy >= 0.97", folder="rightbatch-runs/sweep", probes=probes)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_sweep_answers_whatever_the_gradient_noise_says(steps):
    measured = _measurements()
    short = tuple(
        norms.model_copy(
            update={
                "block_counts": norms.block_counts[:steps],
                "block_sq_norm_sums": norms.block_sq_norm_sums[:steps],
                "block_gram": tuple(row[:steps] for row in norms.block_gram[:steps]),
            }
        )
        for norms in measured.gradient_noise.snapshots
    )
    noise_part = measured.gradient_noise.model_copy(update={"snapshots": short}) if steps else None

    findings = _judge(_measurements(gradient_noise=noise_part, swept=_swept((16, 64, 256))))

    assert findings.noise_scale is None or findings.noise_scale.status is Status.AT_LEAST
    assert findings.recommendation.status == "ok"
    assert 16 <= findings.recommendation.plan.global_batch_size <= 256
    critical = findings.tradeoff.critical_batch_size
    assert (critical.status, critical.n) == (Status.OK, 3)
    assert critical.low < 120 < critical.high
    assert not any("noise" in sentence for sentence in findings.recommendation.advice)


def test_a_search_that_the_budget_ended_before_any_size_ran_names_no_ceiling():
    ended = memory(None, stopped_by="budget", status=Status.INDETERMINATE)

    assert not any("None" in sentence for sentence in _recommend(memory=ended).advice)


def test_a_sweep_of_other_sizes_than_the_timed_ones_leaves_none_to_choose():
    answer = _judge(_measurements(swept=_swept((4, 8)))).recommendation

    assert (answer.status, answer.plan) == ("inconclusive", None)
    assert "rightbatch sweep" in answer.advice[0]


def test_a_sweep_that_leaves_the_critical_size_open_asks_for_more_of_it():
    answer = _judge(_measurements(swept=_swept((16, 32)), gradient_noise=None)).recommendation

    assert answer.status == "inconclusive"
    assert "sweep again" in answer.advice[0]


def test_powers_of_two_beside_the_choice_are_compared():
    sizes = (100, 200, 400, 800, 1600)
    odd = fit_step_time(timed({b: law_s(b, 0.02, 8000.0) for b in sizes}))

    answer = _recommend(step_time=odd, memory=memory(1600), noise_scale=noise(3000.0))

    by_label = {comparison.label: comparison for comparison in answer.comparisons}
    chosen = answer.plan.global_batch_size
    assert by_label["power of two below"].global_batch_size < chosen < by_label["power of two above"].global_batch_size
    assert all(by_label[f"power of two {side}"].relative_time.low is not None for side in ("below", "above"))


def test_power_of_two_that_is_compared_anyway_is_not_repeated():
    answer = _recommend()
    sizes = [comparison.global_batch_size for comparison in answer.comparisons if comparison.label.isdigit()]
    beside = [c.global_batch_size for c in answer.comparisons if c.label.startswith("power of two")]
    assert not set(sizes) & set(beside)
