"""Stored texts and pages that what is rendered now must equal."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def golden(name: str, actual: str) -> None:
    """Compare with a stored file; ``make golden`` writes it anew."""
    path = FOLDER / name
    if os.environ.get("RIGHTBATCH_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(actual, encoding="utf-8")
    assert path.is_file(), f"{path.name} is missing; write it with: make golden"
    assert actual == path.read_text(encoding="utf-8"), "differs from the stored report; read the diff after: make golden"
