"""The command line starts light: help needs none of the libraries that measuring and reporting need."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "scipy", "plotly", "pydantic", "psutil", "jinja2", "filelock", "rightbatch.records", "multiprocessing")

PROBE = """
import io, sys
from contextlib import redirect_stdout
from rightbatch.cli import main
with redirect_stdout(io.StringIO()) as out:
    code = main(sys.argv[1:])
assert code == 0 and out.getvalue(), code
print(*sorted(sys.modules))
"""


def loaded(*words: str) -> set[str]:
    result = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("words", [("--help",), ("find", "--help"), ("train", "--help"), ("show", "--help"), ("--version",), ()])
def test_help_loads_nothing_heavy(words) -> None:
    assert loaded(*words).isdisjoint(HEAVY)


def test_that_check_can_fail() -> None:
    assert "pydantic" in loaded("show", "--schema")


def test_module_can_be_run(tmp_path) -> None:
    result = subprocess.run([sys.executable, "-m", "rightbatch", "nope"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith('rightbatch: Unknown command "nope".')


def test_importing_the_package_main_runs_nothing() -> None:
    result = subprocess.run([sys.executable, "-c", "import rightbatch.__main__"], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_pipe_that_closes_early_is_quiet() -> None:
    reader = [sys.executable, "-c", "import sys; sys.stdin.close()"]
    writer = [sys.executable, "-m", "rightbatch", "show", "--schema"]
    with subprocess.Popen(writer, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
        subprocess.run(reader, stdin=first.stdout, check=True)
        first.stdout.close()
        assert first.stderr.read() == b""
        assert first.wait(60) == 0
