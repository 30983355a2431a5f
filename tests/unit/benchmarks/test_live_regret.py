"""The benchmark of regret by training: the climb over rates, what stops a training, what the cache keeps, and the arithmetic of regrets."""

import json
import math
import sys
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import findings_samples
import live_regret
import live_regret_policies as policies
from live_regret_scoring import Policy, best_of, cost_s, fit_hyperbola, goals, rate_saturation, score
from live_regret_training import Crossing, Trainer
from live_regret_truth import CONTENDS, REACH, Ending, Training, Truth, Tuned, fingerprint, hill_climb, rounded, sweep
from rightbatch.errors import InconclusiveError, RightbatchWarning
from rightbatch.fits.lr_scaling import couple_lr
from rightbatch.workload.ingredients import Workload
from workload_files import workloads_of

FEWEST, CRITICAL, BASE_LR = 1000.0, 64.0, 0.1
SIZES = (16, 32, 64, 128)


class FakeTrainer:
    """Samples to the target follow a planted law: a hyperbola in the size, a parabola in log2(rate), a little for each seed."""

    def __init__(self, *, diverges_above: float = math.inf, failing_seed: int | None = None, reachable: bool = True) -> None:
        self.diverges_above = diverges_above
        self.failing_seed = failing_seed
        self.reachable = reachable
        self.calls: list[tuple[int, float, int]] = []

    def best_exponent(self, size: int) -> int:
        return round(math.log2((1 + CRITICAL / 32) / (1 + CRITICAL / size)))

    def samples(self, size: int, lr: float, seed: int) -> float:
        off = math.log2(lr / BASE_LR) - self.best_exponent(size)
        return FEWEST * (1 + size / CRITICAL) * (1 + off**2) * (1 + 0.01 * seed)

    def __call__(self, size: int, lr: float, seed: int, most_samples: float) -> Ending:
        self.calls.append((size, lr, seed))
        if lr > self.diverges_above or seed == self.failing_seed:
            return Ending(samples_to_target=None, samples_seen=size, diverged=True)
        needed = self.samples(size, lr, seed)
        if needed > most_samples or not self.reachable:
            return Ending(samples_to_target=None, samples_seen=math.ceil(most_samples))
        return Ending(samples_to_target=needed, samples_seen=math.ceil(needed))


def truth_of(path, trainer, key="key", name="planted"):
    return Truth(path / "truth.json", name, key, trainer)


def least(reached):
    return min(reached, key=lambda exponent: reached[exponent])


@pytest.mark.parametrize("start", [-2, 0, 3])
def test_the_climb_finds_the_best_rate_from_either_side(start):
    def samples_at(exponent, most):
        samples = 100.0 + (exponent - 1) ** 2
        return samples if samples <= most else None

    assert least(hill_climb(samples_at, start, 1e6)) == 1


def test_an_attempt_is_stopped_once_it_is_clearly_worse_than_the_best_before_it():
    asked = []

    def samples_at(exponent, most):
        asked.append((exponent, most))
        samples = {0: 300.0, 1: 200.0, 2: 220.0}.get(exponent, 999.0)
        return samples if samples <= most else None

    assert hill_climb(samples_at, 0, 500.0) == {0: 300.0, 1: 200.0, 2: 220.0}
    assert asked == [(0, 500.0), (1, CONTENDS * 300.0), (2, CONTENDS * 200.0)]


def test_the_climb_looks_below_first_when_the_start_fails_and_goes_on_until_something_works():
    asked = []

    def samples_at(exponent, most):
        asked.append(exponent)
        return 100.0 if exponent == -2 else None

    assert hill_climb(samples_at, 0, 500.0) == {-2: 100.0}
    assert asked == [0, -1, -2, -3]


def test_the_climb_gives_up_within_its_reach():
    asked = []
    assert hill_climb(lambda exponent, most: asked.append(exponent), 0, 500.0) == {}
    assert sorted(asked) == list(range(-REACH, REACH + 1))


def test_a_rate_that_only_the_first_seed_prefers_loses_to_its_neighbour(tmp_path):
    table = {0.1: (100.0, 180.0, 190.0), 0.05: (110.0, 120.0, 115.0)}

    def train(size, lr, seed, most):
        needed = table.get(lr, (900.0,) * 3)[seed]
        return Ending(samples_to_target=needed if needed <= most else None, samples_seen=int(min(needed, most)))

    (found,) = sweep(truth_of(tmp_path, train), (32,), (32, BASE_LR), 500, 3)
    assert (found.lr, found.samples) == (0.05, table[0.05])


def test_the_sweep_recovers_the_planted_rates_and_samples(tmp_path):
    trainer = FakeTrainer()
    found = sweep(truth_of(tmp_path, trainer), SIZES, (32, BASE_LR), 500, 3)
    assert [entry.size for entry in found] == list(SIZES)
    for entry in found:
        assert entry.lr == rounded(BASE_LR * 2.0 ** trainer.best_exponent(entry.size))
        assert entry.samples == pytest.approx([trainer.samples(entry.size, entry.lr, seed) for seed in range(3)])


def test_a_seed_that_fails_at_the_best_rate_moves_the_sweep_to_a_smaller_one(tmp_path):
    trainer = FakeTrainer()
    best = rounded(BASE_LR * 2.0 ** trainer.best_exponent(32))

    def train(size, lr, seed, most):
        if lr == best and seed == 1:
            return Ending(samples_to_target=None, samples_seen=size, diverged=True)
        return trainer(size, lr, seed, most)

    (found,) = sweep(truth_of(tmp_path, train), (32,), (32, BASE_LR), 500, 2)
    assert found.lr == rounded(best / 2)
    assert len(found.samples) == 2


def test_a_size_that_never_reaches_the_target_ends_the_sweep_in_its_direction(tmp_path):
    class TooLarge(FakeTrainer):
        def samples(self, size, lr, seed):
            return super().samples(size, lr, seed) * (100 if size >= 64 else 1)

    trainer = TooLarge()
    found = sweep(truth_of(tmp_path, trainer), SIZES, (32, BASE_LR), 500, 2)
    assert [entry.size for entry in found] == [16, 32]
    assert not any(size == 128 for size, _, _ in trainer.calls)


def test_nothing_is_trained_twice_and_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    class Interrupted(FakeTrainer):
        def __call__(self, size, lr, seed, most_samples):
            if len(self.calls) == 7:
                raise KeyboardInterrupt
            return super().__call__(size, lr, seed, most_samples)

    first = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        sweep(truth_of(tmp_path, first), SIZES, (32, BASE_LR), 500, 3)
    second, whole = FakeTrainer(), FakeTrainer()
    resumed = sweep(truth_of(tmp_path, second), SIZES, (32, BASE_LR), 500, 3)
    assert resumed == sweep(truth_of(tmp_path, whole, name="in one go"), SIZES, (32, BASE_LR), 500, 3)
    assert first.calls + second.calls == whole.calls
    third = FakeTrainer()
    assert sweep(truth_of(tmp_path, third), SIZES, (32, BASE_LR), 500, 3) == resumed
    assert third.calls == []


def test_trainings_of_another_fingerprint_are_not_used_and_other_workloads_stay(tmp_path):
    truth_of(tmp_path, FakeTrainer(), name="other").training(32, 0.1, 0, 1e6)
    truth_of(tmp_path, FakeTrainer()).training(32, 0.1, 0, 1e6)
    changed = FakeTrainer()
    truth_of(tmp_path, changed, key="another").training(32, 0.1, 0, 1e6)
    assert changed.calls == [(32, 0.1, 0)]
    kept = json.loads((tmp_path / "truth.json").read_text())
    assert {name: entry["fingerprint"] for name, entry in kept.items()} == {"other": "key", "planted": "another"}


def test_a_training_that_was_stopped_is_made_again_only_when_more_samples_are_allowed(tmp_path):
    trainer = FakeTrainer()
    truth = truth_of(tmp_path, trainer)
    assert truth.training(32, 0.1, 0, 100).samples_to_target is None
    assert truth.training(32, 0.1, 0, 90).samples_seen == 100
    assert len(trainer.calls) == 1
    assert truth.training(32, 0.1, 0, 1e6).samples_to_target == pytest.approx(trainer.samples(32, 0.1, 0))


def test_a_training_that_diverged_is_not_made_again(tmp_path):
    trainer = FakeTrainer(diverges_above=0.01)
    truth = truth_of(tmp_path, trainer)
    assert truth.training(32, 0.1, 0, 100).diverged
    assert truth.training(32, 0.1, 0, 1e6).diverged
    assert len(trainer.calls) == 1


def test_seeds_end_at_the_first_that_fails(tmp_path):
    found = truth_of(tmp_path, FakeTrainer(failing_seed=1)).seeds(32, 0.1, range(3), 1e6)
    assert [training.samples_to_target is None for training in found] == [False, True]


def test_a_fingerprint_ignores_comments_and_layout_and_sees_everything_else(tmp_path):
    source = tmp_path / "file.py"
    source.write_text("width = 8\n")
    first = fingerprint(source, "accuracy>=0.9")
    source.write_text("# the width\nwidth  =  8\n")
    assert fingerprint(source, "accuracy>=0.9") == first
    assert fingerprint(source, "accuracy>=0.8") != first
    source.write_text("width = 9\n")
    assert fingerprint(source, "accuracy>=0.9") != first


def entry(size, *samples, lr=0.1):
    return Tuned(size=size, lr=lr, samples=tuple(map(float, samples)))


def trainings(size, *samples, lr=0.1):
    return tuple(
        Training(size=size, lr=lr, seed=seed, samples_to_target=value, samples_seen=int(value or 900)) for seed, value in enumerate(samples)
    )


def policy(size, *, cost=0.0, name="find"):
    return Policy(name=name, size=size, lr=0.1, timed_size=size, cost_s=cost)


SAMPLE_S = {16: 0.02, 32: 0.01, 64: 0.005}
BEST = entry(32, 90, 110)


def test_the_best_of_the_sweep_is_the_one_with_the_fewest_seconds_not_samples():
    assert best_of([entry(16, 80), BEST, entry(64, 300)], SAMPLE_S) == BEST


def test_regret_is_the_ratio_of_mean_seconds_less_one():
    found = score(policy(64, cost=3.0), trainings(64, 210.0, 270.0), BEST, SAMPLE_S, sweep_s=60.0)
    assert found.seconds == pytest.approx(1.2)
    assert found.regret == pytest.approx(0.2)
    assert found.cost_share == pytest.approx(0.05)
    both = math.hypot(30 / 240, 10 / 100)
    assert found.standard_error == pytest.approx(1.2 * both)


def test_the_best_itself_has_no_error_against_itself():
    found = score(policy(32), trainings(32, 90.0, 110.0), BEST, SAMPLE_S, sweep_s=60.0)
    assert (found.relative, found.standard_error) == (1.0, 0.0)


def test_a_policy_that_never_arrives_gets_a_lower_bound_and_fails_the_goals():
    found = score(policy(64), trainings(64, 210.0, None), BEST, SAMPLE_S, sweep_s=60.0)
    assert not found.reached
    assert found.relative == pytest.approx(900 * 0.005)
    unlucky = replace(found, relative=1.01)
    assert not any(goal["holds"] for goal in goals({"planted": [unlucky]})[:2])


def test_seconds_of_accumulated_batches_are_those_of_the_micro_batch():
    accumulated = replace(policy(64), timed_size=16)
    assert score(accumulated, trainings(64, 100.0), BEST, SAMPLE_S, sweep_s=60.0).seconds == pytest.approx(2.0)


def test_the_cost_of_a_sweep_counts_stopped_trainings_too():
    assert cost_s(trainings(32, 100.0, None), SAMPLE_S) == pytest.approx((100 + 900) * 0.01)


def test_goals_take_the_mean_and_the_worst_over_workloads():
    near = score(policy(32, cost=1.0), trainings(32, 105.0), BEST, SAMPLE_S, sweep_s=60.0)
    far = score(policy(32, cost=2.0), trainings(32, 130.0), BEST, SAMPLE_S, sweep_s=60.0)
    mean, worst, cost, verified = goals({"near": [near], "far": [far]})
    assert (mean["value"], mean["holds"]) == (0.175, False)
    assert (worst["value"], worst["holds"]) == (0.3, False)
    assert (cost["value"], cost["holds"]) == (pytest.approx(2 / 60, abs=1e-4), True)
    assert (verified["value"], verified["holds"]) == ("not available", False)


def test_a_workload_counts_once_however_often_find_was_asked_and_the_worst_is_of_a_single_answer():
    def answer(samples):
        return score(policy(32, cost=1.0), trainings(32, samples), BEST, SAMPLE_S, sweep_s=60.0)

    mean, worst, *_ = goals({"near": [answer(100.0)], "far": [answer(110.0), answer(120.0), answer(130.0)]})
    assert (mean["value"], worst["value"]) == (0.1, 0.3)


def test_the_hyperbola_recovers_a_planted_critical_batch_size():
    rng = np.random.default_rng(0)
    sizes = (8, 16, 32, 64, 128, 256, 512)
    tuned = [entry(size, *(1000 * (1 + size / 90) * np.exp(0.05 * rng.standard_normal(3)))) for size in sizes]
    found = fit_hyperbola(tuned, rng)
    assert found.low < 90 < found.high
    assert found.critical_batch_size == pytest.approx(90, rel=0.15)
    assert found.fewest_samples == pytest.approx(1000, rel=0.1)
    assert found.high / found.low < 2


def test_the_saturation_of_tuned_rates_is_recovered_from_a_grid_of_rates():
    tuned = [entry(size, 90, lr=0.01 * 2.0 ** round(math.log2(40 / (1 + 120 / size)))) for size in (8, 16, 32, 64, 128, 256, 512, 1024)]
    assert rate_saturation(tuned) == pytest.approx(120, rel=0.35)


def test_the_crossing_is_interpolated_in_the_logarithm_of_the_samples():
    crossing = Crossing(0.5)
    values = [0.0] * 5 + [1.0] * 5
    found = [crossing.add(2**index, value) for index, value in enumerate(values)]
    # the mean of five passes 0.4 at 2**6 and 0.6 at 2**7
    assert found[:7] == [None] * 7
    assert found[7] == pytest.approx(2**6.5)


def learnable():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 4, generator=generator)
    samples = [(row, int(row[0] > 0)) for row in inputs]
    return Workload(
        model=lambda: nn.Linear(4, 2),
        train=samples[:200],
        valid=samples[200:],
        loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        metric=lambda scores, labels: (scores.argmax(1) == labels).float().mean().item(),
        lr_batch_size=16,
    )


def test_a_real_training_reaches_its_target_the_same_way_each_time():
    trainer = Trainer(learnable(), 0.9)
    first = trainer(16, 0.1, 0, 1e5)
    assert first.samples_to_target is not None
    assert first == trainer(16, 0.1, 0, 1e5)
    assert first != trainer(16, 0.1, 1, 1e5)


def test_a_real_training_uses_the_rate_it_is_given():
    trainer = Trainer(learnable(), 0.9)
    assert trainer(16, 0.4, 0, 1e5).samples_to_target < trainer(16, 0.05, 0, 1e5).samples_to_target


def test_a_real_training_stops_at_its_limit_and_at_a_loss_that_is_not_finite():
    trainer = Trainer(learnable(), 2.0)
    stopped = trainer(16, 0.1, 0, 400)
    assert (stopped.samples_to_target, stopped.samples_seen, stopped.diverged) == (None, 400, False)
    assert trainer(16, 1e30, 0, 4000).diverged


def test_samples_that_change_from_reading_to_reading_are_not_held():
    class Noisy:
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return torch.randn(4), 0

    steady, noisy = learnable(), replace(learnable(), train=Noisy())
    assert Trainer(steady, 0.9)._held is not None
    assert Trainer(noisy, 0.9)._held is None
    assert Trainer(noisy, 2.0)(16, 0.1, 0, 64).samples_seen == 64


def test_functions_that_need_an_argument_are_left_out(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch, rightbatch as rb\n"
        "def mine(width: int = 2):\n"
        "    return rb.Workload(model=torch.nn.Linear(width, 2), train=[(torch.zeros(2), 0)], loss=torch.nn.functional.cross_entropy)\n"
        "def needs(data): raise AssertionError\n"
    )
    workloads, _ = workloads_of(source)
    assert list(workloads) == ["mine"]


def fake_plan(**changes):
    given = {"global_batch_size": 96, "micro_batch_size": 32, "lr": 0.3, "findings": SimpleNamespace(duration_s=30.0)}
    return SimpleNamespace(**(given | changes))


def test_find_gets_a_longer_budget_on_a_busy_machine_and_is_charged_for_an_idle_one(monkeypatch):
    asked = {}

    def fake_find(workload, **options):
        asked.update(options)
        warnings.warn("the recommendation is unstable; print(plan) says why.", RightbatchWarning, stacklevel=2)
        return fake_plan()

    monkeypatch.setattr(policies.rb, "find", fake_find)
    found, _, why = policies.find(learnable(), 0.1, budget_s=10.0, slowdown=4.0, verify=False)
    assert (asked["budget"], asked["verify"], why) == ("40.0s", False, "")
    assert (found.size, found.timed_size, found.lr, found.cost_s) == (96, 32, 0.3, 7.5)
    assert found.note == "seed 0; the recommendation is unstable"


def test_a_plan_without_a_rate_is_trained_at_the_base_rate(monkeypatch):
    monkeypatch.setattr(policies.rb, "find", lambda workload, **options: fake_plan(lr=None))
    assert policies.find(learnable(), 0.1, budget_s=10.0, slowdown=1.0, verify=False)[0].lr == 0.1


def test_verify_and_the_seed_are_passed_on(monkeypatch):
    def fake_find(workload, *, verify, seed, **options):
        return fake_plan(lr=0.5 if verify else seed)

    monkeypatch.setattr(policies.rb, "find", fake_find)
    ask = partial(policies.find, learnable(), 0.1, budget_s=10.0, slowdown=1.0)
    assert (ask(verify=True)[0].name, ask(verify=True)[0].lr) == ("find --verify", 0.5)
    assert (ask(verify=False, seed=2)[0].name, ask(verify=False, seed=2)[0].lr) == ("find", 2)


def test_an_answer_that_find_refuses_is_a_missing_policy(monkeypatch):
    def refuses(workload, **options):
        raise InconclusiveError("too noisy")

    monkeypatch.setattr(policies.rb, "find", refuses)
    assert policies.find(learnable(), 0.1, budget_s=10.0, slowdown=1.0, verify=False) == (None, None, "InconclusiveError: too noisy")


def test_a_rate_from_another_size_is_given_to_find_as_tuned_there():
    asked = []

    def ask(workload, lr):
        (group,) = workload.optimizer([torch.zeros(1, requires_grad=True)]).param_groups
        asked.append((workload.lr_batch_size, lr, group["lr"]))
        return policy(64), None, ""

    found = policies.find_elsewhere(ask, learnable(), 0.1, [entry(8, 90, lr=0.025), entry(32, 90), entry(512, 90, lr=0.4)])
    assert asked == [(8, 0.025, pytest.approx(0.025)), (512, 0.4, pytest.approx(0.4))]
    assert [answer[0].name for answer in found] == ["find, rate from 8", "find, rate from 512"]


def test_policies_without_tuning_take_the_ceiling_and_the_noise_at_initialisation_from_find():
    given = findings_samples.good()
    found = {policy.name: policy for policy in policies.others(given, 0.1, 40_000, largest_timed=64)}
    largest = found["largest that fits"]
    assert (largest.size, largest.lr, largest.timed_size) == (given.memory.ceiling, 0.1, 64)
    first = given.noise_scale.snapshots[0].noise_scale.value
    assert found[policies.NOISE_AT_START].size == round(first)
    assert found[policies.NOISE_AT_START].lr == rounded(0.1 * couple_lr(given.workload, first, round(first)).factor)
    assert [policy.name for policy in policies.others(None, 0.1, 100, largest_timed=64)] == ["32", "128"]
    assert policies.others(None, 0.1, 100, largest_timed=64)[1].size == 100


USERS_FILE = """
import torch
import rightbatch as rb

TARGETS = {"halves": "accuracy>=0.9"}
SIZES = {"halves": (8, 16, 32)}
SEEDS = {"halves": 2}


def halves():
    inputs = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    samples = [(row, int(row[0] > 0)) for row in inputs]
    return rb.Workload(
        model=lambda: torch.nn.Linear(4, 2), train=samples[:200], valid=samples[200:], loss=torch.nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1), lr_batch_size=16, num_workers=0,
        metric=lambda scores, labels: (scores.argmax(1) == labels).float().mean().item(),
    )
"""


def found_in_a_moment(workload, base_lr, *, budget_s, slowdown, verify, seed):
    assert isinstance(workload, Workload)
    assert budget_s > 0
    assert slowdown >= 1
    if verify:
        return None, None, "not available"
    return Policy(name="find", size=24, lr=base_lr, timed_size=24, cost_s=0.0, note=f"seed {seed}"), None, ""


def run_main(monkeypatch, capsys, tmp_path, *words):
    (tmp_path / "users_file.py").write_text(USERS_FILE)
    monkeypatch.setattr(live_regret, "TIMING_S", 0.1)
    monkeypatch.setattr(live_regret.policies, "find", found_in_a_moment)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["live_regret.py", "--workloads", str(tmp_path / "users_file.py"), *words])
    threads = torch.get_num_threads()
    try:
        code = live_regret.main()
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("users_file", None)
    return code, capsys.readouterr()


def test_a_file_of_the_user_is_swept_once_and_scored_as_one_document(monkeypatch, capsys, tmp_path):
    words = ("--truth", str(tmp_path / "truth.json"), "--noise", "--json")
    code, printed = run_main(monkeypatch, capsys, tmp_path, *words)
    document = json.loads(printed.out)
    assert code == 1, "without --verify and an interval of find two goals cannot hold"
    assert {goal["name"]: goal["holds"] for goal in document["goals"]}["mean regret of find --verify"] is False
    (row,) = document["workloads"]
    assert [entry["size"] for entry in row["sweep"]] == [8, 16, 32]
    sizes = {entry["policy"]["name"]: entry["policy"]["size"] for entry in row["policies"]}
    assert sizes == {"sweep": sizes["sweep"], "find": 24, "32": 32, "128": 128}
    assert row["policies"][0]["relative"] == 1.0
    assert document["environment"]["n"] == {"halves": 2}
    assert "halves: batch 24" in printed.err
    _, again = run_main(monkeypatch, capsys, tmp_path, *words)
    assert "halves: batch" not in again.err, "every training was remembered"


def test_the_text_shows_every_size_every_policy_and_every_goal(monkeypatch, capsys, tmp_path):
    _, printed = run_main(monkeypatch, capsys, tmp_path, "--truth", str(tmp_path / "truth.json"), "--noise")
    lines = printed.out.splitlines()
    assert lines[0].startswith("halves, accuracy>=0.9; sweep ")
    assert [line.split()[0] for line in lines[2:5]] == ["8", "16", "32"]
    for beginning in (
        "  sweep ",
        "  find ",
        "  32 ",
        "  128 ",
        "  find --verify, seed 4: not available",
        "FAIL mean regret of find --verify",
    ):
        assert any(line.startswith(beginning) for line in lines), beginning
    assert any("calibration c" in line for line in lines)


def test_a_target_is_required(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "USERS_FILE", USERS_FILE.replace('{"halves": "accuracy>=0.9"}', "{}"))
    with pytest.raises(SystemExit, match="must say what to reach"):
        run_main(monkeypatch, capsys, tmp_path, "--truth", str(tmp_path / "truth.json"))


def timing(slowdown=1.0, reasons=(), **sample_s):
    return policies.Timing(sample_s={int(size[1:]): value for size, value in sample_s.items()}, slowdown=slowdown, reasons=reasons)


def test_rounds_of_different_times_give_the_median_of_the_ratios_between_sizes():
    quiet, slow = timing(b32=4.0, b64=2.0), timing(b32=40.0, b64=20.0, slowdown=3.0, reasons=("throttled",))
    odd = timing(b32=4.0, b64=4.0, b100=2.0, reasons=("throttled",))

    pooled = policies.pooled([quiet, slow, odd])

    assert pooled.sample_s[32] / pooled.sample_s[64] == pytest.approx(2.0)
    assert pooled.sample_s[32] * pooled.sample_s[64] == pytest.approx(16.0)  # the level is the median one
    assert pooled.sample_s[100] == pytest.approx(2.0)
    assert (pooled.slowdown, pooled.reasons) == (3.0, ("throttled",))
