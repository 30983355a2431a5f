"""What an earlier `find` says of the same workload: the plan that the sweep judges, step times, noise scale, memory ceiling."""

from collections.abc import Iterator
from pathlib import Path

from rightbatch.errors import RunFolderError
from rightbatch.records.folder import RUNS_FOLDER
from rightbatch.records.plan import Findings
from rightbatch.records.run import MANIFEST_FILE, RunFolder
from rightbatch.workload.source import Source


def known_findings(plan: Path | None, source: Source) -> Findings | None:
    """Return the findings of a run, or of the latest run of the same code below ``rightbatch-runs``; none where there is none.

    Args:
        plan: A run folder; none looks for one.
        source: Where the workload comes from.

    Raises:
        RunFolderError: The run that was named cannot be read, or holds no verdict.
    """
    if plan is not None:
        findings = RunFolder.open(plan).read_findings()
        if findings is None:
            raise RunFolderError(f"{plan} holds no verdict yet; run `rightbatch find` to its end, or leave out --plan.")
        return findings
    found = sorted(_runs_of(source), key=lambda pair: pair[0])
    return found[-1][1] if found else None


def _runs_of(source: Source) -> Iterator[tuple[str, Findings]]:
    """Runs of the workload that can be read, with the time of their last change; what cannot be read is somebody else's concern."""
    if not RUNS_FOLDER.is_dir():
        return
    for path in RUNS_FOLDER.iterdir():
        if not (path / MANIFEST_FILE).is_file():
            continue
        try:
            folder = RunFolder.open(path)
            manifest, findings = folder.read_manifest(), folder.read_findings()
        except RunFolderError:
            continue
        if manifest is None or findings is None or findings.recommendation.plan is None:
            continue
        if (manifest.workload_spec, manifest.workload_arguments) != (source.spec, source.arguments) or not manifest.code_files:
            continue
        if source.code_is_unchanged(manifest.code_files):
            yield manifest.updated_at, findings
