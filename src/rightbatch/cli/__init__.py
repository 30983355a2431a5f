"""The command line: reads options, maps errors to exit codes, prints; never computes."""

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: The words after ``rightbatch``; those of this process when none.
    """
    from rightbatch.cli.app import run  # deferred: a spawned child imports this package again, and needs no parser

    return run(argv)
