"""What ``docs/tutorials/own-loop.md`` tells to write does run."""

import re
import sys
from pathlib import Path

import pytest

import findings_samples

TUTORIAL = Path(__file__).parents[2] / "docs/tutorials/own-loop.md"
TRAIN = Path(__file__).parents[2] / "docs/tutorials/train.md"


def blocks(tutorial: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", tutorial.read_text(), re.DOTALL | re.MULTILINE)


def test_the_code_runs_from_top_to_bottom_with_an_answer_on_disk(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.delitem(sys.modules, "train", raising=False)  # another test's
    (project / "train.py").write_text(blocks(TRAIN)[0])
    (project / "answer.json").write_text(findings_samples.good().model_dump_json())
    names: dict[str, object] = {}

    exec("".join(blocks(TUTORIAL)), names)  # noqa: S102  # the tutorial's own code

    assert names["plan"] == findings_samples.good().recommendation.plan
    assert names["outcome"].samples == 1437 % names["plan"].global_batch_size  # the epoch's last batch
    assert names["outcome"].loss < 2.0  # ten classes: 2.3 untrained
