"""The benchmarks of sweeps see the faults that they are there to find."""

import argparse

import sweep_kills
from planted_sweeps import Law, settings_of
from rightbatch.records.sweep import TrialSpec
from rightbatch.sweeps.design import expected_trials
from rightbatch.sweeps.study import SweepStudy
from sweep_overhead import seeds_for


def test_a_result_that_is_told_twice_is_counted_twice(tmp_path) -> None:
    study, spec = SweepStudy(tmp_path), TrialSpec(global_batch_size=8, lr=0.1, seed=0, most_samples=9000)
    study.finish(study.start(spec), Law().train(spec))
    study._attempts[spec] += 1
    study.finish(study.start(spec), Law().train(spec))

    assert sweep_kills.told(tmp_path) == {spec.model_dump_json(): 2}


def test_the_journal_is_read_as_optuna_reads_it(tmp_path) -> None:
    study, spec = SweepStudy(tmp_path), TrialSpec(global_batch_size=8, lr=0.1, seed=0, most_samples=9000)
    result = Law().train(spec)
    study.finish(study.start(spec), result)

    assert sweep_kills.kept(tmp_path) == {spec.model_dump_json(): result}


def test_the_undisturbed_sweep_is_a_whole_one() -> None:
    expected = sweep_kills.undisturbed(argparse.Namespace(sizes=3, seeds=2, jobs=2))

    assert {result.spec.global_batch_size for result in expected.values()} == {8, 16, 32}
    assert {result.spec.seed for result in expected.values()} == {0, 1}


def test_the_overhead_is_measured_over_as_many_trials_as_are_asked_for() -> None:
    assert expected_trials(settings_of(seeds=seeds_for(200))) >= 200 > expected_trials(settings_of(seeds=seeds_for(200) - 1))
