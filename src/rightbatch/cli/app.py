"""Parses the command line, runs the command, and turns every error into one line and an exit code.

Exit codes: 0 answer, 1 a check failed, 2 usage, 3 the user's code, 4 nothing fits, 5 inconclusive,
6 a cluster cannot be reached, 70 a bug in rightbatch, 130 interrupted.
"""

import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from cyclopts.config import Env
from cyclopts.exceptions import UnknownCommandError, UnknownOptionError, UnusedCliTokensError

from rightbatch._version import __version__
from rightbatch.cli.config import file_layer
from rightbatch.cli.measure import PARTS, measure
from rightbatch.cli.options import (
    FindOptions,
    MeasureOptions,
    MemoryOptions,
    OutputOptions,
    ReportOptions,
    RunPath,
    ShowOptions,
    SweepOptions,
    SweepRunOptions,
    TrainOptions,
    WorkloadSpec,
)
from rightbatch.cli.output import answer_error, say
from rightbatch.errors import InterruptedRunError, RightbatchError, UserCodeError

ENVIRONMENT_PREFIX = "RIGHTBATCH_"
DEBUG_VARIABLE = "RIGHTBATCH_DEBUG"
EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED = 2, 70, 130

_OF_WORKLOADS = (*PARTS, "sweep", "train")
"""The commands that load a workload, whose own arguments come after ``--``."""
_COMMANDS = ("find", "memory", "speed", "noise", "sweep", "train", "show", "report", "doctor")
_ARGUMENTS_HINT = "Arguments of the workload's own function come after `--`."
_EPILOGUE = (
    "Options also come from RIGHTBATCH_* variables and from rightbatch.toml or [tool.rightbatch] in pyproject.toml; "
    "the command line wins over a variable, and a variable over a file."
)


class Commands:
    """One method a command; each returns the exit code."""

    def __init__(self, *, repeat: tuple[str, ...], workload_arguments: tuple[str, ...]) -> None:
        self._repeat = repeat
        self._workload_arguments = workload_arguments

    def find(
        self,
        workload: WorkloadSpec,
        /,
        *,
        wanted: FindOptions = FindOptions(),  # noqa: B008  # frozen
        measuring: MeasureOptions = MeasureOptions(),  # noqa: B008
        output: OutputOptions = OutputOptions(),  # noqa: B008
    ) -> int:
        """Recommend a batch size, how to split it, and its learning rate."""
        return self._measure("find", workload, measuring, output, wanted=wanted)

    def memory(
        self,
        workload: WorkloadSpec,
        /,
        *,
        wanted: MemoryOptions = MemoryOptions(),  # noqa: B008
        measuring: MeasureOptions = MeasureOptions(),  # noqa: B008
        output: OutputOptions = OutputOptions(),  # noqa: B008
    ) -> int:
        """Find the largest micro-batch that fits, here or on GPUs that are not here, and what the memory goes to."""
        if wanted.gpu is None:
            return self._measure("memory", workload, measuring, output, memory=wanted)
        from rightbatch.cli.forecast import forecast
        from rightbatch.workload.source import WorkloadSource

        return forecast(WorkloadSource(workload, self._workload_arguments), wanted.gpu, wanted, measuring, output)

    def speed(
        self,
        workload: WorkloadSpec,
        /,
        *,
        measuring: MeasureOptions = MeasureOptions(),  # noqa: B008
        output: OutputOptions = OutputOptions(),  # noqa: B008
    ) -> int:
        """Measure step times and the data loader by batch size."""
        return self._measure("speed", workload, measuring, output)

    def noise(
        self,
        workload: WorkloadSpec,
        /,
        *,
        measuring: MeasureOptions = MeasureOptions(),  # noqa: B008
        output: OutputOptions = OutputOptions(),  # noqa: B008
    ) -> int:
        """Measure the gradient noise scale."""
        return self._measure("noise", workload, measuring, output)

    def sweep(
        self,
        workload: WorkloadSpec,
        /,
        *,
        wanted: SweepOptions = SweepOptions(),  # noqa: B008
        running: SweepRunOptions = SweepRunOptions(),  # noqa: B008
        output: OutputOptions = OutputOptions(),  # noqa: B008
    ) -> int:
        """Train to a target at several batch sizes, with the rate tuned at each. Repeat the command to go on."""
        from rightbatch.cli.sweep import sweep
        from rightbatch.workload.source import WorkloadSource

        return sweep(WorkloadSource(workload, self._workload_arguments), wanted, running, output, repeat=self._repeat)

    def train(
        self,
        workload: WorkloadSpec,
        /,
        *,
        wanted: TrainOptions = TrainOptions(),  # noqa: B008
        output: OutputOptions = OutputOptions(),  # noqa: B008
    ) -> int:
        """Train with a plan: exact accumulation, checkpoints, evaluation, a log and a report."""
        from rightbatch.cli.train import train
        from rightbatch.workload.source import WorkloadSource

        return train(WorkloadSource(workload, self._workload_arguments), wanted, output, repeat=self._repeat)

    def show(
        self,
        run: RunPath | None = None,
        /,
        *,
        showing: ShowOptions = ShowOptions(),  # noqa: B008
        output: OutputOptions = OutputOptions(),  # noqa: B008
    ) -> int:
        """Print a stored run again, without measuring."""
        from rightbatch.cli.stored import show

        return show(run, showing, output)

    def report(
        self,
        *runs: RunPath,
        writing: ReportOptions = ReportOptions(),  # noqa: B008
        output: OutputOptions = OutputOptions(),  # noqa: B008
    ) -> int:
        """Write the HTML report of stored runs."""
        from rightbatch.cli.stored import report

        return report(runs, writing, output)

    def doctor(self, *, output: OutputOptions = OutputOptions()) -> int:  # noqa: B008
        """Check this machine for everything that measuring needs."""
        from rightbatch.cli.doctor import doctor

        return doctor(output)

    def _measure(
        self,
        command: str,
        workload: str,
        measuring: MeasureOptions,
        output: OutputOptions,
        *,
        wanted: FindOptions = FindOptions(),  # noqa: B008
        memory: MemoryOptions = MemoryOptions(),  # noqa: B008
    ) -> int:
        from rightbatch.workload.source import WorkloadSource

        source = WorkloadSource(workload, self._workload_arguments)
        return measure(command, source, measuring, output, wanted, memory=memory, repeat=self._repeat)


def build_app(commands: Commands) -> App:
    """Return the parser of the whole command line."""
    app = App(
        name="rightbatch",
        help="What batch size to train with, split how, with which learning rate: answered by measurement.",
        help_epilogue=_EPILOGUE,
        help_format="plaintext",
        version=__version__,
        config=(Env(ENVIRONMENT_PREFIX, command=False, show=False), file_layer),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for place, name in enumerate(_COMMANDS):
        usage = f"rightbatch {name} [OPTIONS] WORKLOAD [-- ARGUMENTS OF ITS FUNCTION]" if name in _OF_WORKLOADS else None
        app.command(getattr(commands, name), usage=usage, sort_key=place)
    return app


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: The words after ``rightbatch``; those of this process when none.
    """
    words = tuple(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    own, workload_arguments = words[:end], words[end + 1 :]
    repeat = ("rightbatch", *words)
    as_json = "--json" in own or os.environ.get(f"{ENVIRONMENT_PREFIX}JSON", "").lower() in {"1", "true", "yes"}
    app = build_app(Commands(repeat=repeat, workload_arguments=workload_arguments))
    try:
        code = app(list(own), exit_on_error=False, print_error=False)
        return code if isinstance(code, int) else 0
    except CycloptsError as error:
        return _fail("UsageError", _one_line(error, own), EXIT_USAGE, as_json=as_json)
    except InterruptedRunError as error:
        return _fail_interrupted(str(error), error.resume_command or shlex.join(repeat), as_json=as_json)
    except KeyboardInterrupt:
        return _fail_interrupted("interrupted.", shlex.join(repeat), as_json=as_json)
    except UserCodeError as error:
        if error.user_traceback:
            say(error.user_traceback.rstrip())
        return _fail(type(error).__name__, str(error), error.exit_code, as_json=as_json)
    except RightbatchError as error:
        return _fail(type(error).__name__, str(error), error.exit_code, as_json=as_json)
    except Exception as error:  # noqa: BLE001  # the last line of defence: no user sees our traceback unasked
        return _fail_bug(error, as_json=as_json)


def _fail(kind: str, message: str, exit_code: int, *, as_json: bool) -> int:
    say(f"rightbatch: {message}")
    if as_json:
        answer_error(kind, message, exit_code)
    return exit_code


def _fail_interrupted(message: str, resume_command: str, *, as_json: bool) -> int:
    return _fail("InterruptedRunError", f"{message} Continue with: {resume_command}", EXIT_INTERRUPTED, as_json=as_json)


def _fail_bug(error: Exception, *, as_json: bool) -> int:
    if os.environ.get(DEBUG_VARIABLE) == "1":
        say(traceback.format_exc().rstrip())
        hint = "report it with the traceback above."
    else:
        hint = f"set {DEBUG_VARIABLE}=1 to see the traceback, and report it."
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return _fail(type(error).__name__, f"{detail} - this is a bug in rightbatch; {hint}", EXIT_BUG, as_json=as_json)


def _one_line(error: CycloptsError, words: Sequence[str]) -> str:
    error.verbose = False
    message = " ".join(str(error).split())
    command = words[0] if words else ""
    if command in _OF_WORKLOADS and isinstance(error, UnknownOptionError | UnusedCliTokensError):
        message += f" {_ARGUMENTS_HINT}"
    help_command = "rightbatch --help" if isinstance(error, UnknownCommandError) or not command else f"rightbatch {command} --help"
    return f"{message} See `{help_command}`."
