"""Where a workload comes from: ``file.py:function`` or ``package.module:function``, with arguments typed by its signature.

Importing this module imports neither torch nor any of the user's code; ``WorkloadSource.load`` does both.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rightbatch.errors import RightbatchError, UsageError, UserCodeError, WorkloadError

if TYPE_CHECKING:
    from cyclopts import App

HELP_FLAGS = ("--help", "-h")

_FORMS = "write it as FILE.py:FUNCTION or package.module:FUNCTION"
_OWN_FOLDER = Path(__file__).resolve().parent.parent
_T = TypeVar("_T")


class Source(Protocol):
    """Where a workload comes from."""

    @property
    def spec(self) -> str:
        """How the user named it."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The user's arguments to it."""

    @property
    def name(self) -> str:
        """A word for it that can name a folder."""

    def load(self) -> Any:
        """Return the workload; runs the user's code."""

    def code_files(self) -> tuple[tuple[str, str], ...]:
        """Return (path, digest) of every file of the user's code, once loaded."""

    def code_is_unchanged(self, files: tuple[tuple[str, str], ...]) -> bool:
        """Return whether those files are as they were."""


@dataclass(frozen=True)
class WorkloadSource:
    """A workload that is loaded when it is needed, here and again in a child process."""

    spec: str
    """``file.py:function``, ``package.module:function``, or the name of a ``Workload`` in place of the function."""
    arguments: tuple[str, ...] = ()
    """Words for the function's own parameters, as after ``--`` on the command line."""

    @property
    def name(self) -> str:
        """A short name fit for a folder: ``examples/digits.py:workload`` gives ``digits-workload``."""
        place, _, attribute = self.spec.rpartition(":")
        stem = Path(place).stem if place.endswith(".py") else place
        return re.sub(r"[^A-Za-z0-9._]+", "-", f"{stem}-{attribute}").strip("-.") or "workload"

    def key(self, *parts: str) -> str:
        """Hash the spec, the arguments and further strings to ten hexadecimal digits, the same in every process."""
        place, _, attribute = self.spec.rpartition(":")
        identity = [Path(place).as_posix(), attribute, list(self.arguments), list(parts)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]

    def wants_help(self) -> bool:
        """Whether the arguments ask for the help of the workload's function."""
        return any(argument in HELP_FLAGS for argument in self.arguments)

    def check(self) -> None:
        """Check the spec without importing anything.

        Raises:
            UsageError: The spec names no function, or a file that is not there.
        """
        place, _, attribute = self.spec.rpartition(":")
        if not place or not attribute or "/" in attribute or attribute.endswith(".py"):
            raise UsageError(_explain_missing_function(self.spec))
        file = self._file()
        if file is not None and not file.is_file():
            raise UsageError(_explain_missing_file(Path(place)))

    def load(self) -> object:
        """Import the user's code and return the ``Workload`` that the spec names or makes.

        Raises:
            UsageError: The spec names no file, module or function, or the arguments do not suit the function.
            WorkloadError: What it names is not a ``Workload`` and makes none.
            UserCodeError: The user's code raised, or ended the process.
        """
        found = self._find()
        from rightbatch.workload.ingredients import Workload

        if isinstance(found, Workload):
            if self.arguments:
                raise UsageError(f"{self.spec} is a Workload and takes no arguments; got {' '.join(self.arguments)!r} after --; drop it.")
            return found
        if not callable(found):
            raise WorkloadError(f"{self.spec} must be a Workload or a function that returns one; got {_kind(found)}; name another.")
        made = self._call(found)
        if not isinstance(made, Workload):
            raise WorkloadError(
                f"{self.spec} must return a rightbatch.Workload; it returned {_kind(made)}; end it with: return rightbatch.Workload(...)."
            )
        return made

    def help_text(self) -> str:
        """Return the help of the workload's function: its docstring and its parameters.

        Raises:
            UsageError: The spec names no file, module or function.
            UserCodeError: The user's code raised while it was imported.
        """
        found = self._find()
        if not callable(found):
            return f"{self.spec} is {_kind(found)}; it takes no arguments after --.\n"
        from rich.console import Console

        stream = io.StringIO()
        app = _app_of(found, self.spec)
        self._guard(lambda: app.help_print([], console=Console(file=stream, width=100)), doing="could not be described")
        return stream.getvalue()

    def code_files(self) -> tuple[tuple[str, str], ...]:
        """Return (path, SHA-256) of the user's code that is imported now; call it after ``load``.

        That is the file itself and every imported module below its folder or the working folder, installed packages left out.
        """
        folders = {Path.cwd().resolve()}
        file = self._file()
        files: set[Path] = set()
        if file is not None:
            folders.add(file.parent)
            files.add(file)
        for module in tuple(sys.modules.values()):
            place = getattr(module, "__file__", None)
            if isinstance(place, str) and (path := Path(place).resolve()).is_file() and _is_user_code(path, folders):
                files.add(path)
        return tuple((str(path), _digest(path)) for path in sorted(files))

    @staticmethod
    def code_is_unchanged(files: tuple[tuple[str, str], ...]) -> bool:
        """Whether every (path, SHA-256) still holds; false when there are none, because then nothing is known."""
        try:
            return bool(files) and all(_digest(Path(path)) == digest for path, digest in files)
        except OSError:
            return False

    def _file(self) -> Path | None:
        place = self.spec.rpartition(":")[0]
        return Path(place).resolve() if place.endswith(".py") else None

    def _find(self) -> object:
        self.check()
        place, _, attribute = self.spec.rpartition(":")
        file = self._file()
        module = self._guard(lambda: _import_module(place) if file is None else _import_file(file), doing="while it was imported")
        if not hasattr(module, attribute):
            raise UsageError(_explain_missing_attribute(place, attribute, module))
        found: object = getattr(module, attribute)
        return found

    def _call(self, function: Callable[..., object]) -> object:
        from cyclopts import CycloptsError

        app = _app_of(function, self.spec)
        try:
            command, bound, _ = self._guard(
                lambda: app.parse_args(list(self.arguments), exit_on_error=False, print_error=False), doing="while its signature was read"
            )
        except CycloptsError as error:
            error.verbose = False
            message = " ".join(str(error).split())
            raise UsageError(
                f"{self.spec}: {message} Its arguments follow --; `rightbatch find {self.spec} -- --help` lists them."
            ) from error
        return self._guard(lambda: command(*bound.args, **bound.kwargs), doing="while it made the workload")

    def _guard(self, action: Callable[[], _T], *, doing: str) -> _T:
        """Run the user's code; whatever it raises comes out as ``UserCodeError``, except rightbatch's and the parser's own errors."""
        from cyclopts import CycloptsError

        try:
            with _as_script(self.spec.rpartition(":")[0]):
                return action()
        except (RightbatchError, CycloptsError):
            raise
        except SystemExit as error:
            message = f"{self.spec} ended the process (sys.exit({error.code!r})) {doing}; put such code below `if __name__ == '__main__':`."
            raise UserCodeError(message, user_traceback(error)) from error
        except Exception as error:
            detail = f": {str(error).splitlines()[0]}" if str(error) else ""
            raise UserCodeError(f"{self.spec} raised {type(error).__name__} {doing}{detail}", user_traceback(error)) from error


def user_traceback(error: BaseException) -> str:
    """Format an error's traceback without the frames of rightbatch, of its parser and of the import machinery."""
    formatted = traceback.TracebackException.from_exception(error)
    _strip_frames(formatted)
    return "".join(formatted.format())


def _strip_frames(formatted: traceback.TracebackException) -> None:
    formatted.stack = traceback.StackSummary.from_list([frame for frame in formatted.stack if not _is_machinery(frame.filename)])
    for linked in (formatted.__cause__, formatted.__context__):
        if linked is not None:
            _strip_frames(linked)


def _is_machinery(filename: str) -> bool:
    if filename.startswith("<frozen ") or f"{os.sep}cyclopts{os.sep}" in filename:
        return True
    path = Path(filename)
    return path.is_relative_to(_OWN_FOLDER) or path == Path(importlib.__file__)


@contextmanager
def _as_script(place: str) -> Iterator[None]:
    """Let the user's code see itself as ``sys.argv[0]`` without our arguments, and leave no byte code beside it."""
    before = sys.argv, sys.dont_write_bytecode
    sys.argv, sys.dont_write_bytecode = [place], True
    try:
        yield
    finally:
        sys.argv, sys.dont_write_bytecode = before


def _import_file(file: Path) -> ModuleType:
    """Import a file under its own stem, or under a name made of its path when that stem is taken."""
    _put_first_on_path(file.parent)
    name = file.stem
    known = sys.modules.get(name)
    if not name.isidentifier() or (known is not None and not _is_from(known, file)) or (known is None and not _would_import(name, file)):
        name = f"rightbatch_workload_{hashlib.sha256(str(file).encode()).hexdigest()[:10]}"
        known = sys.modules.get(name)
    if known is not None:
        return known
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} cannot be imported as Python; {_FORMS}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_from(module: ModuleType, file: Path) -> bool:
    place = getattr(module, "__file__", None)
    return isinstance(place, str) and Path(place).resolve() == file


def _would_import(name: str, file: Path) -> bool:
    """Whether ``import name`` finds this very file, so that a child process can unpickle its classes."""
    importlib.invalidate_caches()
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None and Path(found.origin).resolve() == file


def _import_module(name: str) -> ModuleType:
    _put_first_on_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            message = f"there is no module {error.name!r} in {Path.cwd()} or among the installed packages; {_FORMS}."
            raise UsageError(message) from error
        raise
    except (TypeError, ValueError) as error:
        if name.startswith(".") or not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"{name!r} is not the name of a module; {_FORMS}.") from error
        raise


def _put_first_on_path(folder: Path) -> None:
    if not sys.path or sys.path[0] != str(folder):
        sys.path.insert(0, str(folder))


def _app_of(function: Callable[..., object], spec: str) -> "App":
    from cyclopts import App

    app = App(name=f"{spec} --", help_flags=HELP_FLAGS, version_flags=(), help_format="plaintext")
    app.default(function)
    return app


def _is_user_code(path: Path, folders: set[Path]) -> bool:
    if not any(path.is_relative_to(folder) for folder in folders) or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    excluded = [_OWN_FOLDER, Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("platstdlib"))]
    if sys.prefix != sys.base_prefix:
        excluded.append(Path(sys.prefix))
    return not any(path.is_relative_to(folder.resolve()) for folder in excluded)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _kind(value: object) -> str:
    if value is None:
        return "None"
    if inspect.ismodule(value):
        return f"the module {value.__name__}"
    return f"an object of the type {type(value).__module__}.{type(value).__qualname__}"


def _explain_missing_function(spec: str) -> str:
    place = spec.strip(":")
    file = Path(place)
    if not place.endswith(".py"):
        return f"a workload is named FILE.py:FUNCTION or package.module:FUNCTION; got {spec!r}."
    if not file.is_file():
        return _explain_missing_file(file)
    names = _likely_functions(file)
    if not names:
        return f"{place} does not say which function makes the workload, and holds none; write one and name it as {place}:FUNCTION."
    others = f" (it also holds {', '.join(names[1:])})" if len(names) > 1 else ""
    return f"{place} does not say which function makes the workload; did you mean {place}:{names[0]}?{others}"


def _explain_missing_file(file: Path) -> str:
    try:
        neighbours = sorted(entry.name for entry in file.parent.iterdir() if entry.suffix == ".py")
    except OSError:
        return f"there is no file {file}, nor the folder {file.parent}; {_FORMS}."
    close = get_close_matches(file.name, neighbours, n=1)
    hint = f"did you mean {file.with_name(close[0])}?" if close else f"{_FORMS}."
    return f"there is no file {file}; {hint}"


def _explain_missing_attribute(place: str, attribute: str, module: ModuleType) -> str:
    own = [
        name for name, value in vars(module).items() if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    close = get_close_matches(attribute, own, n=1)
    hint = f"; did you mean {place}:{close[0]}?" if close else "."
    return f"{place} has no {attribute!r}; it defines {', '.join(own) or 'nothing that could be a workload'}{hint}"


def _likely_functions(file: Path) -> list[str]:
    """Names in a file that could be meant, the likeliest first, found without running it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    makers = [name for name, node in functions.items() if name == "workload" or "Workload" in ast.unparse(node)]
    return sorted(makers, key=lambda name: name != "workload") or list(functions)
