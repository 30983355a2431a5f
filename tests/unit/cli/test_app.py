"""What the command line prints where, and with which exit code it ends."""

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import findings_samples
from rightbatch.cli import main
from rightbatch.cli.output import answer
from rightbatch.cli.progress import LineProgress
from rightbatch.errors import (
    InconclusiveError,
    InterruptedRunError,
    IsolationError,
    NothingFitsError,
    RightbatchError,
    RunFolderBusyError,
    UserCodeError,
    WorkloadError,
)
from rightbatch.records.estimates import Status
from rightbatch.records.plan import Goal
from rightbatch.records.run import RunFolder
from rightbatch.tuner.request import STANDARD_PARTS, Part, Request

WORKLOAD = "train.py:workload"


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_answer_is_on_stdout_and_everything_else_on_stderr(tuner, capsys) -> None:
    assert main(["find", WORKLOAD]) == 0
    out, err = capsys.readouterr()
    assert out == "batch 512, width 80\nwhy\n"
    assert err == "memory: trying 128 (25 % of the budget used)\n"


def test_quiet_shows_no_progress(tuner, capsys) -> None:
    assert main(["find", WORKLOAD, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_json_is_one_document_and_progress_stays_on_stderr(tuner, capsys) -> None:
    assert main(["find", WORKLOAD, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == tuner.findings.model_dump(mode="json")
    assert "trying 128" in err


def test_run_folder_and_report_are_named_after_the_answer(tuner, capsys, tmp_path) -> None:
    tuner.folder = RunFolder.create(tmp_path / "rightbatch-runs" / "train-1").path
    assert main(["find", WORKLOAD]) == 0
    err = capsys.readouterr().err
    assert err.endswith("run folder: rightbatch-runs/train-1\nreport: rightbatch-runs/train-1/report.html\n")
    assert Path("rightbatch-runs/train-1/report.html").read_text() == "<!doctype html>"


def test_report_that_cannot_be_written_does_not_cost_the_answer(tuner, capsys, tmp_path) -> None:
    (tmp_path / "file").touch()
    tuner.folder = tmp_path / "file"
    assert main(["find", WORKLOAD, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["recommendation"]["status"] == "ok"
    assert "rightbatch: the report was not written: cannot write" in err


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("find", set(STANDARD_PARTS)),
        ("find --verify", STANDARD_PARTS | {Part.BRANCHES}),
        ("memory", {Part.MEMORY}),
        ("speed", {Part.MEMORY, Part.STEP_TIME, Part.LOADER}),
        ("noise", {Part.MEMORY, Part.GRADIENT_NOISE}),
    ],
)
def test_each_command_measures_its_parts(tuner, command, parts) -> None:
    assert main([*command.split(), WORKLOAD]) == 0
    assert tuner.request.parts == parts


def test_options_become_the_request(tuner) -> None:
    words = "--device cuda:1 --precision bf16 --max-batch 512 --limit 24GiB --seed 7 --threads 2 --out runs/a --fresh --budget 90s"
    more = "--isolation in-process --goal accuracy --max-global-batch 4096 --world-size 8"
    assert main(["find", WORKLOAD, *words.split(), *more.split()]) == 0
    request = tuner.request
    assert (request.device, request.precision, request.max_batch, request.limit_bytes) == ("cuda:1", "bf16", 512, 24 * 2**30)
    assert (request.seed, request.threads, request.out, request.fresh, request.budget_s) == (7, 2, Path("runs/a"), True, 90.0)
    assert (request.isolation, request.objective.goal) == ("in-process", Goal.ACCURACY)
    assert (request.constraints.max_global_batch_size, request.constraints.world_size) == (4096, 8)


def test_range_test_of_rates_comes_on_request(tuner) -> None:
    assert main(["find", WORKLOAD, "--lr-range"]) == 0
    assert tuner.request.parts == STANDARD_PARTS | {Part.LR_RANGE}


@pytest.mark.parametrize("command", ["memory", "speed", "noise"])
def test_other_commands_test_no_rates(tuner, command) -> None:
    main([command, WORKLOAD])
    assert not tuner.request.lr_range_if_untuned


def test_defaults_are_the_requests_own(tuner) -> None:
    assert main(["find", WORKLOAD]) == 0
    assert tuner.request == Request(lr_range_if_untuned=True)


def test_words_after_the_dashes_are_the_functions(tuner) -> None:
    assert main(["find", WORKLOAD, "--seed", "1", "--", "--seed", "2", "--json", "--", "x"]) == 0
    assert tuner.source.arguments == ("--seed", "2", "--json", "--", "x")
    assert tuner.request.seed == 1
    assert tuner.command == ("rightbatch", "find", WORKLOAD, "--seed", "1", "--", "--seed", "2", "--json", "--", "x")


def test_help_after_the_dashes_is_the_functions_own(tuner, capsys) -> None:
    assert main(["find", WORKLOAD, "--", "--help"]) == 0
    out = capsys.readouterr().out
    assert "My CNN." in out
    assert "--width" in out
    assert tuner.request is None


def test_what_user_code_prints_stays_off_stdout_even_below_python(tuner, capfd) -> None:
    def chatter() -> None:
        sys.stdout.write("from the dataset\n")
        os.write(1, b"from a child\n")

    tuner.action = chatter
    assert main(["find", WORKLOAD, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["schema_version"] == 1
    assert "from the dataset\n" in err
    assert "from a child\n" in err


@pytest.mark.parametrize(
    ("command", "sample", "code"),
    [
        ("find", "good", 0),
        ("find", "unstable", 5),
        ("find", "inconclusive", 5),
        ("find", "nothing_fits", 4),
        ("memory", "memory_only", 0),
        ("memory", "nothing_fits", 4),
        ("speed", "inconclusive", 0),
        ("speed", "memory_only", 5),
        ("noise", "at_least", 0),
        ("noise", "inconclusive", 5),
        ("noise", "memory_only", 5),
    ],
)
def test_exit_code_says_whether_the_question_was_answered(tuner, command, sample, code) -> None:
    tuner.findings = findings_samples.ALL[sample]()
    assert main([command, WORKLOAD]) == code


def test_memory_that_could_not_be_measured_is_no_answer(tuner) -> None:
    findings = findings_samples.memory_only()
    tuner.findings = findings.model_copy(update={"memory": findings.memory.model_copy(update={"status": Status.INDETERMINATE})})
    assert main(["memory", WORKLOAD]) == 5


USAGE_ERRORS = {
    "nope": 'Unknown command "nope". Did you mean "noise"? '
    "Available commands: find, memory, speed, noise, sweep, train, show, report, ... See `rightbatch --help`.",
    "find": 'Command "find" parameter WORKLOAD requires an argument. See `rightbatch find --help`.',
    "find train.py:workload --limit 3parsecs": "Invalid value for --limit: a positive number and one of the units "
    "b, kib, mib, gib, tib, kb, mb, gb, tb, k, m, g, t is needed; got '3parsecs'; write it like 24GiB. See `rightbatch find --help`.",
    "find train.py:workload --budget soon": "Invalid value for --budget: a positive number and one of the units "
    "s, m, min, h, ms is needed; got 'soon'; write it like 2m. See `rightbatch find --help`.",
    f"find train.py:workload --budget {400 * '9'}": "Invalid value for --budget: a positive number and one of the units "
    f"s, m, min, h, ms is needed; got '{400 * '9'}'; write it like 2m. See `rightbatch find --help`.",
    "train train.py:workload --epochs inf": 'Invalid value "inf" for --epochs. Must be < inf. See `rightbatch train --help`.',
    "find train.py:workload --goal tme": 'Invalid value "tme" for --goal. Choose from: "time", "samples", "energy", "accuracy". '
    'Did you mean "time"? See `rightbatch find --help`.',
    "find train.py:workload --max-batch 0": 'Invalid value "0" for --max-batch. Must be >= 1. See `rightbatch find --help`.',
    "find train.py:workload --seed -1": 'Invalid value "-1" for --seed. Must be >= 0. See `rightbatch find --help`.',
    "find train.py:workload --width 3": "Unknown option: --width. Arguments of the workload's own function come after `--`. "
    "See `rightbatch find --help`.",
    "memory train.py:workload wide": "Unused Tokens: ['wide']. Arguments of the workload's own function come after `--`. "
    "See `rightbatch memory --help`.",
    "memory train.py:workload --goal time": "Unknown option: --goal. Arguments of the workload's own function come after `--`. "
    "See `rightbatch memory --help`.",
    "find train.py": "train.py does not say which function makes the workload; did you mean train.py:workload?",
    "find trian.py:workload": "there is no file trian.py; did you mean train.py?",
    "show": "show needs a run folder, or --schema; got neither; give the folder that a command named at its end.",
    "show nowhere": "there is no run folder nowhere; `rightbatch find` says where it puts one (rightbatch-runs by default).",
    "report": "report needs at least one run folder; got none; give the folder that a command named at its end.",
    "report a b -o c.html": "--output names one file for one run; got 2 runs; leave it out to write report.html in each run folder.",
}


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_usage_error_is_one_line_and_exit_code_2(tuner, capsys, line) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"rightbatch: {USAGE_ERRORS[line]}\n"


def test_usage_error_with_json_is_a_document(tuner, capsys) -> None:
    assert main(["find", WORKLOAD, "--goal", "tme", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"schema_version", "error"}
    assert set(document["error"]) == {"type", "message", "exit_code"}
    assert (document["error"]["type"], document["error"]["exit_code"]) == ("UsageError", 2)
    assert document["error"]["message"].startswith('Invalid value "tme" for --goal.')


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkloadError("loss is missing."), 2),
        (RunFolderBusyError("in use."), 2),
        (IsolationError("no child."), 2),
        (UserCodeError("model raised ValueError: bad"), 3),
        (NothingFitsError("one sample needs 3 GiB."), 4),
        (InconclusiveError("too noisy."), 5),
    ],
)
def test_every_error_has_its_exit_code_and_its_message(tuner, capsys, error: RightbatchError, code) -> None:
    tuner.action = raising(error)
    assert main(["find", WORKLOAD, "--quiet", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == {"type": type(error).__name__, "message": str(error), "exit_code": code}
    assert err == f"rightbatch: {error}\n"


def test_error_of_user_code_shows_its_traceback_and_not_ours(tuner, capsys) -> None:
    tuner.action = raising(
        UserCodeError("model raised ValueError: bad", "Traceback (most recent call last):\n  File train.py\nValueError: bad\n")
    )
    assert main(["find", WORKLOAD, "--quiet"]) == 3
    expected = "Traceback (most recent call last):\n  File train.py\nValueError: bad\nrightbatch: model raised ValueError: bad\n"
    assert capsys.readouterr().err == expected


def test_interrupted_run_says_how_to_continue(tuner, capsys) -> None:
    tuner.action = raising(InterruptedRunError("interrupted; measured so far: memory.", "rightbatch find train.py:workload"))
    assert main(["find", WORKLOAD, "--quiet"]) == 130
    expected = "rightbatch: interrupted; measured so far: memory. Continue with: rightbatch find train.py:workload\n"
    assert capsys.readouterr().err == expected


def test_a_run_that_goes_on_after_an_interrupt_is_not_begun_afresh(tuner) -> None:
    assert main(["find", WORKLOAD, "--fresh", "--quiet", "--", "--name", "--fresh"]) == 0
    assert tuner.request.fresh
    assert tuner.command == ("rightbatch", "find", WORKLOAD, "--quiet", "--", "--name", "--fresh")


def test_bare_interrupt_says_how_to_continue(tuner, capsys) -> None:
    tuner.action = raising(KeyboardInterrupt())
    assert main(["find", WORKLOAD, "--json", "--quiet", "--", "--name", "two words"]) == 130
    out, err = capsys.readouterr()
    command = "rightbatch find train.py:workload --json --quiet -- --name 'two words'"
    assert err == f"rightbatch: interrupted. Continue with: {command}\n"
    assert json.loads(out)["error"]["exit_code"] == 130


def test_bug_is_one_line_without_a_traceback(tuner, capsys) -> None:
    tuner.action = raising(ZeroDivisionError("division\nby zero"))
    assert main(["find", WORKLOAD, "--quiet"]) == 70
    expected = (
        "ZeroDivisionError: division by zero - this is a bug in rightbatch; set RIGHTBATCH_DEBUG=1 to see the traceback, and report it."
    )
    assert capsys.readouterr().err == f"rightbatch: {expected}\n"


def test_bug_shows_its_traceback_when_asked(tuner, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RIGHTBATCH_DEBUG", "1")
    tuner.action = raising(ZeroDivisionError("division by zero"))
    assert main(["find", WORKLOAD, "--quiet"]) == 70
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("this is a bug in rightbatch; report it with the traceback above.\n")


class Written(io.TextIOWrapper):
    """A stream of an encoding, and what it was given."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize(
    ("encoding", "written"), [("utf-8", "8 · ≈ 2 ██▍ µ\n"), ("ascii", "8 | ~ 2 ## ?\n"), ("latin-1", "8 | ~ 2 ## µ\n")]
)
def test_an_encoding_that_lacks_characters_gets_plain_ones(monkeypatch, encoding, written) -> None:
    stream = Written(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    answer("8 · ≈ 2 ██▍ µ")
    assert stream.text == written


def test_closed_streams_are_no_error(tuner, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["find", WORKLOAD]) == 0


def test_an_answer_that_finds_no_room_is_an_error_that_says_so(tuner, monkeypatch, capsys) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Full())
        assert main(["find", WORKLOAD]) == 2
    assert "stdout got No space left on device; make room, or send it elsewhere." in capsys.readouterr().err


class BrokenPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_reader_that_has_gone_away_is_no_error(tuner, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", BrokenPipe())
        assert main(["find", WORKLOAD, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "colour"), [("", True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(tuner, monkeypatch, no_color, colour) -> None:
    seen = {}
    monkeypatch.setattr(sys.modules["rightbatch.report.text"], "render_text", lambda findings, **options: seen.update(options) or "x")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["find", WORKLOAD, "--quiet"]) == 0
    assert (seen["width"], seen["colour"]) == (100, colour)
    assert seen["now"].tzinfo is not None


def test_lines_of_progress_are_few(capsys) -> None:
    progress = LineProgress()
    for percent in range(11):
        progress.update("memory", percent / 100, f"size {percent}")
    progress.update("step time", 0.1, "")
    assert capsys.readouterr().err.splitlines() == [
        "memory: size 0 (0.0 % of the budget used)",
        "memory: size 5 (5.0 % of the budget used)",
        "memory: size 10 (10 % of the budget used)",
        "step time (10 % of the budget used)",
    ]


def test_progress_on_a_terminal_is_a_bar_that_goes_away(tuner, monkeypatch, capsys) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["find", WORKLOAD]) == 0
    assert "trying 128" in terminal.getvalue()
    assert capsys.readouterr().out.startswith("batch 512")


def test_a_terminal_that_cannot_draw_gets_lines(tuner, monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    assert main(["find", WORKLOAD]) == 0
    assert terminal.getvalue() == "memory: trying 128 (25 % of the budget used)\n"
