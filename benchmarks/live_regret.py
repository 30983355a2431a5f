"""Time to a target of what `find` says, against a sweep with the rate tuned at every size, by real training.

Run: python benchmarks/live_regret.py [--data cifar10_jpeg.npz] [--workloads FILE.py] [--truth FILE.json] [--noise] [--elsewhere] [--json]

Three small CNNs (CIFAR-10 only with --data; the trainings that are kept saw its JPEG form), or every public function of FILE.py that
returns a ``rightbatch.Workload`` with ``valid``, ``metric``, ``optimizer`` and ``lr_batch_size`` when called without arguments. The file
names what to reach: ``TARGETS = {"function": "accuracy>=0.9"}`` (the word before >= is only a name), and may hold ``SIZES`` and ``SEEDS``.
Only trainings that the truth file lacks are made. Samples to the target do not depend on how busy the machine is; seconds are samples
times the median processor seconds a sample of interleaved rounds over all sizes, before, between and after the answers of `find`. It is
asked five times, each with another seed; on a machine that others use, it gets a budget that is longer by what they take. What is compared
is trained with twelve seeds that no rate of the sweep was chosen by. One thread, on the CPU. Exit code 1: a goal does not hold.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import numpy as np
import torch

import live_regret_noise as noise
import live_regret_policies as policies
import live_regret_report as report
import live_regret_scoring as scoring
import live_regret_training as training
import live_regret_truth as truths
import rightbatch as rb
from goals import exit_code, goal_line
from live_regret_scoring import Policy, Row
from rightbatch.engine.provenance import environment
from rightbatch.records.plan import Findings
from workload_files import workloads_of

BUILT_IN = Path(__file__).with_name("live_regret_workloads.py")
RECORD = Path(__file__).parent / "records" / "2026-11-24_cpu_live-regret" / "truth.json"
USERS_RECORD = Path("rightbatch-runs") / "live-regret-truth.json"
SIZES = tuple(2**power for power in range(4, 12))
SEEDS = 3
BUDGET_SHARE = 0.08
"""Budget of `find` over the cost of the sweep: starting its process has to fit below a tenth too."""
LEAST_BUDGET_S = 4.0
SCORED_SEEDS = range(100, 112)
"""With these every policy is trained, the sweep's best too: with the seeds that chose it, the best of a sweep looks better than it is."""
ASKS = 5
"""How often `find` is asked, each time with another seed: one answer is a matter of chance."""
TIMING_S = 10.0
"""Processor seconds of the rounds at the end, which have every size."""
BETWEEN_S = 3.0
"""Processor seconds of rounds after every answer of `find`: answers and scores are of the same time."""


class Question:
    """One workload with its target, its sweep and its truth.

    Args:
        name: Of the function that made it.
        workload: What is trained.
        module: The file it comes from.
        truth_path: The cache of trainings.
    """

    def __init__(self, name: str, workload: rb.Workload, module: ModuleType, truth_path: Path) -> None:
        if workload.optimizer is None or workload.lr_batch_size is None:
            sys.exit(f"{name} must have optimizer= and lr_batch_size=, the size at which its rate was tuned; one of them is missing.")
        targets = getattr(module, "TARGETS", {})
        if name not in targets:
            sys.exit(f'the file of {name} must say what to reach: TARGETS = {{"{name}": "accuracy>=0.9"}}; it has {targets}.')
        self.name, self.workload, self.target = name, workload, targets[name]
        self.base_size, self.train_size = workload.lr_batch_size, len(workload.train)
        self.seeds = getattr(module, "SEEDS", {}).get(name, SEEDS)
        self.sizes = [size for size in getattr(module, "SIZES", {}).get(name, SIZES) if size <= self.train_size]
        self.trainer = training.Trainer(workload, float(self.target.partition(">=")[2]))
        key = truths.fingerprint(Path(module.__file__ or ""), name, self.target, training.PROTOCOL, self.train_size)
        self.truth = truths.Truth(truth_path, name, key, self.trainer, lambda line: print(line, file=sys.stderr, flush=True))

    def sweep(self) -> tuple[truths.Tuned, ...]:
        """Complete the truth."""
        tuned = truths.sweep(self.truth, self.sizes, (self.base_size, self.trainer.base_lr), self.train_size, self.seeds)
        if not tuned:
            sys.exit(f"{self.name} never reached {self.target} in {truths.MOST_EPOCHS} epochs at any rate tried; name a target it reaches.")
        return tuned

    def ask(
        self, tuned: Sequence[truths.Tuned], find: Callable[..., policies.Answer], *, elsewhere: bool
    ) -> tuple[list[Policy], Findings | None, tuple[str, ...]]:
        """Return what every policy would train with, what `find` found, and which policies are missing and why."""
        lr = self.trainer.base_lr
        answers = {
            f"{scoring.VERIFY if verify else scoring.FIND}, seed {seed}": find(self.workload, lr, verify=verify, seed=seed)
            for verify in (False, True)
            for seed in range(ASKS)
        }
        findings = next(iter(answers.values()))[1]
        if elsewhere:
            ends = policies.find_elsewhere(partial(find, verify=False), self.workload, lr, tuned)
            answers |= {f"find, rate from the {end} size": answer for end, answer in zip(("smallest", "largest"), ends, strict=True)}
        listed = [policy for policy, _, _ in answers.values() if policy is not None]
        listed += policies.others(findings, lr, self.train_size, max(self.sizes))
        return listed, findings, tuple(f"{name}: {why}" for name, (_, _, why) in answers.items() if why)

    def answer(self, *, with_noise: bool, elsewhere: bool) -> Row:
        """Ask every policy, train what they say, and compare with the sweep."""
        tuned = self.sweep()
        asked = self.truth.asked
        swept = {entry.size for entry in asked}
        timings = [policies.time_sizes(self.trainer, swept, TIMING_S / 2)]
        budget_s = max(LEAST_BUDGET_S, BUDGET_SHARE * scoring.cost_s(asked, timings[0].sample_s))

        def find(*arguments: Any, **options: Any) -> policies.Answer:
            answer = policies.find(*arguments, **options, budget_s=budget_s, slowdown=timings[0].slowdown)
            timings.append(policies.time_sizes(self.trainer, swept, BETWEEN_S))
            return answer

        listed, findings, missing = self.ask(tuned, find, elsewhere=elsewhere)
        timings.append(policies.time_sizes(self.trainer, swept | {policy.timed_size for policy in listed}, TIMING_S))
        timing = policies.pooled(timings)
        sample_s, sweep_s = timing.sample_s, scoring.cost_s(asked, timing.sample_s)
        best = self._trained_again(scoring.best_of(tuned, sample_s), tuned)
        listed.insert(0, policies.reference(best, sweep_s))
        return Row(
            name=self.name,
            target=self.target,
            tuned=tuned,
            sample_s=sample_s,
            sweep_s=sweep_s,
            budget_s=budget_s,
            scores=tuple(scoring.score(policy, self._trained(policy, tuned), best, sample_s, sweep_s) for policy in listed),
            missing=missing,
            hyperbola=scoring.fit_hyperbola(tuned, np.random.default_rng(0)),
            findings=findings,
            slowdown=timing.slowdown,
            disturbances=timing.reasons,
            noise=self._noise(tuned, findings) if with_noise else (),
        )

    def _trained(self, policy: Policy, tuned: tuple[truths.Tuned, ...]) -> tuple[truths.Training, ...]:
        most = truths.MOST_OVER_FEWEST * min(mean(entry.samples) for entry in tuned)
        return self.truth.seeds(policy.size, policy.lr, SCORED_SEEDS, most)

    def _trained_again(self, best: truths.Tuned, tuned: tuple[truths.Tuned, ...]) -> truths.Tuned:
        trainings = self._trained(policies.reference(best, 0.0), tuned)
        samples = tuple(training.samples_to_target for training in trainings if training.samples_to_target is not None)
        if len(samples) < len(trainings):
            sys.exit(
                f"{self.name}: the sweep's best, batch {best.size} at {best.lr:g}, misses {self.target} with other seeds; raise SEEDS."
            )
        return replace(best, samples=samples)

    def _noise(self, tuned: tuple[truths.Tuned, ...], findings: Findings | None) -> tuple[noise.GradientNoiseMeasurements, ...]:
        base = min(tuned, key=lambda entry: abs(entry.size - self.base_size))
        batch_norm = findings is not None and findings.workload.batch_norm
        run = partial(noise.along_a_run, self.trainer, base.size, base.lr, mean(base.samples), batch_norm=batch_norm)
        return tuple(run(seed=seed) for seed in range(noise.SEEDS))


def questions(options: argparse.Namespace) -> list[Question]:
    """Load the workloads that are asked for."""
    path = options.workloads or BUILT_IN
    sys.path.insert(0, str(path.resolve().parent))  # where `find` measures, in another process, the file is imported again
    workloads, module = workloads_of(path)
    if options.workloads is None and options.data is not None:
        workloads["cifar10"] = module.cifar10(options.data)
    elif options.workloads is None:
        print("CIFAR-10 is left out: give --data to include it.", file=sys.stderr)
    chosen = {name: value for name, value in workloads.items() if not options.only or name in options.only}
    if not chosen:
        sys.exit(f"--only must name some of {', '.join(workloads)}; got {' '.join(options.only)}.")
    truth_path = options.truth or (RECORD if options.workloads is None else USERS_RECORD)
    return [Question(name, workload, module, truth_path) for name, workload in chosen.items()]


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return the options that say which of the built-in workloads are asked for, and where their trainings are kept."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10 in one of the forms of examples/cifar10.py; without it that workload is left out")
    parser.add_argument("--only", nargs="+", help="names of workloads")
    parser.add_argument("--truth", type=Path, help="cache of trainings, completed where something is missing")
    parser.set_defaults(workloads=None)
    return parser


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--workloads", type=Path, help="file of functions that return workloads; the built-in three by default")
    parser.add_argument("--sweep-only", action="store_true", help="complete the truth and stop")
    parser.add_argument("--noise", action="store_true", help="measure the noise scale along whole runs too")
    parser.add_argument("--elsewhere", action="store_true", help="ask find too with the rates of the smallest and the largest size")
    parser.add_argument("--json", action="store_true", help="print one JSON document; the text goes to standard error")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = questions(options)
    if options.sweep_only:
        for question in asked:
            question.sweep()
        return 0
    rows = [question.answer(with_noise=options.noise, elsewhere=options.elsewhere) for question in asked]
    goals = [*scoring.goals({row.name: row.scores for row in rows}), *scoring.critical_goals(rows)]
    place = environment(asked[0].trainer.rig(), "in-process")
    where = {
        "device": place.device_name,
        "versions": dict(place.versions),
        "date": datetime.now(UTC).date().isoformat(),
        "n": {question.name: question.seeds for question in asked},
        "scored": len(SCORED_SEEDS),
        "threads": place.threads,
        "slowdown": {row.name: round(row.slowdown, 1) for row in rows},
        "disturbances": {row.name: row.disturbances for row in rows},
    }
    text = "\n\n".join((*map(report.show, rows), "\n".join(map(goal_line, goals))))
    print(text, " · ".join(f"{key} {value}" for key, value in where.items()), sep="\n", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps({"goals": goals, "workloads": [report.document(row) for row in rows], "environment": where}, indent=2))
    return exit_code(goals)


if __name__ == "__main__":
    sys.exit(main())
