"""Loading a workload from a file or a module: what is found, what is said when it is not, and what is left behind."""

import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from rightbatch.errors import UsageError, UserCodeError, WorkloadError
from rightbatch.workload.source import WorkloadSource, user_traceback


@dataclass
class StandIn:
    """In place of rightbatch.Workload, which needs torch."""

    note: str = ""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("rightbatch.workload.ingredients")
    module.Workload = StandIn
    monkeypatch.setitem(sys.modules, "rightbatch.workload.ingredients", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        place = getattr(sys.modules[name], "__file__", None) or ""
        if place.startswith(str(tmp_path)):
            del sys.modules[name]


HEADER = "from rightbatch.workload.ingredients import Workload\n"


def write(name: str, body: str, *, header: str = HEADER) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + body)
    return path


def test_function_of_a_file_is_called() -> None:
    write("train.py", "def workload(): return Workload('made')\n")
    assert WorkloadSource("train.py:workload").load() == StandIn("made")


def test_workload_object_of_a_file_is_returned() -> None:
    write("ready.py", "it = Workload('ready')\n")
    assert WorkloadSource("ready.py:it").load() == StandIn("ready")


def test_function_of_a_module_in_the_working_folder_is_called() -> None:
    write("pack/__init__.py", "", header="")
    write("pack/inner.py", "def workload(): return Workload('module')\n")
    assert WorkloadSource("pack.inner:workload").load() == StandIn("module")


def test_arguments_are_typed_by_the_signature() -> None:
    write(
        "typed.py", "def workload(width: int = 64, rate: float = 0.1, *, deep: bool = False): return Workload(repr((width, rate, deep)))\n"
    )
    made = WorkloadSource("typed.py:workload", ("--width", "128", "--deep")).load()
    assert made == StandIn("(128, 0.1, True)")


def test_modules_beside_the_file_can_be_imported() -> None:
    write("sub/neighbour.py", "WORD = 'beside'\n", header="")
    write("sub/user.py", "from neighbour import WORD\ndef workload(): return Workload(WORD)\n")
    assert WorkloadSource("sub/user.py:workload").load() == StandIn("beside")


def test_classes_of_the_file_can_be_pickled() -> None:
    write("classy.py", "class Net: pass\ndef workload(): return Workload(Net())\n")
    made = WorkloadSource("classy.py:workload").load()
    assert type(pickle.loads(pickle.dumps(made.note))) is type(made.note)  # noqa: S301
    assert type(made.note).__module__ == "classy"


def test_file_named_like_an_imported_module_does_not_replace_it() -> None:
    json_before = sys.modules["json"]
    write("json.py", "class Net: pass\ndef workload(): return Workload(Net())\n")
    made = WorkloadSource("json.py:workload").load()
    assert sys.modules["json"] is json_before
    assert pickle.loads(pickle.dumps(made.note)).__class__ is made.note.__class__  # noqa: S301


def test_main_and_argv_stay_as_they_were_and_no_byte_code_is_left() -> None:
    write("quiet.py", "import sys\nARGV = list(sys.argv)\ndef workload(): return Workload(repr(ARGV) + __name__)\n")
    main, argv = sys.modules["__main__"], list(sys.argv)
    made = WorkloadSource("quiet.py:workload").load()
    assert made == StandIn("['quiet.py']quiet")
    assert sys.modules["__main__"] is main
    assert sys.argv == argv
    assert sorted(entry.name for entry in Path().iterdir()) == ["quiet.py"]


def test_code_below_the_main_guard_does_not_run() -> None:
    write("guarded.py", "def workload(): return Workload()\nif __name__ == '__main__':\n    raise RuntimeError\n")
    assert WorkloadSource("guarded.py:workload").load() == StandIn()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trian.py:workload", r"there is no file trian\.py; did you mean train\.py\?"),
        ("nowhere/train.py:workload", r"there is no file nowhere/train\.py, nor the folder nowhere"),
        ("train.py", r"did you mean train\.py:workload\?"),
        ("train.py:", r"did you mean train\.py:workload\?"),
        ("train", r"a workload is named FILE\.py:FUNCTION or package\.module:FUNCTION; got 'train'"),
        ("train.py:wrokload", r"train\.py has no 'wrokload'; it defines other, workload, Net; did you mean train\.py:workload\?"),
        ("no_such_module_here:workload", r"there is no module 'no_such_module_here'"),
        ("a b:workload", r"there is no module 'a b'"),
    ],
)
def test_wrong_spec_says_what_was_meant(spec: str, message: str) -> None:
    write("train.py", "def other(): pass\ndef workload(): return Workload()\nclass Net: pass\n")
    with pytest.raises(UsageError, match=message):
        WorkloadSource(spec).load()


def test_check_finds_a_missing_file_without_importing() -> None:
    write("exploding.py", "raise RuntimeError\n", header="")
    WorkloadSource("exploding.py:workload").check()
    with pytest.raises(UsageError, match="there is no file"):
        WorkloadSource("missing.py:workload").check()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("it = 3\n", r"t\.py:it must be a Workload or a function that returns one; got an object of the type builtins\.int"),
        ("def it(): return 'net'\n", r"t\.py:it must return a rightbatch\.Workload; it returned an object of the type builtins\.str"),
        ("import math as it\n", r"got the module math; name another"),
        ("def it(): pass\n", r"it returned None; end it with: return rightbatch\.Workload"),
    ],
)
def test_what_is_no_workload_is_named_by_its_type(body: str, message: str) -> None:
    write("t.py", body)
    with pytest.raises(WorkloadError, match=message):
        WorkloadSource("t.py:it").load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", "wide"), r'Invalid value for --width: unable to convert "wide" into int\.'),
        (("--widht", "3"), r"Unknown option: --widht\. Did you mean --width\?"),
        (("1", "2"), r"Unused Tokens: \['2'\]\."),
    ],
)
def test_wrong_argument_is_one_line_with_the_way_to_the_help(arguments: tuple[str, ...], message: str) -> None:
    write("args.py", "def workload(width: int = 1): return Workload()\n")
    with pytest.raises(UsageError, match=message) as caught:
        WorkloadSource("args.py:workload", arguments).load()
    assert "\n" not in str(caught.value)
    assert "`rightbatch find args.py:workload -- --help`" in str(caught.value)


def test_arguments_for_a_ready_workload_are_refused() -> None:
    write("ready.py", "it = Workload()\n")
    with pytest.raises(UsageError, match="is a Workload and takes no arguments; got '--width 3'"):
        WorkloadSource("ready.py:it", ("--width", "3")).load()


def test_user_code_that_raises_on_import_shows_its_own_frames_only() -> None:
    write("broken.py", "import a_package_that_is_not_there\n", header="")
    with pytest.raises(
        UserCodeError, match=r"broken\.py:workload raised ModuleNotFoundError while it was imported: No module named"
    ) as caught:
        WorkloadSource("broken.py:workload").load()
    assert "broken.py" in caught.value.user_traceback
    assert "rightbatch/workload" not in caught.value.user_traceback
    assert "importlib" not in caught.value.user_traceback


def test_user_function_that_raises_shows_its_own_frames_only() -> None:
    write("raises.py", "def deeper(): raise ValueError('too wide')\ndef workload(width: int = 1): deeper()\n", header="")
    with pytest.raises(UserCodeError, match="raised ValueError while it made the workload: too wide") as caught:
        WorkloadSource("raises.py:workload").load()
    assert caught.value.user_traceback.count("  File ") == 2
    assert "deeper" in caught.value.user_traceback


def test_syntax_error_points_at_the_line() -> None:
    write("syntax.py", "def workload(:\n", header="")
    with pytest.raises(UserCodeError, match="raised SyntaxError while it was imported") as caught:
        WorkloadSource("syntax.py:workload").load()
    assert "def workload(:" in caught.value.user_traceback


def test_exit_in_user_code_does_not_end_us() -> None:
    write("leaver.py", "import sys\nsys.exit(7)\n", header="")
    with pytest.raises(UserCodeError, match=r"ended the process \(sys\.exit\(7\)\) while it was imported; put such code below"):
        WorkloadSource("leaver.py:workload").load()


def test_file_that_failed_can_be_loaded_after_it_was_mended() -> None:
    write("mended.py", "1 / 0\n", header="")
    with pytest.raises(UserCodeError, match="ZeroDivisionError"):
        WorkloadSource("mended.py:workload").load()
    write("mended.py", "def workload(): return Workload('mended')\n")
    assert WorkloadSource("mended.py:workload").load() == StandIn("mended")


def test_wrong_ingredients_stay_a_workload_error() -> None:
    body = "from rightbatch.errors import WorkloadError\ndef workload(): raise WorkloadError('loss is missing.')\n"
    write("wrong.py", body, header="")
    with pytest.raises(WorkloadError, match=r"^loss is missing\.$"):
        WorkloadSource("wrong.py:workload").load()


def test_chained_exceptions_are_stripped_too() -> None:
    write(
        "chained.py", "def workload():\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        raise KeyError('b') from e\n"
    )
    with pytest.raises(UserCodeError) as caught:
        WorkloadSource("chained.py:workload").load()
    assert "ZeroDivisionError" in caught.value.user_traceback
    assert "source.py" not in user_traceback(caught.value.__cause__)


def test_help_is_the_functions_own() -> None:
    write("helped.py", "def workload(width: int = 64):\n    '''My CNN.'''\n    return Workload()\n")
    source = WorkloadSource("helped.py:workload", ("--help",))
    assert source.wants_help()
    assert not WorkloadSource("helped.py:workload", ("--width", "3")).wants_help()
    text = source.help_text()
    assert "My CNN." in text
    assert "--width" in text
    assert "[default: 64]" in text


def test_help_of_a_ready_workload_says_that_it_takes_nothing() -> None:
    write("ready.py", "it = Workload()\n")
    assert "takes no arguments" in WorkloadSource("ready.py:it").help_text()


def test_code_files_are_the_file_and_what_it_imports_from_its_folder() -> None:
    write("lib/site-packages/installed.py", "", header="")
    write("proj/part.py", "", header="")
    write("proj/main.py", "import part\ndef workload(): return Workload()\n")
    write("unrelated.py", "", header="")
    sys.path.insert(0, str(Path("lib/site-packages").resolve()))
    __import__("installed")
    source = WorkloadSource("proj/main.py:workload")
    source.load()
    files = source.code_files()
    assert [Path(path).name for path, _ in files] == ["main.py", "part.py"]
    assert source.code_is_unchanged(files)


def test_edited_or_deleted_code_has_changed() -> None:
    path = write("edited.py", "def workload(): return Workload()\n")
    source = WorkloadSource("edited.py:workload")
    files = source.code_files()
    assert source.code_is_unchanged(files)
    path.write_text("# other\n")
    assert not source.code_is_unchanged(files)
    path.unlink()
    assert not source.code_is_unchanged(files)
    assert not source.code_is_unchanged(())


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("examples/digits.py:workload", "digits-workload"),
        ("pack.inner:make", "pack.inner-make"),
        ("my net.py:f", "my-net-f"),
        ("..:.", "workload"),
    ],
)
def test_name_is_fit_for_a_folder(spec: str, name: str) -> None:
    assert WorkloadSource(spec).name == name


def test_key_depends_on_everything_and_only_on_that() -> None:
    keys = {
        WorkloadSource("a.py:f").key(),
        WorkloadSource("a.py:g").key(),
        WorkloadSource("a.py:f", ("--x", "1")).key(),
        WorkloadSource("a.py:f", ("--x 1",)).key(),
        WorkloadSource("a.py:f").key("cpu"),
    }
    assert len(keys) == 5
    assert WorkloadSource("./a.py:f").key() == WorkloadSource("a.py:f").key()
