"""Options from a file: ``rightbatch.toml``, or ``[tool.rightbatch]`` in ``pyproject.toml``. Flat keys, one an option."""

import tomllib
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from rightbatch.cli.options import (
    FindOptions,
    MeasureOptions,
    MemoryOptions,
    OutputOptions,
    SweepOptions,
    SweepRunOptions,
    TrainOptions,
)
from rightbatch.errors import UsageError

OWN_FILE = "rightbatch.toml"
SHARED_FILE = "pyproject.toml"
SHARED_TABLE = ("tool", "rightbatch")

KNOWN_KEYS = tuple(
    sorted(
        {
            field.name.replace("_", "-")
            for kind in (OutputOptions, MeasureOptions, FindOptions, MemoryOptions, SweepOptions, SweepRunOptions, TrainOptions)
            for field in fields(kind)
            if field.name != "config"
        }
    )
)

TomlTable = dict[str, object]


def file_layer(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill the options that neither the command line nor the environment gave; called by the parser after those two.

    Raises:
        UsageError: The file is missing or malformed, or has a key that is no option.
    """
    config_option = next((argument for argument in arguments if "--config" in argument.names), None)
    if config_option is None:
        return
    given = Path(config_option.tokens[-1].value) if config_option.tokens else None
    file, table = _read(given) if given is not None else find_config(Path.cwd())
    if file is None:
        return
    normal = {key.replace("_", "-"): value for key, value in table.items()}
    _check_keys(file, normal)
    offered = {name for argument in arguments for name in argument.names}
    applicable = {key: value for key, value in normal.items() if f"--{key}" in offered}
    Dict(applicable, source=str(file), use_commands_as_keys=False)(app, commands, arguments)


def find_config(start: Path) -> tuple[Path | None, TomlTable]:
    """Return the nearest file with options, from a folder upwards, and its table; (none, empty) when there is none.

    Raises:
        UsageError: A file on the way is malformed.
    """
    for folder in (start, *start.parents):
        own = folder / OWN_FILE
        if own.is_file():
            return _read(own)
        shared = folder / SHARED_FILE
        if shared.is_file():
            document = _parse(shared)
            if (table := _shared_table(document)) is not None:
                return shared, table
    return None, {}


def _read(file: Path) -> tuple[Path, TomlTable]:
    document = _parse(file)
    if file.name != SHARED_FILE:
        return file, document
    return file, _shared_table(document) or {}


def _parse(file: Path) -> TomlTable:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {file}: {error.strerror or error}; check --config.") from error
    except ValueError as error:
        raise UsageError(f"the configuration file {file} is not TOML: {error}; correct it or pass another with --config.") from error


def _shared_table(document: TomlTable) -> TomlTable | None:
    table: object = document
    for key in SHARED_TABLE:
        table = table.get(key) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else None


def _check_keys(file: Path, table: TomlTable) -> None:
    for key, value in table.items():
        if key not in KNOWN_KEYS:
            close = get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(KNOWN_KEYS)}."
            raise UsageError(f"the configuration file {file} has the unknown key {key!r}; {hint}")
        if isinstance(value, dict | list):
            raise UsageError(f"the configuration file {file} must give {key!r} one value; got {value!r}.")
