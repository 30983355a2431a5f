"""What ``docs/tutorials/train.md`` tells to write and to run does run."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.conftest import Ended
from rightbatch.cli.options import TrainOptions

TUTORIAL = Path(__file__).parents[2] / "docs/tutorials/train.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(), re.DOTALL | re.MULTILINE)


def test_the_tutorial_runs_from_top_to_bottom(here: Callable[..., Ended], project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(project))
    source, read_weights, from_python = blocks()
    (project / "train.py").write_text(source)
    commands = re.findall(r"^    \$ rightbatch (.*)$", TUTORIAL.read_text(), re.MULTILINE)

    codes = {command: here(*shlex.split(command)).code for command in commands}
    names: dict[str, object] = {}
    exec(read_weights + from_python, names)  # noqa: S102  # the tutorial's own code

    assert len(commands) == 5
    assert set(codes.values()) == {0}, codes
    assert names["training"].state in {"target reached", "finished"}
    assert set(names["weights"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_tutorial_names_no_option_that_is_not_there() -> None:
    own = {f"--{name.replace('_', '-')}" for name in TrainOptions.__dataclass_fields__}

    assert set(re.findall(r"(?<!\w)--[a-z-]+", TUTORIAL.read_text())) - own == {"--nproc-per-node"}
