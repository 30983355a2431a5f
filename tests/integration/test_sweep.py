"""Sweeps as users run them: processes that end, drivers that are killed, and every failure with its message and exit code."""

import argparse
import csv
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest

import sweep_kills
from integration.conftest import TRAIN, read_until, started
from rightbatch.cli import main
from rightbatch.errors import IsolationError, UserCodeError, WorkerKilledError
from rightbatch.sweeps.executors import open_executor
from rightbatch.sweeps.executors.local import LocalExecutor, visible_gpus

cloudpickle.register_pickle_by_value(sys.modules[__name__])

METRIC = '''

def accuracy(scores, labels):
    return (scores.argmax(dim=1) == labels).float().mean().item()


def judged(**ingredients):
    """Two layers on noise, with what a sweep needs."""
    return made(**dict(valid=data(200), metric=accuracy) | ingredients)


def swept():
    return judged()


def raising():
    def raises(scores, labels):
        raise ValueError("no such label")

    return judged(metric=raises)


def unjudged():
    return made()


def eating():
    import os, signal

    def kills(scores, labels):
        os.kill(os.getpid(), signal.SIGKILL)

    return judged(metric=kills)
'''
WORDS = ("--target", "accuracy>=0.8", "--batches", "30,60", "--seeds", "2", "--out", "swept", "--device", "cpu")


@pytest.fixture
def judged(project):
    (project / "train.py").write_text(TRAIN + METRIC)
    return project


@pytest.fixture(scope="module")
def executor():
    opened = LocalExecutor([{}, {"RIGHTBATCH_TEST_SLOT": "second"}])
    yield opened
    opened.close()


def process_id(_):
    return os.getpid()


def test_every_function_runs_in_a_fresh_process(executor):
    numbers = {executor.submit(process_id, None).result() for _ in range(4)}

    assert len(numbers) == 4
    assert os.getpid() not in numbers


def test_slots_have_variables_of_their_own(executor):
    def wait_for_other(path):
        Path(path, str(os.getpid())).touch()
        while len(list(Path(path).iterdir())) < 2:
            time.sleep(0.01)
        return os.environ.get("RIGHTBATCH_TEST_SLOT")

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        seen = [future.result() for future in [executor.submit(wait_for_other, folder) for _ in range(2)]]
    assert sorted(seen, key=str) == [None, "second"]


def test_what_the_function_raises_is_raised_with_the_users_frames(executor):
    def fails(_):
        raise ValueError("no")

    with pytest.raises(UserCodeError, match="ValueError: no") as caught:
        executor.submit(fails, None).result()
    assert "in fails" in caught.value.user_traceback


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [(signal.SIGKILL, WorkerKilledError, "SIGKILL"), (signal.SIGSEGV, UserCodeError, "must not crash; it ended .* SIGSEGV")],
)
def test_a_process_that_is_killed_is_told_from_one_that_crashes(executor, number, kind, words):
    with pytest.raises(kind, match=words):
        executor.submit(lambda number: os.kill(os.getpid(), number), number).result()


def test_a_process_that_ends_without_an_answer_is_an_error(executor):
    with pytest.raises(IsolationError, match="exited with status 3"):
        executor.submit(os._exit, 3).result()


def test_a_template_that_was_killed_is_started_again(executor):
    executor._template._process.kill()
    executor._template._process.wait()

    assert executor.submit(process_id, None).result() != os.getpid()


def test_templates_import_what_the_first_process_imported_and_none_of_the_users_code(tmp_path, monkeypatch):
    (tmp_path / "users_own.py").write_text("import sklearn.datasets\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def modules(_):
        before = set(sys.modules)
        __import__("users_own")
        return {name for name in ("sklearn.datasets", "users_own", "torch") if name in before}

    opened = LocalExecutor([{}])
    try:
        first, second = (opened.submit(modules, None).result() for _ in range(2))
    finally:
        opened.close()
    assert first == {"torch"}
    assert second == {"torch", "sklearn.datasets"}


def test_closing_ends_what_still_runs_with_all_that_it_started():
    opened = LocalExecutor([{}])

    def sleeps(path):
        import subprocess

        child = subprocess.Popen(["sleep", "600"])
        Path(path).write_text(f"{os.getpid()} {child.pid}")
        child.wait()

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers"
        future = opened.submit(sleeps, str(file))
        while not file.exists() or not file.read_text():
            time.sleep(0.01)
        numbers = [int(word) for word in file.read_text().split()]
        closing = threading.Thread(target=opened.close)
        closing.start()
        with pytest.raises(WorkerKilledError):
            future.result(timeout=30)
        closing.join()
    _, alive = psutil.wait_procs([psutil.Process(number) for number in numbers if psutil.pid_exists(number)], timeout=20)
    assert alive == []


def test_gpus_are_those_that_the_variable_shows():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ("2", "3")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()


def test_on_a_processor_a_few_trials_share_the_cores():
    opened = open_executor("local", jobs=None, device="cpu")
    try:
        cores = len(os.sched_getaffinity(0))
        assert opened.slots == min(cores, 4)
        assert opened.threads == max(1, cores // opened.slots)
    finally:
        opened.close()


def test_a_driver_that_is_killed_again_and_again_loses_and_repeats_nothing():
    options = argparse.Namespace(kills=3, wait=0.05, lines=5, jobs=2, sizes=3, seeds=1, seed=1, json=True)

    goals, environment = sweep_kills.benchmark(options)

    assert [goal["name"] for goal in goals if not goal["holds"]] == [], environment


def test_a_sweep_from_the_command_line_ends_with_an_answer_and_is_not_trained_again(judged, here):
    ended = here("sweep", "train.py:swept", *WORDS, "--json")

    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert [point["status"] for point in result["points"]] == ["tuned", "tuned"]
    assert "2 sizes from 30 to 60, 2 seeds" in ended.err
    rows = list(csv.DictReader((judged / "swept" / "tidy.csv").read_text().splitlines()))
    assert {row["batch_size"] for row in rows} == {"30", "60"}
    assert "Time to the target" in (judged / "swept" / "report.html").read_text()

    again = here("sweep", "train.py:swept", *WORDS, "--json")
    assert json.loads(again.out) == result
    assert "samples to the target" not in again.err
    assert json.loads(here("show", "swept", "--json").out) == result
    assert here("show", "swept").out.startswith("batch ")
    assert here("report", "swept", "-o", "page.html").code == 0
    assert here("show", "swept", "--goal", "time").code == 2


def test_a_target_that_no_size_reaches_ends_inconclusive(judged, here):
    ended = here(
        "sweep", "train.py:swept", "--target", "accuracy>=0.9999", "--batches", "60", "--max-samples", "600", "--seeds", "1", "--quiet"
    )

    assert ended.code == 5
    assert ended.out.startswith("no size reached accuracy >= 0.9999")


@pytest.mark.parametrize(
    ("workload", "code", "words"),
    [
        ("raising", 3, "ValueError: no such label"),
        ("unjudged", 2, "needs validation samples"),
        ("missing", 2, "has no 'missing'"),
    ],
)
def test_faults_of_the_workload_are_the_users(judged, here, workload, code, words):
    ended = here("sweep", f"train.py:{workload}", *WORDS, "--quiet")

    assert ended.code == code
    assert words in ended.messages[-1]
    assert (judged / "swept").exists() == (workload == "raising")


def test_trials_whose_processes_are_killed_fail_and_the_sweep_says_so(judged, here):
    ended = here("sweep", "train.py:eating", *WORDS)

    assert ended.code == 5
    assert "it is run once more" in ended.err
    assert "(SIGKILL); the kernel does that when memory runs out, twice" in ended.out.replace("\n  ", " ").replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "sweep needs a target"),
        (("--target", "accuracy<=0.9"), 2, "a target is loss<=VALUE"),
        (("--target", "accuracy>=0.9", "--batches", "8.."), 2, "written like 8..512"),
        (("--target", "accuracy>=0.9", "--on", "moon"), 2, "--on must be local"),
        (("--target", "accuracy>=0.9", "--plan", "nowhere"), 2, "there is no run folder nowhere"),
    ],
)
def test_requests_that_cannot_be_carried_out_say_why(judged, here, words, code, message):
    ended = here("sweep", "train.py:swept", *words)

    assert ended.code == code
    assert message in ended.messages[-1]
    assert not (judged / "rightbatch-runs").exists()


def test_a_cluster_that_cannot_be_reached_has_an_exit_code_of_its_own(judged, here):
    ended = here("sweep", "train.py:swept", "--target", "accuracy>=0.9", "--on", "ray:127.0.0.1:1")

    assert ended.code == 6
    assert "use --on local" in ended.messages[-1]


def test_an_interruption_keeps_what_ended_and_says_how_to_go_on(judged):
    with started("sweep", "train.py:swept", *WORDS, cwd=judged) as process:
        read_until(process, "batch ")
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Continue with: rightbatch sweep train.py:swept --target 'accuracy>=0.8'" in rest
    assert json.loads((judged / "swept" / "sweep.json").read_text())["state"] == "interrupted"


def test_sweep_from_python_takes_a_workload_and_leaves_nothing_behind(judged, monkeypatch):
    import rightbatch as rb

    monkeypatch.syspath_prepend(str(judged))
    import train

    result = rb.sweep(train.swept(), "accuracy>=0.8", batches=(60,), seeds=1, device="cpu")

    assert result.status == "ok"
    assert len(result.all_trials) == sum(count for _, count in result.trials)
    assert str(result).startswith("batch ")
    assert result.write_report(judged / "page.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in judged.iterdir() if path.name != "__pycache__") == ["page.html", "train.py"]


def test_help_of_the_sweep_does_not_import_torch(capsys):
    assert main(["sweep", "--help"]) == 0
    assert "--batches" in capsys.readouterr().out
