"""The driver on trials that follow a planted law, run in threads of this process."""

import dataclasses
import errno
import os
import signal
import threading
from concurrent.futures import Future

import pytest

import findings_samples
from planted_sweeps import TARGET, Law, settings_of, summary
from planted_sweeps import sweep as planted
from rightbatch.errors import (
    InterruptedRunError,
    RunFolderBusyError,
    RunFolderError,
    UsageError,
    UserCodeError,
    WorkerKilledError,
)
from rightbatch.records.run import RunFolder, RunManifest
from rightbatch.records.sweep import TrialStatus
from rightbatch.records.sweep_folder import SweepFolder
from rightbatch.sweeps.driver import Work, sweep
from rightbatch.sweeps.request import SweepRequest
from rightbatch.sweeps.study import SweepStudy
from sweep_noop import Nothing, describe

SIZES = (32, 64, 128)


def whole_sweep():
    """Trials of a sweep that nothing disturbs."""
    return {trial.spec for trial in planted(Law(), settings_of(sizes=SIZES))}


class Inline:
    """Runs each function when it is submitted."""

    threads = 1

    def __init__(self, slots=2, device=None):
        self.slots, self.device = slots, device
        self.closed = False

    def submit(self, function, params):
        future = Future()
        try:
            future.set_result(function(params))
        except BaseException as error:  # noqa: BLE001  # interruptions too
            future.set_exception(error)
        return future

    def close(self):
        self.closed = True


class Heard:
    def __init__(self):
        self.stages = []

    def update(self, stage):
        self.stages.append(stage)

    @property
    def news(self):
        return [stage.news for stage in self.stages if stage.news]


def run_law(task):
    return Law().train(task.spec)


def request_of(tmp_path, **changes):
    return SweepRequest(**{"target": TARGET, "sizes": SIZES, "out": tmp_path / "sweep", "device": "cpu"} | changes)


def drive(tmp_path, *, run=run_law, progress=None, executor=None, source=None, clock_s=None, describe=describe, **changes):
    options = {} if clock_s is None else {"clock_s": clock_s}
    return sweep(
        source or Nothing(),
        request_of(tmp_path, **changes),
        progress or Heard(),
        command=("rightbatch", "sweep", "planted.py:law"),
        open_executor=lambda: executor or Inline(),
        work=Work(describe=describe, run_trial=run),
        **options,
    )


def test_a_sweep_runs_what_the_design_asks_for_and_keeps_everything(tmp_path):
    found = drive(tmp_path)

    assert {trial.spec for trial in found.trials} == whole_sweep()
    assert found.result.status == "ok"
    assert {path.name for path in found.folder.iterdir()} >= {"sweep.json", "result.json", "tidy.csv", "journal.log"}
    assert SweepFolder.open(found.folder).read_result() == found.result


def test_the_expected_cost_is_said_first(tmp_path):
    heard = Heard()

    drive(tmp_path, progress=heard)

    assert "3 sizes from 32 to 128, 3 seeds: about 20 trials, 2 at once" in heard.news[0]
    assert heard.stages[-1].ended == len([line for line in heard.news if "samples" in line]) - 1


def run_of(tmp_path, findings, **place):
    """The folder of a run of ``find``, as far as a sweep reads it."""
    environment = findings.environment.model_copy(update={"device_name": "planted", "precision": summary().precision, **place})
    folder = RunFolder.create(tmp_path / "run")
    folder.write_findings(findings.model_copy(update={"environment": environment}))
    folder.write_manifest(
        RunManifest(rightbatch_version="0", created_at="2026-01-01T00:00:00+00:00", updated_at="2026-01-01T00:00:00+00:00", command=(),
                    workload_spec="planted.py:law", workload_arguments=(), environment=environment, code_files=(), state="complete")
    )  # fmt: skip
    return folder.path


@pytest.mark.parametrize(("findings", "source"), [(findings_samples.good, "alone"), (findings_samples.unstable, "alone, unsteady")])
def test_step_times_that_find_does_not_trust_are_not_trusted_here(tmp_path, findings, source):
    heard = Heard()

    found = drive(tmp_path, progress=heard, plan=run_of(tmp_path, findings()))

    assert found.result.time_source == source
    assert any("step times of the earlier find are unstable" in line for line in heard.news) is (source != "alone")


@pytest.mark.parametrize("place", [{"device_name": "another"}, {"precision": "bf16"}])
def test_step_times_of_another_device_or_precision_are_not_taken(tmp_path, place):
    heard = Heard()

    found = drive(tmp_path, progress=heard, plan=run_of(tmp_path, findings_samples.unstable(), **place))

    assert found.result.time_source == "side by side"
    assert not any("unstable" in line for line in heard.news)


@pytest.mark.parametrize(("own", "told"), [("cuda", "cuda"), (None, "cuda:1")])
def test_a_trial_is_told_its_device_as_its_own_process_names_it(tmp_path, own, told):
    devices = set()

    def noted(work):
        return lambda task: devices.add(task.setting.device) or work(task)

    drive(tmp_path, run=noted(run_law), describe=noted(describe), executor=Inline(device=own), device="cuda:1")

    assert devices == {told}


def test_a_sweep_that_is_complete_trains_nothing_again(tmp_path):
    first = drive(tmp_path)

    def refuse(_task):
        raise AssertionError("nothing is left to train")

    assert drive(tmp_path, run=refuse).result == first.result


@pytest.mark.parametrize("after", [0, 1, 12])
def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, after):
    count = iter(range(1000))

    def interrupted(task):
        if next(count) == after:
            raise KeyboardInterrupt
        return run_law(task)

    with pytest.raises(InterruptedRunError) as caught:
        drive(tmp_path, run=interrupted)
    assert caught.value.resume_command == "rightbatch sweep planted.py:law"

    before = len(SweepStudy(tmp_path / "sweep").results)
    trained = []
    found = drive(tmp_path, run=lambda task: trained.append(task.spec) or run_law(task))
    assert {trial.spec for trial in found.trials} == whole_sweep()
    assert len(trained) == len(set(trained)) == len(found.trials) - before


def test_sigterm_ends_a_sweep_as_an_interruption(tmp_path):
    def terminated(task):
        os.kill(os.getpid(), signal.SIGTERM)
        return run_law(task)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRunError, match="every trial that had ended is kept"):
        drive(tmp_path, run=terminated)
    assert signal.getsignal(signal.SIGTERM) is before
    assert SweepFolder.open(tmp_path / "sweep").read_manifest().state == "interrupted"


def test_what_the_users_code_raises_ends_the_sweep_and_keeps_its_trials(tmp_path):
    def raising(task):
        if task.spec.global_batch_size == 128:
            raise UserCodeError("the workload's code raised ValueError: no", "Traceback")
        return run_law(task)

    with pytest.raises(UserCodeError):
        drive(tmp_path, run=raising)

    found = drive(tmp_path)
    assert {trial.spec for trial in found.trials} == whole_sweep()


def test_a_trial_whose_process_is_killed_is_run_once_more(tmp_path):
    killed = set()
    heard = Heard()

    def kill_first(task):
        if task.spec not in killed:
            killed.add(task.spec)
            raise WorkerKilledError("its process was killed (SIGKILL)")
        return run_law(task)

    found = drive(tmp_path, run=kill_first, progress=heard, sizes=(32, 64))

    assert all(trial.status is not TrialStatus.FAILED for trial in found.trials)
    assert sum("it is run once more" in line for line in heard.news) == len(found.trials)


def test_a_trial_whose_process_is_killed_twice_has_failed_and_that_is_said(tmp_path):
    heard = Heard()

    def kill_large(task):
        if task.spec.global_batch_size >= 128:
            raise WorkerKilledError("its process was killed (SIGKILL)")
        return run_law(task)

    found = drive(tmp_path, run=kill_large, progress=heard)

    failed = [trial for trial in found.trials if trial.status is TrialStatus.FAILED]
    assert {trial.spec.global_batch_size for trial in failed} == {128}
    assert any("failed: its process was killed (SIGKILL), twice" in line for line in heard.news)
    assert any("Failed at size 128" in remark for remark in found.result.remarks)
    assert next(point for point in found.result.points if point.global_batch_size == 128).status == "never"


def test_two_drivers_do_not_share_a_folder(tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def slow(task):
        entered.set()
        leave.wait(10)
        return run_law(task)

    thread = threading.Thread(target=lambda: drive(tmp_path, run=slow))
    thread.start()
    entered.wait(10)
    with pytest.raises(RunFolderBusyError, match="another process is using"):
        drive(tmp_path)
    leave.set()
    thread.join()


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    drive(tmp_path, sizes=(32, 64))

    with pytest.raises(UsageError, match="holds another sweep"):
        drive(tmp_path, sizes=(16, 32))
    assert [point.global_batch_size for point in drive(tmp_path, sizes=(16, 32), fresh=True).result.points] == [16, 32]


def test_trials_of_code_that_has_changed_are_not_mixed_with_new_ones(tmp_path):
    class Changing(Nothing):
        def code_is_unchanged(self, files):
            return False

    def described(task):
        return dataclasses.replace(describe(task), code_files=(("train.py", "0" * 64),))

    drive(tmp_path, sizes=(32, 64), describe=described)

    with pytest.raises(UsageError, match="code has changed"):
        drive(tmp_path, source=Changing(), sizes=(32, 64), describe=described)


def test_the_budget_ends_a_sweep_that_can_be_gone_on_with(tmp_path):
    clock = iter(range(100_000))

    found = drive(tmp_path, budget_s=40, clock_s=lambda: float(next(clock)))
    assert found.ended_by_budget
    assert found.result.status == "partial"

    assert drive(tmp_path).result.status == "ok"


def test_a_target_that_no_size_reaches_is_a_result(tmp_path):
    found = drive(tmp_path, run=lambda task: Law(largest=1).train(task.spec), sizes=(32, 64))

    assert found.result.status == "never"
    assert found.result.best_value is not None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "sweep").write_text("a file")

    with pytest.raises(RunFolderError, match="must be a folder"):
        drive(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.tex").write_text("")

    with pytest.raises(RunFolderError, match=r"holds thesis\.tex"):
        drive(tmp_path)


def test_no_folder_is_left_where_the_workload_cannot_be_described(tmp_path):
    def raising(_task):
        raise UserCodeError("raised")

    with pytest.raises(UserCodeError):
        drive(tmp_path, describe=raising)
    assert not (tmp_path / "sweep").exists()


def test_a_full_disk_ends_the_sweep_and_loses_nothing(tmp_path, monkeypatch):
    real = os.fsync
    calls = iter(range(100_000))

    def full(descriptor):
        if next(calls) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match="No space left on device"):
            drive(tmp_path)

    kept = set(SweepStudy(tmp_path / "sweep").results)
    found = drive(tmp_path)
    assert kept
    assert kept <= set(found.trials)
    assert {trial.spec for trial in found.trials} == whole_sweep()


def test_the_executor_is_closed_whatever_happens(tmp_path):
    executor = Inline()

    def raising(_task):
        raise UserCodeError("raised")

    with pytest.raises(UserCodeError):
        drive(tmp_path, run=raising, executor=executor)
    assert executor.closed


def test_with_many_slots_all_sizes_are_climbed_at_once(tmp_path):
    found = drive(tmp_path, executor=Inline(slots=8))

    assert found.result.settings.order == "at once"
    assert summary().lr_batch_size in SIZES
