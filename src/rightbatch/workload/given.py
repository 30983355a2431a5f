"""A workload that exists already, in a program or a notebook, as a source."""

from dataclasses import dataclass

from rightbatch.workload.ingredients import Workload


@dataclass(frozen=True)
class GivenWorkload:
    """A workload given in Python; whether its code has changed since is for the caller to know."""

    workload: Workload
    spec: str = "a workload given in Python"
    arguments: tuple[str, ...] = ()
    name: str = "python"

    def load(self) -> Workload:
        """Return the workload."""
        return self.workload

    def code_files(self) -> tuple[tuple[str, str], ...]:
        """Return nothing: no file is known to hold it."""
        return ()

    def code_is_unchanged(self, files: tuple[tuple[str, str], ...]) -> bool:
        """Whether what was measured came from Python, too."""
        return not files
