"""The commands that read the folder of a run, a training or a sweep: show and report. They work without torch and without the device."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rightbatch.cli.options import OutputOptions, ReportOptions, ShowOptions
from rightbatch.cli.output import answer, answer_findings, text_layout
from rightbatch.errors import RunFolderError, UsageError
from rightbatch.records.folder import RUNS_FOLDER
from rightbatch.records.run import MANIFEST_FILE
from rightbatch.records.sweep_folder import SweepFolder
from rightbatch.records.training_run import TrainingFolder

if TYPE_CHECKING:
    from rightbatch.records.plan import Findings
    from rightbatch.records.sweep import SweepResult
    from rightbatch.records.training_log import LogLine
    from rightbatch.records.training_run import TrainingManifest


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
        raise UsageError(f"show needs a run folder, or --schema; got neither; {_which(RUNS_FOLDER)}.")
    _check_folder(run)
    if TrainingFolder.is_at(run):
        _show_training(run, showing, output)
        return 0
    if SweepFolder.is_at(run):
        _show_sweep(run, showing, output)
        return 0
    answer_findings(judge_again(run, goal=showing.goal), as_json=output.json)
    return 0


def _show_training(run: Path, showing: ShowOptions, output: OutputOptions) -> None:
    if showing.goal is not None:
        raise UsageError(f"--goal judges measurements; got it for {run}, which holds a training; leave it out.")
    from rightbatch.fits.training_result import training_result
    from rightbatch.report.training import render_training_text

    manifest, lines = read_training(run)
    if output.json:
        answer(training_result(manifest, lines).model_dump_json(indent=2))
    else:
        answer(render_training_text(manifest, lines, **text_layout()))


def _show_sweep(run: Path, showing: ShowOptions, output: OutputOptions) -> None:
    if showing.goal is not None:
        raise UsageError(f"--goal judges measurements; got it for {run}, which holds a sweep; leave it out.")
    from rightbatch.cli.sweep import answer_sweep

    answer_sweep(read_sweep(run), as_json=output.json)


def report(runs: tuple[Path, ...], writing: ReportOptions, output: OutputOptions) -> int:
    """Write the HTML report of stored runs and print where each is.

    Raises:
        UsageError: No run was given, or several for one file.
        RunFolderError: A folder cannot be read or written, or holds no measurements.
    """
    if not runs:
        raise UsageError(f"report needs at least one run folder; got none; {_which(RUNS_FOLDER)}.")
    if writing.output is not None and len(runs) > 1:
        raise UsageError(
            f"--output names one file for one run; got {len(runs)} runs; leave it out to write report.html in each run folder."
        )
    from rightbatch.records.document import write_whole
    from rightbatch.records.folder import REPORT_FILE
    from rightbatch.records.record import SCHEMA_VERSION

    for run in runs:
        _check_folder(run)
    files = tuple(writing.output or run / REPORT_FILE for run in runs)
    for run, file in zip(runs, files, strict=True):
        write_whole(file, _page_of(run))
    if output.json:
        answer(json.dumps({"schema_version": SCHEMA_VERSION, "reports": [str(file) for file in files]}, indent=2))
    else:
        answer("\n".join(str(file) for file in files))
    return 0


def _check_folder(run: Path) -> None:
    """Refuse a folder that holds folders of ours but is none, and name the latest of them.

    Raises:
        RunFolderError: It is such a folder.
    """
    if not _is_ours(run) and _ours_below(run):
        raise RunFolderError(f"a run is one folder; {run} holds several; {_which(run)}.")


def _which(folder: Path) -> str:
    """What to give: the latest folder of ours below a folder, or words where there is none."""
    latest = max(_ours_below(folder), key=lambda path: path.stat().st_mtime, default=None)
    return "give the folder that a command named at its end" if latest is None else f"give one of them, such as the latest, {latest}"


def _ours_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _is_ours(path)] if folder.is_dir() else []


def _is_ours(path: Path) -> bool:
    return (path / MANIFEST_FILE).is_file() or TrainingFolder.is_at(path) or SweepFolder.is_at(path)


def _page_of(run: Path) -> str:
    if TrainingFolder.is_at(run):
        from rightbatch.report.training import render_training_html

        return render_training_html(*read_training(run))
    if SweepFolder.is_at(run):
        from rightbatch.report.sweep import render_sweep_html

        return render_sweep_html(read_sweep(run))
    from rightbatch.report.html import render_html

    return render_html(judge_again(run))


def read_training(run: Path) -> "tuple[TrainingManifest, tuple[LogLine, ...]]":
    """Read what a training left: what was asked, and its log.

    Raises:
        RunFolderError: The folder cannot be read, or is no training's.
    """
    folder = TrainingFolder.open(run)
    manifest = folder.read_manifest()
    assert manifest is not None, "open saw the file"  # noqa: S101
    return manifest, folder.read_lines()


def read_sweep(run: Path) -> "SweepResult":
    """Read what a sweep came to.

    Raises:
        RunFolderError: The folder cannot be read, or the sweep has not come to a result.
    """
    folder = SweepFolder.open(run)
    result, manifest = folder.read_result(), folder.read_manifest()
    if result is None:
        command = "" if manifest is None else shlex.join(manifest.command)
        again = f": {command}" if command else "."
        raise RunFolderError(f"the sweep in {run} has not come to a result yet; repeat the command that began it{again}")
    return result


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
