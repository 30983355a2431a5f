import errno
import json
import os

import optuna
import pytest

from planted_sweeps import Law
from rightbatch.errors import RunFolderError
from rightbatch.records.sweep import TrialResult, TrialSpec, TrialStatus
from rightbatch.records.sweep_folder import JOURNAL_FILE
from rightbatch.sweeps.study import KILLED, SweepStudy


def spec_of(seed=0, size=64):
    return TrialSpec(global_batch_size=size, lr=0.1, seed=seed, most_samples=200_000)


def finish(study, spec):
    result = Law().train(spec)
    study.finish(study.start(spec), result)
    return result


def states(folder):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL_FILE)))
    return [trial.state.name for trial in optuna.load_study(study_name="sweep", storage=storage).get_trials()]


def test_results_are_there_when_the_journal_is_opened_again(tmp_path):
    study = SweepStudy(tmp_path)
    results = {finish(study, spec_of(seed)) for seed in range(3)}

    assert set(SweepStudy(tmp_path).results) == results


def test_an_attempt_that_was_running_is_given_up_and_made_again(tmp_path):
    SweepStudy(tmp_path).start(spec_of())

    study = SweepStudy(tmp_path)

    assert study.stale == 1
    assert study.results == ()
    result = finish(study, spec_of())
    assert SweepStudy(tmp_path).results == (result,)
    assert states(tmp_path) == ["FAIL", "COMPLETE"]


def test_a_result_whose_end_was_not_entered_is_not_trained_again(tmp_path, monkeypatch):
    study = SweepStudy(tmp_path)
    attempt, result = study.start(spec_of()), Law().train(spec_of())
    monkeypatch.setattr(study, "_end", lambda *_: None)
    study.finish(attempt, result)

    again = SweepStudy(tmp_path)

    assert (again.results, again.stale) == ((result,), 0)
    assert states(tmp_path) == ["COMPLETE"]


def test_an_attempt_that_was_entered_and_not_begun_is_made_once(tmp_path):
    study = SweepStudy(tmp_path)
    study._study.enqueue_trial({"batch_size": 64, "lr": 0.1, "seed": 0, "most_samples": 200_000, "attempt": 0})

    again = SweepStudy(tmp_path)
    finish(again, spec_of(seed=1))
    finish(again, spec_of(seed=0))

    assert {result.spec.seed for result in SweepStudy(tmp_path).results} == {0, 1}
    assert states(tmp_path) == ["FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_half_written_line_is_dropped(tmp_path, cut):
    study = SweepStudy(tmp_path)
    first = finish(study, spec_of(0))
    whole = (tmp_path / JOURNAL_FILE).read_bytes()
    finish(study, spec_of(1))
    content = (tmp_path / JOURNAL_FILE).read_bytes()
    (tmp_path / JOURNAL_FILE).write_bytes(content[: len(whole) + cut])

    again = SweepStudy(tmp_path)
    second = finish(again, spec_of(1))

    assert set(SweepStudy(tmp_path).results) == {first, second}
    assert all(json.loads(line) for line in (tmp_path / JOURNAL_FILE).read_text().splitlines())


def test_the_journal_may_be_cut_anywhere(tmp_path):
    study = SweepStudy(tmp_path)
    specs = [spec_of(seed) for seed in range(2)]
    for spec in specs:
        finish(study, spec)
    lines = (tmp_path / JOURNAL_FILE).read_bytes().splitlines(keepends=True)

    for count in range(len(lines)):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / JOURNAL_FILE).write_bytes(b"".join(lines[:count]))
        again = SweepStudy(folder)
        missing = [spec for spec in specs if spec not in {result.spec for result in again.results}]
        for spec in missing:
            finish(again, spec)
        found = SweepStudy(folder).results
        assert sorted(result.spec.seed for result in found) == [0, 1]


def test_how_often_a_process_was_killed_is_remembered(tmp_path):
    study = SweepStudy(tmp_path)
    study.lose(study.start(spec_of()), KILLED)
    study.start(spec_of())

    assert SweepStudy(tmp_path).kills_of(spec_of()) == 1


def test_statuses_are_states_that_a_dashboard_knows(tmp_path):
    study = SweepStudy(tmp_path)
    for seed, status in enumerate((TrialStatus.ABORTED, TrialStatus.DIVERGED, TrialStatus.FAILED)):
        result = TrialResult(spec=spec_of(seed), status=status, steps=1, samples=1, training_s=0.1)
        study.finish(study.start(spec_of(seed)), result)

    assert states(tmp_path) == ["PRUNED", "PRUNED", "FAIL"]
    assert len(SweepStudy(tmp_path).results) == 3


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, monkeypatch):
    study = SweepStudy(tmp_path)
    kept = finish(study, spec_of(0))
    attempt = study.start(spec_of(1))

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match=r"journal\.log: No space left on device"):
            study.finish(attempt, Law().train(spec_of(1)))

    again = SweepStudy(tmp_path)
    assert kept in again.results
    if spec_of(1) not in {result.spec for result in again.results}:
        finish(again, spec_of(1))
    assert len(SweepStudy(tmp_path).results) == 2


def test_what_is_no_journal_is_refused(tmp_path):
    (tmp_path / JOURNAL_FILE).write_text("{}\n{}\n")

    with pytest.raises(RunFolderError, match="is not the journal of a sweep"):
        SweepStudy(tmp_path)


def test_optuna_writes_nothing_to_the_terminal(tmp_path, capfd):
    finish(SweepStudy(tmp_path), spec_of())

    assert capfd.readouterr().err == ""
