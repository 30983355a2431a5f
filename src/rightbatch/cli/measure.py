"""The commands that measure: find, memory, speed and noise."""

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

from rightbatch.cli.options import FindOptions, MeasureOptions, OutputOptions
from rightbatch.cli.output import answer, answer_findings, say, stdout_reserved
from rightbatch.cli.progress import show_progress
from rightbatch.errors import RunFolderError

if TYPE_CHECKING:
    from rightbatch.records.plan import Findings
    from rightbatch.tuner.request import Request
    from rightbatch.workload.source import WorkloadSource

ANSWERED, NOTHING_FITS, INCONCLUSIVE = 0, 4, 5

PARTS = {
    "find": ("memory", "step_time", "loader", "gradient_noise"),
    "memory": ("memory",),
    "speed": ("memory", "step_time", "loader"),
    "noise": ("memory", "gradient_noise"),
}
"""The parts that each command measures."""


def measure(
    command: str,
    source: "WorkloadSource",
    measuring: MeasureOptions,
    output: OutputOptions,
    wanted: FindOptions,
    *,
    repeat: tuple[str, ...],
) -> int:
    """Measure, print the answer, write the report, and return the exit code.

    Args:
        command: A key of ``PARTS``.
        source: The workload.
        measuring: How to measure.
        output: How to print.
        wanted: What the answer is for.
        repeat: The command that repeats this one.

    Raises:
        RightbatchError: Whatever the tuner could not do.
    """
    source.check()
    if source.wants_help():
        with stdout_reserved():
            text = source.help_text()
        answer(text)
        return ANSWERED
    request = build_request(command, measuring, wanted)
    from rightbatch.tuner.find import find

    with stdout_reserved(), show_progress(quiet=output.quiet) as progress:
        found = find(source, request, progress, command=repeat)
    answer_findings(found.findings, as_json=output.json)
    if found.folder is not None:
        _keep_report(found.findings, found.folder, quiet=output.quiet)
    return exit_code(command, found.findings)


def build_request(command: str, measuring: MeasureOptions, wanted: FindOptions) -> "Request":
    """Turn the options into the tuner's request."""
    from rightbatch.records.plan import Constraints, Goal, Objective
    from rightbatch.tuner.request import Part, Request

    return Request(
        parts=frozenset(Part(part) for part in PARTS[command]),
        objective=Objective(goal=Goal(wanted.goal)),
        constraints=Constraints(max_global_batch_size=wanted.max_global_batch, world_size=wanted.world_size),
        device=measuring.device,
        precision=measuring.precision,
        max_batch=measuring.max_batch,
        limit_bytes=measuring.limit,
        budget_s=measuring.budget,
        seed=measuring.seed,
        threads=measuring.threads,
        isolation=measuring.isolation,
        out=measuring.out,
        fresh=measuring.fresh,
    )


def exit_code(command: str, findings: "Findings") -> int:
    """Return 0 when the command's question was answered, 4 when nothing fits, 5 when the measurements decide nothing or cannot be trusted.

    ``memory``, ``speed`` and ``noise`` ask for less than a recommendation, so their own part decides.
    """
    from rightbatch.records.estimates import Status

    recommendation = findings.recommendation
    if recommendation.status == "nothing_fits":
        return NOTHING_FITS
    if command == "find":
        return ANSWERED if recommendation.status == "ok" and recommendation.plan is not None else INCONCLUSIVE
    if command == "noise":
        answered: AbstractSet[Status] = {Status.OK, Status.AT_LEAST}
        return ANSWERED if findings.noise_scale is not None and findings.noise_scale.status in answered else INCONCLUSIVE
    part = findings.memory if command == "memory" else findings.step_time
    return INCONCLUSIVE if part is None or part.status in {Status.INDETERMINATE, Status.UNSTABLE} else ANSWERED


def _keep_report(findings: "Findings", path: Path, *, quiet: bool) -> None:
    """Write the HTML report into the run folder; when that fails the answer still stands, so it is only said."""
    from rightbatch.records.run import RunFolder
    from rightbatch.report.html import render_html

    try:
        report = RunFolder(path).write_report(render_html(findings))
    except RunFolderError as error:
        say(f"rightbatch: the report was not written: {error}")
        return
    if not quiet:
        say(f"run folder: {_relative(path)}\nreport: {_relative(report)}")


def _relative(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path
