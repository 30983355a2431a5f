"""Tests check the types of the engine's calls, and the shapes of its tensors wherever it states any."""

import tomllib
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from rightbatch.engine.gradients import GradientBlocks
from rightbatch.engine.rig import shuffled_epochs

ROOT = Path(__file__).parents[2]


def test_every_module_that_states_shapes_has_them_checked():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (given,) = (option.partition("=")[2] for option in options if option.startswith("--jaxtyping-packages="))
    stating = {path for path in (ROOT / "src").rglob("*.py") if "from jaxtyping import" in path.read_text()}

    assert {".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in stating} <= set(given.split(","))


def test_a_wrong_type_is_caught():
    with pytest.raises(BeartypeCallHintViolation):
        next(shuffled_epochs("8", 0))


def test_a_wrong_shape_is_caught():
    with pytest.raises(jaxtyping.TypeCheckError):
        GradientBlocks().add(torch.zeros(2, 2))
