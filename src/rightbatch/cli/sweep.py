"""The command that trains at several sizes: sweep."""

from pathlib import Path
from typing import TYPE_CHECKING

from rightbatch.cli.measure import ANSWERED, INCONCLUSIVE, answered_help, without_fresh
from rightbatch.cli.options import OutputOptions, SweepOptions, SweepRunOptions
from rightbatch.cli.output import answer, say, shown_path, stdout_reserved, text_layout
from rightbatch.cli.progress import show_sweep
from rightbatch.errors import RunFolderError, UsageError

if TYPE_CHECKING:
    from rightbatch.records.sweep import SweepResult
    from rightbatch.sweeps.request import SweepRequest
    from rightbatch.workload.source import WorkloadSource


def sweep(
    source: "WorkloadSource", wanted: SweepOptions, running: SweepRunOptions, output: OutputOptions, *, repeat: tuple[str, ...]
) -> int:
    """Sweep, print the answer, write the report, and return the exit code.

    Args:
        source: The workload.
        wanted: What is asked.
        running: Where and how trials run.
        output: How to print.
        repeat: The command that goes on with the sweep.

    Raises:
        RightbatchError: Whatever the sweep could not do.
    """
    source.check()
    if answered_help(source):
        return ANSWERED
    request = build_request(wanted, running)
    from rightbatch.sweeps.driver import sweep as run_sweep

    with stdout_reserved(), show_sweep(quiet=output.quiet) as progress:
        found = run_sweep(source, request, progress, command=without_fresh(repeat))
    answer_sweep(found.result, as_json=output.json)
    _keep_report(found.result, found.folder, quiet=output.quiet)
    return exit_code(found.result)


def build_request(wanted: SweepOptions, running: SweepRunOptions) -> "SweepRequest":
    """Turn the options into a request.

    Raises:
        UsageError: An option is not of the form that it must have.
    """
    from rightbatch.records.training_log import TrainingTarget
    from rightbatch.sweeps.request import SweepRequest, parse_sizes

    if wanted.target is None:
        raise UsageError("sweep needs a target to train to; got none; pass --target 'accuracy>=0.97', for example.")
    return SweepRequest(
        target=TrainingTarget.parse(wanted.target),
        sizes=None if wanted.batches is None else parse_sizes(wanted.batches),
        seeds=wanted.seeds,
        most_samples=wanted.max_samples,
        budget_s=wanted.budget,
        plan=wanted.plan,
        where=running.on,
        jobs=running.jobs,
        device=running.device,
        precision=running.precision,
        threads=running.threads,
        out=running.out,
        fresh=running.fresh,
    )


def answer_sweep(result: "SweepResult", *, as_json: bool) -> None:
    """Write a sweep's result to stdout, as the text report or as one JSON document."""
    if as_json:
        answer(result.model_dump_json(indent=2))
        return
    from rightbatch.report.sweep import render_sweep_text

    layout = text_layout()
    answer(render_sweep_text(result, width=layout["width"], colour=layout["colour"]))


def exit_code(result: "SweepResult") -> int:
    """Return 0 when a size reached the target and the sweep came to its end, else 5."""
    return ANSWERED if result.status == "ok" else INCONCLUSIVE


def _keep_report(result: "SweepResult", path: Path, *, quiet: bool) -> None:
    """Write the HTML report; when that fails the answer still stands, so it is only said."""
    from rightbatch.records.sweep_folder import SweepFolder
    from rightbatch.report.sweep import render_sweep_html

    try:
        report = SweepFolder(path).write_report(render_sweep_html(result))
    except RunFolderError as error:
        say(f"rightbatch: the report was not written: {error}")
        return
    if not quiet:
        say(f"sweep folder: {shown_path(path)}\nreport: {shown_path(report)}")
