"""What ``docs/tutorials/sweep.md`` names is there."""

import re
from pathlib import Path

from rightbatch.cli import main

TUTORIAL = Path(__file__).parents[2] / "docs/tutorials/sweep.md"


def test_the_tutorial_names_no_option_that_is_not_there(capsys) -> None:
    named = set(re.findall(r"--[a-z][a-z-]*", TUTORIAL.read_text()))
    assert main(["sweep", "--help"]) == 0
    offered = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))

    assert named <= offered


def test_the_tutorial_shows_python_that_can_be_read() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.S)

    compile(code, str(TUTORIAL), "exec")
