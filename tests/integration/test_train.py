"""``rightbatch train`` as a user runs it: kills, signals, ranks, and everything that can be wrong."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import findings_samples
import kill_resume
from integration.conftest import Ended, read_until
from rightbatch.records.run import RunFolder

Run = Callable[..., Ended]
Start = Callable[..., "subprocess.Popen[str]"]

WORKLOAD = '''

def accuracy(scores, labels):
    return (scores.argmax(1) == labels).float().mean().item()


def trained(workers: int = 0, size: int = 600):
    """With validation samples and a metric."""
    return made(size, valid=data(100), metric=accuracy, num_workers=workers)


def double():
    """In float64, for comparisons."""
    return made(200, precision="fp64", valid=data(50), metric=accuracy)


def without_size():
    return made(lr_batch_size=None)


def broken():
    def loss(output, target):
        raise RuntimeError("no loss today")

    return made(loss=loss)
'''


@pytest.fixture
def training(project: Path) -> Path:
    with (project / "train.py").open("a") as file:
        file.write(WORKLOAD)
    return project


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(max(folder.glob("checkpoint-*.pt")), weights_only=True)["state"]["model"]


QUICK = ("--epochs", "1", "--threads", "1", "--quiet")


def test_training_prints_the_answer_and_keeps_everything(here: Run, training: Path) -> None:
    ended = here("train", "train.py:trained", *QUICK, "--out", "run")

    assert ended.code == 0
    assert ended.out.startswith("trained on 600 samples, ")
    assert {file.name for file in Path("run").iterdir()} >= {"training.json", "log.jsonl", "report.html"}
    assert here("report", "run", "-o", "again.html").code == 0
    assert here("show", "run").out.splitlines()[0] == ended.out.splitlines()[0]


def test_the_json_document_is_the_result(here: Run, training: Path) -> None:
    document = json.loads(here("train", "train.py:trained", *QUICK, "--out", "run", "--json").out)

    assert (document["state"], document["samples"], document["plan"]["global_batch_size"]) == ("finished", 600, 64)
    assert json.loads(here("show", "run", "--json").out) == document


def test_progress_says_what_is_asked_of_it(here: Run, training: Path) -> None:
    told = here("train", "train.py:trained", "--epochs", "3", "--plan", "8", "--noise-every", "1", "--target", "accuracy>=2").err

    assert "plan: batch 8, from the command line" in told
    assert re.search(
        r"training: \d+/1800 samples · batch 8 · lr 0.1 · loss \S+ · accuracy 0.\d+ · \S+ samples/s · noise \S+ \(\d+ % of the samples\)",
        told,
    )
    assert re.search(r"evaluation: accuracy 0.\d+, loss 0.\d+ \(33 % of the samples\)", told)


def test_the_plan_of_a_run_is_trained_with_its_rate_and_compared(here: Run, training: Path) -> None:
    RunFolder.create(Path("found")).write_findings(findings_samples.good())
    manifest_of(Path("found"))

    document = json.loads(here("train", "train.py:trained", *QUICK, "--plan", "found", "--out", "run", "--json").out)

    assert document["plan"]["global_batch_size"] == 512
    assert document["plan"]["micro_batch_size"] == 128
    assert document["plan_source"] == "the findings in found"
    assert document["predicted_s"] > 0
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert {line["lr"] for line in log if line["kind"] == "step"} == {0.2}


def test_findings_that_are_no_clear_answer_are_trained_with_and_said(here: Run, training: Path) -> None:
    RunFolder.create(Path("found")).write_findings(findings_samples.unstable())
    manifest_of(Path("found"))

    told = here("train", "train.py:trained", "--epochs", "1", "--plan", "found", "--out", "run").err

    assert "these findings are unstable; rightbatch show says why, and what to do" in told
    assert "the training set holds" not in told


def test_a_batch_larger_than_the_training_set_is_said(here: Run, training: Path) -> None:
    ended = here("train", "train.py:trained", "--epochs", "1", "--plan", "4000", "--out", "run")

    assert ended.code == 0
    assert "the training set holds 600 samples, so no step takes more than these" in ended.err
    assert "1 step of " in ended.out


def manifest_of(folder: Path) -> None:
    """Make a folder a run's: a manifest as ``find`` writes one."""
    from rightbatch.records.run import RunManifest

    findings = findings_samples.good()
    RunFolder(folder).write_manifest(
        RunManifest(
            rightbatch_version="0.1.0",
            created_at=findings.measured_at,
            updated_at=findings.measured_at,
            command=(),
            workload_spec="train.py:trained",
            workload_arguments=(),
            environment=findings.environment,
            code_files=(),
            state="complete",
        )
    )


def test_a_dynamic_batch_is_forecast_first_and_not_used_where_it_is_not_worth_it(here: Run, training: Path) -> None:
    RunFolder.create(Path("found")).write_findings(findings_samples.good())
    manifest_of(Path("found"))

    ended = here("train", "train.py:trained", "--epochs", "1", "--plan", "found", "--out", "run", "--dynamic")

    assert ended.code == 0
    forecast = ended.err.index("A dynamic batch: ")
    assert forecast < ended.err.index("training: ")
    assert "Training keeps the plan's size." in ended.err or "Training follows noise:" in ended.err


def test_a_training_goes_on_as_it_began_although_its_run_was_measured_again(here: Run, training: Path) -> None:
    RunFolder.create(Path("found")).write_findings(findings_samples.good())
    manifest_of(Path("found"))
    words = ("train", "train.py:trained", "--threads", "1", "--quiet", "--plan", "found", "--schedule", "geometric", "--out", "run")
    assert here(*words, "--epochs", "1").code == 0
    RunFolder(Path("found")).write_findings(findings_samples.unstable())

    resumed = here(*words, "--epochs", "2", "--resume", "--json")

    assert (resumed.code, json.loads(resumed.out)["samples"]) == (0, 1200)
    assert json.loads(resumed.out)["plan"]["global_batch_size"] == 512
    refused = here(*words[:-4], "--schedule", "64", "--out", "run", "--epochs", "3", "--resume")
    assert (refused.code, "a training goes on as it began, this one with geometric; got 64" in refused.err) == (2, True)


def test_a_schedule_changes_the_size_and_the_rate_with_it(here: Run, training: Path) -> None:
    assert here("train", "train.py:trained", *QUICK, "--schedule", "milestones:0=64,300=16", "--out", "run").code == 0

    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "event" and line["event"] == "batch size" and line["detail"] == "64 to 16" for line in log)
    last = [line for line in log if line["kind"] == "step"][-1]
    assert (last["global_batch_size"], last["lr"]) == (16, pytest.approx(0.025))


FAILURES = {
    "no end": (("train.py:trained",), 2, "got neither --epochs nor --samples"),
    "two ends": (("train.py:trained", "--epochs", "1", "--samples", "5"), 2, "drop one"),
    "no size": (("train.py:without_size", "--epochs", "1"), 2, "or give a size: --plan 128"),
    "size 0": (("train.py:trained", "--epochs", "1", "--plan", "0"), 2, "must be at least 1; got 0"),
    "no run": (("train.py:trained", "--epochs", "1", "--plan", "nowhere"), 2, "there is no run folder nowhere"),
    "target": (("train.py:trained", "--epochs", "1", "--target", "accuracy=1"), 2, "write it like 'accuracy>=0.97', in quotes"),
    "target without a metric": (("train.py:workload", "--epochs", "1", "--target", "accuracy>=1"), 2, "a target needs validation samples"),
    "schedule": (("train.py:trained", "--epochs", "1", "--schedule", "sinus:1"), 2, "a batch schedule is 64, milestones:"),
    "schedule and dynamic": (("train.py:trained", "--epochs", "1", "--schedule", "8", "--dynamic"), 2, "drop one"),
    "dynamic without findings": (("train.py:trained", "--epochs", "1", "--dynamic"), 2, "is proposed from the findings of a run"),
    "resume and fresh": (
        ("train.py:trained", "--epochs", "1", "--resume", "--fresh"),
        2,
        "either goes on (resume) or starts again (fresh)",
    ),
    "user's code": (("train.py:broken", "--epochs", "1"), 3, "RuntimeError: no loss today"),
    "no such device": (("train.py:trained", "--epochs", "1", "--device", "abacus"), 2, "the device must be usable here"),
    "target missed": (("train.py:trained", "--epochs", "1", "--target", "accuracy>=1.1"), 5, ""),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_has_its_code_and_says_what_to_do(here: Run, training: Path, name: str) -> None:
    words, code, message = FAILURES[name]

    ended = here("train", *words, "--threads", "1", "--quiet")

    assert (ended.code, message in ended.err) == (code, True), ended.err
    assert "rightbatch/" not in ended.err.replace("rightbatch/cli", "") or code != 3, "only the user's frames are shown"


def test_a_run_without_a_plan_is_refused(here: Run, training: Path) -> None:
    RunFolder.create(Path("found")).write_findings(findings_samples.nothing_fits())
    manifest_of(Path("found"))

    ended = here("train", "train.py:trained", *QUICK, "--plan", "found")

    assert (ended.code, "found recommends no plan; run `rightbatch find` in it to its end" in ended.err) == (5, True)


def test_a_finished_training_says_so_and_prints_its_answer_again(here: Run, training: Path) -> None:
    words = ("train", "train.py:trained", *QUICK, "--out", "run")
    first = here(*words)

    again = here(*words, "--resume")

    assert (again.code, again.out.splitlines()[:3]) == (0, first.out.splitlines()[:3])
    assert "this training is finished: finished; more --epochs go on from here, --fresh starts again." in again.err


def test_resume_needs_no_other_option(here: Run, training: Path) -> None:
    options = ("--plan", "32", "--schedule", "geometric:8..64@600", "--seed", "7", "--evaluate-every", "300", "--precision", "fp64")
    assert here("train", "train.py:trained", *QUICK, *options, "--out", "run").code == 0

    again = here("train", "train.py:trained", "--resume", "--out", "run", "--threads", "1", "--quiet")

    assert again.code == 0
    assert "this training is finished" in again.err


def test_sigterm_saves_and_the_command_that_is_said_goes_on(start: Start, here: Run, training: Path) -> None:
    words = ("train", "train.py:trained", "--epochs", "100000", "--plan", "8", "--threads", "1", "--out", "cut")
    endless = start(*words)
    read_until(endless, "training: ")

    endless.send_signal(signal.SIGTERM)
    said = endless.stderr.read()

    assert endless.wait(60) == 130
    assert f"Continue with: rightbatch {' '.join(words)} --resume" in said
    samples = int(re.search(r"interrupted after (\d+) samples; everything is saved", said)[1])
    resumed = here("train", "train.py:trained", "--samples", str(samples + 400), *words[4:], "--resume", "--quiet", "--json")
    assert (resumed.code, json.loads(resumed.out)["samples"], json.loads(resumed.out)["resumes"]) == (0, samples + 400, 1)


def test_a_signal_that_reaches_the_workers_too_saves(start: Start, training: Path) -> None:
    words = ("--epochs", "100000", "--plan", "8", "--threads", "1", "--out", "cut", "--", "--workers", "2")
    endless = start("train", "train.py:trained", *words)
    read_until(endless, "training: ")

    os.killpg(endless.pid, signal.SIGTERM)
    said = endless.stderr.read()

    assert endless.wait(60) == 130
    assert "everything is saved" in said


def test_kills_at_random_moments_cost_nothing(tmp_path: Path) -> None:
    tally = kill_resume.Tally()
    words = kill_resume.CASES["by the noise, 2 workers"]
    spec = f"{kill_resume.HERE}:workload"
    torch.optim.AdamW([torch.zeros(1)])
    wanted, duration_s = kill_resume.reference(spec, words, tmp_path / "whole" / "run")

    draw = random.Random(3)  # noqa: S311
    while tally.kills < 3:
        kill_resume.killed_until_done(spec, words, tmp_path / f"after {tally.kills}" / "run", wanted, duration_s / 2, draw, tally, 3)

    assert (tally.kills, tally.failed) == (3, 0)
    assert all(tally.same)
    assert all(tally.log_is_whole)


def test_that_check_can_fail() -> None:
    weight = {"model": {"weight": torch.zeros(2)}}

    assert kill_resume.is_same(weight, {"model": {"weight": torch.zeros(2)}})
    assert not kill_resume.is_same(weight, {"model": {"weight": torch.tensor([0.0, 1e-30])}})


def torchrun(training: Path, *words: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rightbatch", *words]
    subprocess.run(launcher, cwd=training, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)


def test_two_ranks_train_as_one_process_does(here: Run, training: Path) -> None:
    words = ("train", "train.py:double", "--plan", "16", "--threads", "1", "--quiet", "--device", "cpu", "--noise-every", "2")
    schedule = ("--schedule", "geometric:8..32@400")
    assert here(*words, "--epochs", "2", *schedule, "--out", "one").code == 0

    torchrun(training, *words, "--epochs", "1", *schedule, "--out", "two")
    torchrun(training, *words, "--epochs", "2", *schedule, "--out", "two", "--resume")

    one, two = last_weights(training / "one"), last_weights(training / "two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-10, atol=1e-12) for name in one)
    logs = [[json.loads(line) for line in (training / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    evaluations = [[line for line in log if line["kind"] == "evaluation"] for log in logs]
    assert [line["samples"] for line in evaluations[0]] == [line["samples"] for line in evaluations[1]] == [200, 400]
    for first, second in zip(*evaluations, strict=True):
        assert (second["loss"], second["metric"]) == (pytest.approx(first["loss"], rel=1e-9), pytest.approx(first["metric"], abs=0.02))
