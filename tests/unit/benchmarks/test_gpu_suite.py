"""The GPU suite judges what it should, keeps to its budget, and leaves a whole record whatever a check does."""

import json

import pytest
import torch

import gpu_suite
from gpu_checks_context import CheckResult, Context
from gpu_suite import CHECKS, FAILED, HOLDS, NEEDS_CUDA, NOT_CHECKED, NOT_RUN, UNUSABLE, Check, document, exit_code, line, main, run_checks
from rightbatch.errors import RunFolderError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class FakeCounters:
    def capacity(self):
        return 2**34


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def context(clock):
    return Context(device=CPU, counters=FakeCounters(), clock_s=clock)


def found(*, holds=True, value=1.0, detail="measured"):
    return CheckResult(name="", value=value, unit="bytes", goal="<= 2", holds=holds, detail=detail)


def check(name, run=None, *, share=0.1, **options):
    return Check(name=name, run=run or (lambda context: found()), share=share, **options)


def taking(clock, seconds, given):
    """A check that takes some seconds and notes how many it was given."""

    def run(context):
        given.append(context.left_s())
        clock.now += seconds
        return found()

    return run


def test_every_check_is_given_its_share_of_the_budget_and_the_last_one_all_that_is_left(context, clock):
    given = []
    checks = [check(name, taking(clock, 10, given), share=share) for name, share in (("a", 0.3), ("b", 0.2), ("c", 0.1))]
    results = run_checks(checks, context, 100)
    assert given == [30, 20, 80]
    assert [result.seconds for result in results] == [10, 10, 10]


def test_a_check_that_overruns_takes_from_those_behind_it_and_never_from_the_budget(context, clock):
    given = []
    checks = [
        check("slow", taking(clock, 85, given), share=0.3),
        check("next", taking(clock, 5, given), share=0.3),
        check("last", share=0.1),
    ]
    run_checks(checks, context, 100)
    assert given == [30, 15]


def test_a_check_with_less_than_a_quarter_of_its_share_left_is_not_begun_and_fails_the_suite(context, clock):
    given = []
    checks = [check("slow", taking(clock, 95, given)), check("long", share=0.4), check("short", share=0.1)]
    slow, long, short = run_checks(checks, context, 100)
    assert (long.holds, long.value) == (None, None)
    assert long.detail == f"{NOT_RUN}: 5 s of the budget of 100 s were left"
    assert short.holds
    assert exit_code([slow, long, short]) == FAILED
    assert exit_code([slow, short]) == HOLDS


def test_a_budget_that_is_overdrawn_is_told_as_nothing_left(context, clock):
    results = run_checks([check("slow", taking(clock, 130, [])), check("next")], context, 100)
    assert results[1].detail == f"{NOT_RUN}: 0 s of the budget of 100 s were left"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("no such kernel\nmore"), "RuntimeError: no such kernel"),
        (torch.OutOfMemoryError(), "OutOfMemoryError: without a message"),
        (KeyError("residual"), "KeyError: 'residual'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_check_that_raises_has_failed_with_the_first_line_and_the_others_still_run(context, error, words):
    def run(context):
        raise error

    broken, good = run_checks([check("broken", run), check("good")], context, 100)
    assert (broken.name, broken.holds, broken.value, broken.detail) == ("broken", False, None, words)
    assert good.holds
    assert exit_code([broken, good]) == FAILED


def test_a_check_that_raises_in_a_rehearsal_has_failed_although_it_is_not_judged(context):
    def run(context):
        raise ValueError("no")

    (broken,) = run_checks([check("broken", run, on_cpu="run", same_on_cpu="both are one")], context, 100)
    assert broken.holds is False


def test_an_interruption_is_not_taken_for_a_failed_check(context):
    def run(context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks([check("interrupted", run)], context, 100)


def test_a_goal_that_is_missed_fails_the_suite_and_a_bare_figure_does_not(context):
    missed, figure = run_checks(
        [check("missed", lambda context: found(holds=False)), check("f", lambda context: found(holds=None))], context, 9
    )
    assert exit_code([missed]) == FAILED
    assert exit_code([figure]) == HOLDS


@pytest.mark.parametrize(
    ("on_cpu", "device", "holds", "begins"),
    [
        ("judged", CPU, True, "measured"),
        ("run", CPU, None, f"{NOT_CHECKED}, since both are one: measured"),
        ("skipped", CPU, None, NEEDS_CUDA),
        ("judged", CUDA, True, "measured"),
        ("run", CUDA, True, "measured"),
        ("skipped", CUDA, True, "measured"),
    ],
)
def test_what_a_cpu_would_compare_with_itself_is_judged_on_a_gpu_only(clock, on_cpu, device, holds, begins):
    context = Context(device=device, counters=FakeCounters(), clock_s=clock)
    (result,) = run_checks([check("c", on_cpu=on_cpu, same_on_cpu="both are one")], context, 100)
    assert (result.holds, result.detail) == (holds, begins)
    assert ("ok" in line(result)) == bool(holds)
    assert exit_code([result]) == HOLDS


def test_the_allocators_replay_and_the_noise_are_never_said_to_hold_in_a_rehearsal():
    by_mode = {mode: {entry.name for entry in CHECKS if entry.on_cpu == mode} for mode in ("run", "skipped")}
    assert by_mode["run"] == {"allocator replay", "allocator retries", "gradient noise"}
    assert by_mode["skipped"] == {"context", "clock", "energy", "contention", "compile"}
    assert all(bool(entry.same_on_cpu) == (entry.on_cpu == "run") for entry in CHECKS)


def test_the_shares_make_up_the_budget_and_the_budget_leaves_eight_minutes_room_for_the_start():
    assert sum(entry.share for entry in CHECKS) == pytest.approx(1)
    assert len({entry.name for entry in CHECKS}) == len(CHECKS)
    assert gpu_suite.BUDGET_S + 20 <= 8 * 60


def test_a_line_shows_the_mark_the_value_with_its_goal_and_the_seconds():
    kept = CheckResult(name="clock", value=1.01, unit="ratio", goal="<= 1.05", holds=True, detail="n 20", seconds=3.21)
    assert line(kept) == "ok   clock [3.2 s]: 1.01 ratio (goal <= 1.05) · n 20"
    assert (
        line(CheckResult(name="x", value=None, unit="", goal="", holds=False, detail="ValueError: no")) == "FAIL x [0.0 s]: ValueError: no"
    )


def test_the_document_holds_the_goals_and_everything_measured_and_is_json_whatever_was_measured(context):
    results = [found(value=float("nan"), detail="gone"), found(value=3)]
    read = json.loads(json.dumps(document(results, context, ["--device", "cpu"]), allow_nan=False))
    assert read["goals"][1] == {"name": "", "value": 3, "unit": "bytes", "goal": "<= 2", "holds": True}
    assert read["goals"][0]["value"] == "NaN"
    assert read["results"][0]["detail"] == "gone"
    assert read["environment"]["command"] == "python benchmarks/gpu_suite.py --device cpu"
    assert read["environment"]["rehearsal"] is True
    assert read["environment"]["n"] == 2


def test_no_folder_of_this_machine_gets_into_the_document(clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    context = Context(device=CPU, counters=FakeCounters(), clock_s=clock, data="/data/private/cifar")
    words = ["--data", "/data/private/cifar", f"--out={tmp_path}/records"]
    result = found(detail=f"no file /data/private/cifar nor {tmp_path}/other.npz")
    text = json.dumps(document([result], context, words))
    assert "/data/private" not in text
    assert str(tmp_path) not in text
    assert "no file PATH nor other.npz" in text


@pytest.mark.parametrize(("names", "chosen"), [(None, len(CHECKS)), ("trace,step-time", 2), ("step time, trace", 2)])
def test_checks_are_chosen_by_name_and_keep_their_order(names, chosen):
    checks = gpu_suite.chosen(names)
    assert len(checks) == chosen
    assert [entry for entry in CHECKS if entry in checks] == list(checks)


def run_main(monkeypatch, checks, *words, context):
    monkeypatch.setattr(gpu_suite, "CHECKS", tuple(checks))
    return main([*words], resolve=torch.device, context_of=lambda device, data: context)


def test_the_record_is_written_anew_after_every_check_and_says_what_was_not_reached(monkeypatch, tmp_path, context):
    seen = []

    def second(context):
        seen.append(json.loads((tmp_path / "record.json").read_text()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, [check("first"), check("second", second), check("third")], "--out", str(tmp_path), context=context)
    kept = json.loads((tmp_path / "record.json").read_text())
    assert kept == seen[0]
    assert [goal["holds"] for goal in kept["goals"]] == [True, None, None]
    assert [result["detail"] for result in kept["results"]] == ["measured", f"{NOT_RUN} yet", f"{NOT_RUN} yet"]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_record_that_cannot_be_written_leaves_the_old_one_whole(monkeypatch, tmp_path, context):
    gpu_suite.write_record(tmp_path, {"goals": []})
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunFolderError, match="No space left on device"):
        gpu_suite.write_record(tmp_path, {"goals": ["new"]})
    assert json.loads((tmp_path / "record.json").read_text()) == {"goals": []}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_main_counts_what_holds_and_says_what_was_not_judged(monkeypatch, capsys, tmp_path, context):
    checks = [
        check("a"),
        check("b", lambda context: found(holds=False)),
        check("c", on_cpu="run", same_on_cpu="x"),
        check("d", on_cpu="skipped"),
    ]
    code = run_main(monkeypatch, checks, "--out", str(tmp_path), context=context)
    output, progress = capsys.readouterr()
    assert code == FAILED
    assert output.startswith("1 of 2 checks hold, ")
    assert output.endswith(f" s; 1 {NOT_CHECKED}; 1 {NEEDS_CUDA}\n")
    assert [text[:4] for text in progress.splitlines()] == ["ok  ", "FAIL", "-   ", "-   "]
    assert len(json.loads((tmp_path / "record.json").read_text())["results"]) == 4


def test_json_prints_one_document_and_nothing_else(monkeypatch, capsys, context):
    assert run_main(monkeypatch, [check("a")], "--json", context=context) == HOLDS
    assert json.loads(capsys.readouterr().out)["goals"][0]["holds"] is True


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--only", "trace,nonsense"], "--only takes trace, calibration"),
        (["--out", "/dev/null/records"], "Not a directory"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_anything_runs(monkeypatch, capsys, context, words, complaint):
    monkeypatch.setattr(gpu_suite, "run_checks", lambda *_: pytest.fail("must not run"))
    assert main(words, resolve=torch.device, context_of=lambda device, data: context) == UNUSABLE
    assert complaint in capsys.readouterr().err


def test_a_device_that_is_not_here_is_refused(capsys):
    assert main(["--device", "cuda:99"]) == UNUSABLE
    assert "gpu_suite:" in capsys.readouterr().err
