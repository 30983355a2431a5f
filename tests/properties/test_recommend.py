import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.oracle_curves import ENVIRONMENT, law_s, noise, timed, workload
from rightbatch.fits.step_time import fit_step_time
from rightbatch.fits.tradeoff import draw_costs, fit_tradeoff
from rightbatch.recommend import judge, recommend
from rightbatch.records.measurements import Measurements
from rightbatch.records.plan import Constraints, Goal, Objective


@settings(max_examples=25, deadline=None)
@given(
    scale=st.floats(1.0, 1e5),
    fixed_s=st.floats(1e-3, 0.1),
    ranks=st.integers(1, 4),
    cap=st.none() | st.integers(64, 5000),
    goal=st.sampled_from([Goal.TIME, Goal.SAMPLES, Goal.ACCURACY]),
)
def test_plan_sizes_multiply_and_respect_the_bounds(scale, fixed_s, ranks, cap, goal):
    shared = {
        "step_time": fit_step_time(timed({b: law_s(b, fixed_s, 8000.0) for b in (16, 64, 256)})),
        "loader": None,
        "noise_scale": noise(scale),
        "memory": None,
        "workload": workload(),
        "constraints": Constraints(world_size=ranks, max_global_batch_size=cap),
    }
    objective = Objective(goal=goal)
    draws = draw_costs(**shared, rng=np.random.default_rng(0))
    tradeoff = fit_tradeoff(draws, noise_scale=shared["noise_scale"], objective=objective)

    plan = recommend(**shared, objective=objective, draws=draws, tradeoff=tradeoff).plan

    assert plan.global_batch_size == plan.micro_batch_size * plan.accumulation_steps * plan.world_size
    assert plan.world_size == ranks
    assert plan.global_batch_size <= (cap or 60_000)
    assert plan.micro_batch_size in (16, 64, 256)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), jitter=st.floats(0.0, 0.1))
def test_judge_is_deterministic(seed, jitter):
    measurements = Measurements(
        workload=workload(), step_time=timed({b: law_s(b, 0.02, 8000.0) for b in (16, 64, 256)}, jitter=jitter, seed=seed)
    )

    def verdict():
        return judge(
            measurements,
            environment=ENVIRONMENT,
            objective=Objective(),
            constraints=Constraints(),
            measured_at="2024-01-01T00:00:00Z",
            duration_s=0.0,
            rng_seed=seed,
        )

    assert verdict().model_dump_json() == verdict().model_dump_json()
