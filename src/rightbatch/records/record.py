"""The base of every record: frozen, closed, finite, documented field by field."""

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
"""Version of everything written to a run folder or printed by ``--json``; raised when an older reader could misread it."""


class Record(BaseModel):
    """An immutable fact or conclusion that can be written as JSON and read back equal.

    Unknown fields, NaN and infinities are refused: a record that reads back is a record that was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
