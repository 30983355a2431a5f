"""The commands that read a run folder: show and report. They work without torch and without the device."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rightbatch.cli.options import OutputOptions, ReportOptions, ShowOptions
from rightbatch.cli.output import answer, answer_findings
from rightbatch.errors import RunFolderError, UsageError

if TYPE_CHECKING:
    from rightbatch.records.plan import Findings


def show(run: Path | None, showing: ShowOptions, output: OutputOptions) -> int:
    """Print a stored run, judged again; or the schema.

    Raises:
        UsageError: Neither a run nor ``--schema`` was given.
        RunFolderError: The folder cannot be read or holds no measurements.
    """
    if showing.schema:
        from rightbatch.records.run import schema

        answer(json.dumps(schema(), indent=2))
        return 0
    if run is None:
        raise UsageError(
            "show needs a run folder, or --schema; give the folder that `rightbatch find` named, below rightbatch-runs by default."
        )
    answer_findings(judge_again(run, goal=showing.goal), as_json=output.json)
    return 0


def report(runs: tuple[Path, ...], writing: ReportOptions, output: OutputOptions) -> int:
    """Write the HTML report of stored runs and print where each is.

    Raises:
        UsageError: No run was given, or several for one file.
        RunFolderError: A folder cannot be read or written, or holds no measurements.
    """
    if not runs:
        raise UsageError(
            "report needs at least one run folder; give the folder that `rightbatch find` named, below rightbatch-runs by default."
        )
    if writing.output is not None and len(runs) > 1:
        raise UsageError(
            f"--output names one file for one run; got {len(runs)} runs; leave it out to write report.html in each run folder."
        )
    from rightbatch.records.document import write_whole
    from rightbatch.records.record import SCHEMA_VERSION
    from rightbatch.records.run import REPORT_FILE
    from rightbatch.report.html import render_html

    files = tuple(writing.output or run / REPORT_FILE for run in runs)
    for run, file in zip(runs, files, strict=True):
        write_whole(file, render_html(judge_again(run)))
    if output.json:
        answer(json.dumps({"schema_version": SCHEMA_VERSION, "reports": [str(file) for file in files]}, indent=2))
    else:
        answer("\n".join(str(file) for file in files))
    return 0


def judge_again(run: Path, *, goal: str | None = None) -> "Findings":
    """Judge the stored measurements of a run as they were judged then, or by another goal.

    Raises:
        RunFolderError: The folder cannot be read or holds no measurements.
    """
    from rightbatch.recommend import judge
    from rightbatch.records.plan import Goal
    from rightbatch.records.run import RunFolder

    folder = RunFolder.open(run)
    manifest = folder.read_manifest()
    measurements = folder.read_measurements()
    measured_at = folder.oldest_measured_at()
    if manifest is None or manifest.environment is None or measurements is None or measured_at is None:
        raise RunFolderError(f"{run} holds no measurements yet; run the command that made it again, or delete the folder.")
    before = folder.read_findings()
    objective = manifest.objective if goal is None else manifest.objective.model_copy(update={"goal": Goal(goal)})
    return judge(
        measurements,
        environment=manifest.environment,
        objective=objective,
        constraints=manifest.constraints,
        reused_parts=before.reused_parts if before is not None else (),
        measured_at=measured_at,
        duration_s=before.duration_s if before is not None else 0.0,
    )
