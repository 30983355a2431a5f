"""Where options come from: the command line wins over the environment, that over a file, that over the default."""

from pathlib import Path

import pytest

from rightbatch.cli import main
from rightbatch.cli.config import KNOWN_KEYS

WORKLOAD = "train.py:workload"


def test_command_line_wins_over_environment_over_file_over_default(tuner, monkeypatch) -> None:
    Path("rightbatch.toml").write_text('device = "file"\nseed = 1\nmax-batch = 11\n')
    monkeypatch.setenv("RIGHTBATCH_DEVICE", "environment")
    monkeypatch.setenv("RIGHTBATCH_SEED", "2")
    assert main(["find", WORKLOAD, "--device", "line"]) == 0
    request = tuner.request
    assert (request.device, request.seed, request.max_batch, request.threads) == ("line", 2, 11, None)


def test_every_kind_of_value_can_come_from_a_file(tuner, capsys) -> None:
    Path("rightbatch.toml").write_text(
        'limit = "2GiB"\nbudget = 30\nfresh = true\nquiet = true\nmax_global_batch = 64\nout = "runs/x"\ngoal = "samples"\n'
    )
    assert main(["find", WORKLOAD]) == 0
    request = tuner.request
    assert (request.limit_bytes, request.budget_s, request.fresh, request.out) == (2 * 2**30, 30.0, True, Path("runs/x"))
    assert (request.constraints.max_global_batch_size, request.objective.goal) == (64, "samples")
    assert capsys.readouterr().err == ""


def test_keys_of_another_command_are_no_error(tuner) -> None:
    Path("rightbatch.toml").write_text('goal = "samples"\nseed = 3\n')
    assert main(["memory", WORKLOAD]) == 0
    assert (tuner.request.objective.goal, tuner.request.seed) == ("time", 3)


def test_table_of_pyproject_serves_too_and_is_found_upwards(tuner, monkeypatch) -> None:
    Path("pyproject.toml").write_text("[tool.other]\nx = 1\n[tool.rightbatch]\nseed = 5\n")
    Path("deep/er").mkdir(parents=True)
    Path("deep/pyproject.toml").write_text('[project]\nname = "inner"\n')
    Path("deep/er/train.py").write_text("def workload(): pass\n")
    monkeypatch.chdir("deep/er")
    assert main(["find", WORKLOAD]) == 0
    assert tuner.request.seed == 5


def test_own_file_wins_over_pyproject_beside_it(tuner) -> None:
    Path("pyproject.toml").write_text("[tool.rightbatch]\nseed = 5\n")
    Path("rightbatch.toml").write_text("seed = 6\n")
    assert main(["find", WORKLOAD]) == 0
    assert tuner.request.seed == 6


def test_named_file_replaces_the_one_found(tuner, monkeypatch) -> None:
    Path("rightbatch.toml").write_text("seed = 6\nthreads = 1\n")
    Path("other.toml").write_text("seed = 7\n")
    assert main(["find", WORKLOAD, "--config", "other.toml"]) == 0
    assert (tuner.request.seed, tuner.request.threads) == (7, None)
    monkeypatch.setenv("RIGHTBATCH_CONFIG", "other.toml")
    assert main(["find", WORKLOAD]) == 0
    assert tuner.request.seed == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede = 1\n", "has the unknown key 'sede'; did you mean 'seed'?"),
        ("zzz = 1\n", f"has the unknown key 'zzz'; known keys are {', '.join(KNOWN_KEYS)}."),
        ("[find]\nseed = 1\n", "has the unknown key 'find'; "),
        ("seed = [1, 2]\n", "must give 'seed' one value; got [1, 2]."),
        ("seed = \n", "is not TOML: "),
        ('seed = "x"\n', 'rightbatch.toml: unable to convert "x" into int'),
        ('config = "more.toml"\n', "has the unknown key 'config'; "),
    ],
)
def test_wrong_file_is_exit_code_2_and_one_line(tuner, capsys, text, message) -> None:
    Path("rightbatch.toml").write_text(text)
    assert main(["find", WORKLOAD]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert tuner.request is None


def test_missing_file_is_said(tuner, capsys) -> None:
    assert main(["find", WORKLOAD, "--config", "gone.toml"]) == 2
    assert (
        capsys.readouterr().err == "rightbatch: cannot read the configuration file gone.toml: No such file or directory; check --config.\n"
    )


def test_wrong_variable_is_exit_code_2(tuner, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RIGHTBATCH_MAX_BATCH", "many")
    assert main(["find", WORKLOAD]) == 2
    assert "RIGHTBATCH_MAX_BATCH" in capsys.readouterr().err


def test_json_from_the_environment_holds_for_errors(tuner, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RIGHTBATCH_JSON", "1")
    assert main(["find", "gone.py:workload"]) == 2
    assert '"exit_code": 2' in capsys.readouterr().out


def test_commands_that_read_need_no_configuration(tuner, capsys) -> None:
    Path("rightbatch.toml").write_text("sede = 1\n")
    assert main(["show", "--schema"]) == 0
    assert capsys.readouterr().out.startswith("{")
