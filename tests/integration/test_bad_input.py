"""Everything a user can get wrong, through the real command line: the right exit code, one clear message, and no traceback of ours."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.conftest import Ended, read_until
from rightbatch.records.run import RunFolder

QUICK = ("--isolation", "in-process", "--budget", "2s", "--quiet")
OWN_CODE = f"{os.sep}rightbatch{os.sep}"
HONEST = {0, 5}
"""A busy machine makes an answer ``unstable``, which is exit code 5: both are right."""

Run = Callable[..., Ended]
Measured = Callable[[str], Path]


def add(project: Path, code: str) -> None:
    with (project / "train.py").open("a") as file:
        file.write(f"\n\n{code}\n")


def says(ended: Ended, code: int, message: str) -> None:
    """One message of ours that matches, nothing on stdout, and no frame of ours."""
    assert ended.code == code, ended.err
    assert len(ended.messages) == 1, ended.err
    assert re.search(message, ended.messages[0]), ended.messages[0]
    assert OWN_CODE not in ended.err
    assert ended.out == ""


def says_as_json(ended: Ended, code: int, message: str, kind: str) -> None:
    error = json.loads(ended.out)["error"]
    assert (ended.code, error["exit_code"], error["type"]) == (code, code, kind)
    assert re.search(message, error["message"])


WRONG_QUESTIONS = {
    "missing file": (("nothere.py:workload",), 2, r"there is no file nothere\.py", "UsageError"),
    "missing file that is nearly there": (("trein.py:workload",), 2, r"did you mean train\.py\?", "UsageError"),
    "missing function": (("train.py:worklaod",), 2, r"has no 'worklaod'.*did you mean train\.py:workload\?", "UsageError"),
    "no function": (("train.py",), 2, r"did you mean train\.py:workload\?", "UsageError"),
    "not a workload": (("train.py:number",), 2, r"must be a Workload or a function that returns one; got .*int", "WorkloadError"),
    "function that returns no workload": (("train.py:nothing",), 2, r"must return a rightbatch\.Workload", "WorkloadError"),
    "wrong argument of the function": (("train.py:workload", "--", "--width", "wide"), 2, r"--width.*-- --help", "UsageError"),
    "unknown argument of the function": (("train.py:workload", "--", "--depth", "3"), 2, r"--depth", "UsageError"),
    "unknown option": (("train.py:workload", "--widht", "3"), 2, r"--widht.*after `--`", "UsageError"),
    "size without a unit that exists": (("train.py:workload", "--limit", "3 parsecs"), 2, r"--limit.*24GiB", "UsageError"),
    "batch of nothing": (("train.py:workload", "--max-batch", "0"), 2, r"--max-batch.*>= 1", "UsageError"),
    "device that is not here": (("train.py:workload", "--device", "cuda:77"), 2, r"'cuda:77'.*--device cpu", "UsageError"),
    "empty dataset": (("train.py:empty",), 2, r"at least one sample; got an empty TensorDataset", "WorkloadError"),
    "frozen model": (("train.py:frozen",), 2, r"requires a gradient; the model has none", "WorkloadError"),
    "function that raises": (("train.py:raising",), 3, r"raised FileNotFoundError.*my-data", "UserCodeError"),
    "model that raises": (("train.py:broken",), 3, r"raised RuntimeError.*shapes", "UserCodeError"),
    "energy where it cannot be measured": (("train.py:workload", "--goal", "energy"), 2, r"energy", "UsageError"),
}

WRONG_CODE = """
number = 3


def nothing():
    return {"model": net()}


def empty():
    return made(size=0)


def frozen():
    return made(model=lambda: net().requires_grad_(False))


def raising():
    open("my-data")


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x):
        return self.layer(x) @ torch.zeros(7, 7)


def broken():
    return made(model=lambda: Broken())
"""


@pytest.mark.parametrize("name", WRONG_QUESTIONS)
def test_wrong_question_is_one_message(here: Run, project: Path, name: str) -> None:
    words, code, message, kind = WRONG_QUESTIONS[name]
    add(project, WRONG_CODE)

    place = words.index("--") if "--" in words else len(words)
    says(here("find", *words[:place], *QUICK, *words[place:]), code, message)
    says_as_json(here("find", *words[:place], *QUICK, "--json", *words[place:]), code, message, kind)


def test_failed_question_leaves_no_run_folder(here: Run, project: Path) -> None:
    add(project, WRONG_CODE)

    here("find", "train.py:raising", *QUICK, "--out", "run")

    assert not (project / "run").exists()


def test_error_in_the_users_code_shows_the_users_frames_only(here: Run, project: Path) -> None:
    add(project, WRONG_CODE)

    ended = here("find", "train.py:broken", *QUICK)

    assert "return self.layer(x) @ torch.zeros(7, 7)" in ended.err
    assert OWN_CODE not in ended.err


def test_module_that_raises_on_import_shows_the_users_frames_only(here: Run, project: Path) -> None:
    add(project, "1 / 0")

    ended = here("find", "train.py:workload", *QUICK)

    says(ended, 3, "raised ZeroDivisionError while it was imported")
    assert "1 / 0" in ended.err


@pytest.mark.parametrize("size", [40, 3, 2, 1])
def test_dataset_smaller_than_the_batch_caps_the_answer(here: Run, project: Path, size: int) -> None:
    add(project, f"def small():\n    return made(size={size}, lr_batch_size=512)")

    ended = here("find", "train.py:small", *QUICK, "--json")

    assert ended.code in HONEST
    findings = json.loads(ended.out)
    assert findings["recommendation"]["plan"]["global_batch_size"] <= size
    memory = findings["memory"]
    assert memory["ceiling"] == size or (memory["ceiling"] < size and memory["stopped_by"] == "budget")  # on a busy machine
    assert (memory["largest_allowed"], memory["largest_allowed_source"]) == (size, "dataset")
    if size <= 2:  # of three samples every one is seen, so that nothing is uncertain about their mean gradient
        assert findings["noise_scale"]["value"] is None


@pytest.mark.slow
def test_model_that_does_not_fit_says_what_needs_how_much_and_where(start, project: Path) -> None:
    add(project, "def heavy():\n    return made(model=lambda: net(500_000))")

    process = start("find", "train.py:heavy", "--limit", "10MiB", "--budget", "3s", "--quiet", "--out", "run")
    out, err = process.communicate()

    assert process.returncode == 4, err
    assert re.match(r"nothing fits: one sample needs [\d.]+ MiB, the limit is 10\.0 MiB\n", out)
    assert re.search(r"parameters +21\.0 MiB", out)
    assert re.search(r"[Mm]emory peaks at aten\.\w+", out)
    assert "smaller model" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("loss", "status", "remedy"),
    [
        ("F.cross_entropy(y, t) * float('nan')", "non_finite", "NaN or infinite"),
        ("F.cross_entropy(y, t) * float('inf')", "non_finite", "NaN or infinite"),
        ("(0 * y).mean()", "no_gradient", "gradient"),
    ],
)
def test_loss_without_a_usable_gradient_keeps_memory_and_speed(here: Run, project: Path, loss: str, status: str, remedy: str) -> None:
    add(project, f"def bad():\n    return made(loss=lambda y, t: {loss})")

    ended = here("find", "train.py:bad", *QUICK, "--json")

    assert ended.code == 5, ended.err
    findings = json.loads(ended.out)
    assert findings["noise_scale"]["status"] == status
    assert any(remedy in remark for remark in findings["noise_scale"]["remarks"])
    assert findings["memory"]["ceiling"] >= 8
    assert findings["step_time"]["knee"] is not None
    assert findings["recommendation"]["evidence_level"] == 0


def test_summed_loss_gives_the_noise_of_the_mean_and_is_said(here: Run, project: Path) -> None:
    add(project, "def summed():\n    return made(loss=lambda y, t: F.cross_entropy(y, t, reduction='sum'))")

    summed = json.loads(here("find", "train.py:summed", *QUICK, "--json").out)
    mean = json.loads(here("find", "train.py:workload", *QUICK, "--json").out)

    assert summed["workload"]["loss_reduction"] == "sum"
    assert any("loss is a sum" in advice for advice in summed["recommendation"]["advice"])
    first, other = summed["noise_scale"]["snapshots"][0], mean["noise_scale"]["snapshots"][0]
    if first["micro_batch_size"] == other["micro_batch_size"] and first["micro_batch_count"] == other["micro_batch_count"]:
        assert first["noise_scale"]["value"] == pytest.approx(other["noise_scale"]["value"], rel=1e-3)
    assert first["grad_sq_norm"]["value"] < 4 * other["grad_sq_norm"]["high"]


def test_lone_last_sample_with_batch_normalisation_is_said(here: Run, project: Path) -> None:
    add(
        project,
        "def normalised():\n    return made(size=513, model=lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), net_end()))",
    )
    add(project, "def net_end():\n    return nn.Linear(16, 2)")

    ended = here("find", "train.py:normalised", *QUICK, "--max-batch", "256", "--json")

    assert ended.code in HONEST
    recommendation = json.loads(ended.out)["recommendation"]
    assert 513 % recommendation["plan"]["micro_batch_size"] == 1
    assert any("a last micro-batch of one" in advice for advice in recommendation["advice"])


# The run folder.


def test_out_below_a_file_is_said(here: Run, project: Path) -> None:
    says(here("find", "train.py:workload", *QUICK, "--out", "train.py/run"), 2, r"cannot make train\.py/run: Not a directory.*--out")


def test_out_that_is_a_file_is_said(here: Run, project: Path) -> None:
    says(here("find", "train.py:workload", *QUICK, "--out", "train.py"), 2, r"train\.py is a file; pass another --out")


def test_out_with_files_of_someone_else_is_left_alone(here: Run, project: Path) -> None:
    (project / "thesis").mkdir()
    (project / "thesis" / "chapter1.tex").write_text("precious")

    says(
        here("find", "train.py:workload", *QUICK, "--fresh", "--out", "thesis"),
        2,
        r"must be empty or a run's; thesis holds chapter1\.tex; .*another --out",
    )
    assert [file.name for file in (project / "thesis").iterdir()] == ["chapter1.tex"]


CORRUPT = {
    "truncated": ("memory.json", lambda text: text[: len(text) // 2], r"memory\.json is not a rightbatch record"),
    "foreign": ("memory.json", lambda _: '{"name": "package", "version": "1.0"}', r"memory\.json is not a rightbatch record"),
    "list": ("memory.json", lambda _: "[1, 2]", r"memory\.json is not a rightbatch record: it holds a list"),
    "not a number": ("memory.json", lambda text: re.sub(r'"limit_bytes": \d+', '"limit_bytes": NaN', text), r"NaN is not a number"),
    "newer": ("memory.json", lambda text: text.replace('"schema_version": 1', '"schema_version": 99'), r"version 99; .* update rightbatch"),
    "truncated manifest": ("run.json", lambda text: text[:40], r"run\.json is not a rightbatch record"),
    "foreign manifest": ("run.json", lambda _: '{"schema_version": 1, "written_by": "npm"}', r"run\.json was not written by rightbatch"),
    "newer manifest": ("run.json", lambda text: text.replace('"schema_version": 1', '"schema_version": 99'), r"version 99"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_run_folder_is_refused_by_its_file(here: Run, measured: Measured, name: str) -> None:
    file, corrupt, message = CORRUPT[name]
    path = measured("memory") / "run" / file
    path.write_text(corrupt(path.read_text()))
    before = path.read_text()

    for words in (("show", "run"), ("report", "run"), ("find", "train.py:workload", *QUICK, "--out", "run")):
        says(here(*words), 2, message)
        says_as_json(here(*words, "--json"), 2, message, json.loads(here(*words, "--json").out)["error"]["type"])
    assert path.read_text() == before


@pytest.mark.parametrize("name", ["truncated", "not a number", "truncated manifest"])
def test_corrupt_run_folder_can_be_measured_afresh(here: Run, measured: Measured, name: str) -> None:
    file, corrupt, _ = CORRUPT[name]
    path = measured("memory") / "run" / file
    path.write_text(corrupt(path.read_text()))

    assert here("memory", "train.py:workload", *QUICK, "--fresh", "--out", "run").code == 0
    assert here("show", "run").code == 0


# Processes that end early.


@pytest.mark.slow
def test_interrupted_run_is_kept_and_its_own_words_continue_it(start, project: Path) -> None:
    process = start("find", "train.py:workload", "--budget", "5s", "--out", "a run")
    read_until(process, "step time: ")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()

    assert process.returncode == 130, err
    assert out == ""
    found = re.search(r"rightbatch: interrupted; measured so far: memory\. Continue with: rightbatch (.*)", err)
    assert found, err
    assert "Traceback" not in err
    folder = RunFolder.open(project / "a run")
    assert folder.read_manifest().state == "interrupted"
    kept = (project / "a run" / "memory.json").read_bytes()

    resumed = start(*shlex.split(found[1]), "--json")
    out, err = resumed.communicate()

    assert resumed.returncode in HONEST, err
    findings = json.loads(out)
    assert findings["reused_parts"] == ["memory"]
    assert findings["noise_scale"] is not None
    assert "memory:" not in err
    assert (project / "a run" / "memory.json").read_bytes() == kept
    assert folder.read_manifest().state == "complete"


@pytest.mark.slow
def test_run_is_alone_in_its_folder_and_survives_being_killed(start, here: Run, project: Path) -> None:
    process = start("find", "train.py:workload", "--budget", "20s", "--out", "run")
    read_until(process, "step time: ")

    second = here("find", "train.py:workload", *QUICK, "--out", "run")
    process.kill()
    process.stderr.read()  # ends only when no child holds the other end any more

    says(second, 2, r"another process is using the run folder run; wait for it to end or pass another --out")
    assert process.wait() == -signal.SIGKILL
    assert RunFolder.open(project / "run").read_manifest().state == "measuring"
    shown = json.loads(here("show", "run", "--json").out)
    assert shown["memory"]["ceiling"] >= 8
    assert shown["step_time"] is None
    assert here("find", "train.py:workload", *QUICK, "--out", "run").code in HONEST


def test_reader_that_goes_away_is_no_error(measured: Measured) -> None:
    measured("memory")

    with subprocess.Popen([sys.executable, "-m", "rightbatch", "show", "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
