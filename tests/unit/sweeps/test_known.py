"""Which earlier run of ``find`` a sweep rests on."""

from pathlib import Path

import pytest

import findings_samples
from rightbatch.records.folder import RUNS_FOLDER
from rightbatch.records.run import RunFolder, RunManifest
from rightbatch.sweeps.known import known_findings
from rightbatch.workload.given import GivenWorkload
from rightbatch.workload.source import WorkloadSource


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create(RUNS_FOLDER / "run")
    folder.write_findings(findings_samples.good())
    return folder


def manifest(spec: str, files: tuple[tuple[str, str], ...]) -> RunManifest:
    return RunManifest(rightbatch_version="0", created_at="2026-01-01T00:00:00+00:00", updated_at="2026-01-01T00:00:00+00:00", command=(),
                       workload_spec=spec, workload_arguments=(), environment=None, code_files=files, state="complete")  # fmt: skip


def test_a_run_of_the_same_code_is_taken_and_one_of_code_that_changed_is_not(folder):
    Path("train.py").write_text("workload = 1\n")
    source = WorkloadSource("train.py:workload")
    folder.write_manifest(manifest(source.spec, source.code_files()))

    assert known_findings(None, source) == findings_samples.good()

    Path("train.py").write_text("workload = 2\n")
    assert known_findings(None, source) is None


def test_a_run_from_python_is_taken_only_where_it_is_named(folder):
    source = GivenWorkload(workload=None)
    folder.write_manifest(manifest(source.spec, ()))

    assert known_findings(None, source) is None
    assert known_findings(folder.path, source) == findings_samples.good()
