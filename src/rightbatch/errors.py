"""Every error rightbatch raises on purpose: one tree, each with the exit code the command line gives it.

A message states the rule, what was got, and what to do next, with numbers.
"""

from typing import ClassVar


class RightbatchError(Exception):
    """Base class of every error that rightbatch raises on purpose."""

    exit_code: ClassVar[int] = 2


class UsageError(RightbatchError):
    """The request itself cannot be carried out as written."""


class WorkloadError(UsageError):
    """A workload's ingredients are missing, of the wrong kind, or contradict one another."""


class UserCodeError(RightbatchError):
    """The user's own code could not be loaded, or raised while it ran.

    Attributes:
        user_traceback: The traceback of the user's frames only, ready to print; may be empty.
    """

    exit_code = 3

    def __init__(self, message: str, user_traceback: str = "") -> None:
        super().__init__(message)
        self.user_traceback = user_traceback

    def __reduce__(self) -> tuple[type["UserCodeError"], tuple[str, str]]:
        return type(self), (str(self), self.user_traceback)


class NothingFitsError(RightbatchError):
    """Not even one sample fits in the memory limit."""

    exit_code = 4


class InconclusiveError(RightbatchError):
    """What was measured does not decide the question; the partial result was saved."""

    exit_code = 5


class RunFolderError(RightbatchError):
    """A run folder is corrupt, foreign, unwritable, or was written by a newer version."""


class RunFolderBusyError(RunFolderError):
    """Another process holds the lock of the run folder."""


class IsolationError(RightbatchError):
    """The child process that isolates measurements could not be started or stopped answering."""


class ClusterError(RightbatchError):
    """The machines that a sweep should run on cannot be reached, or what it takes to reach them is not installed."""

    exit_code = 6


class WorkerKilledError(RightbatchError):
    """The process of a trial was ended by a signal, most often by the kernel because the machine ran out of memory."""


class InterruptedRunError(RightbatchError):
    """The run was interrupted; what had been measured was saved.

    Attributes:
        resume_command: The command that continues the run; empty when there is nothing to continue.
    """

    exit_code = 130

    def __init__(self, message: str, resume_command: str = "") -> None:
        super().__init__(message)
        self.resume_command = resume_command


class RightbatchWarning(UserWarning):
    """Category of every warning that rightbatch issues."""
