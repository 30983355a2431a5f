"""The run folder: what is written is read back, and what cannot be trusted is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import findings_samples
from rightbatch.errors import RunFolderBusyError, RunFolderError
from rightbatch.records import document as document_module
from rightbatch.records.document import upgrade
from rightbatch.records.measurements import LoaderMeasurements, LoaderPoint, WorkloadSummary
from rightbatch.records.run import PART_KINDS, RunFolder, RunManifest, schema

LOADER = LoaderMeasurements(points=(LoaderPoint(num_workers=0, batch_size=8, samples_per_s=(100.0, 110.5)),), configured_num_workers=None)


def manifest(state: str = "complete") -> RunManifest:
    return RunManifest(
        rightbatch_version="0.1.0",
        created_at="2026-01-02T03:04:05+00:00",
        updated_at="2026-01-02T03:05:05+00:00",
        command=("rightbatch", "find", "train.py:workload"),
        workload_spec="train.py:workload",
        workload_arguments=("--width", "3"),
        environment=findings_samples.environment(),
        code_files=(("train.py", "00"),),
        state=state,
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.create(tmp_path / "runs" / "one")
    made.write_manifest(manifest())
    made.write_part("workload", findings_samples.workload(), fingerprint="w", measured_at="2026-01-02T03:04:05+00:00")
    made.write_part("loader", LOADER, fingerprint="l", measured_at="2026-01-02T03:04:06+00:00")
    made.write_findings(findings_samples.good())
    return made


def test_everything_written_is_read_back(folder: RunFolder) -> None:
    again = RunFolder.open(folder.path)
    assert again.read_manifest() == manifest()
    assert again.read_findings() == findings_samples.good()
    stored = again.read_part("loader", LoaderMeasurements)
    assert (stored.record, stored.fingerprint, stored.measured_at) == (LOADER, "l", "2026-01-02T03:04:06+00:00")


def test_what_was_not_measured_is_none(folder: RunFolder) -> None:
    assert folder.read_part("memory", PART_KINDS["memory"]) is None
    measurements = folder.read_measurements()
    assert measurements.loader == LOADER
    assert measurements.memory is None


def test_new_folder_is_empty_and_says_none(tmp_path: Path) -> None:
    made = RunFolder.create(tmp_path / "new")
    assert made.read_manifest() is None
    assert made.read_findings() is None
    assert made.read_measurements() is None
    assert made.oldest_measured_at() is None
    assert list(made.path.iterdir()) == []


def test_oldest_measurement_is_the_age_and_the_summary_does_not_count(folder: RunFolder) -> None:
    assert folder.oldest_measured_at() == "2026-01-02T03:04:06+00:00"


def test_folder_of_an_earlier_run_is_taken_over(folder: RunFolder) -> None:
    assert RunFolder.create(folder.path).read_manifest() == manifest()


def test_stale_parts_go_with_the_verdict_that_rested_on_them(folder: RunFolder) -> None:
    folder.keep_only(("workload", "loader"))
    assert folder.read_findings() is not None
    folder.keep_only(("workload",))
    assert folder.read_part("loader", LoaderMeasurements) is None
    assert folder.read_part("workload", WorkloadSummary) is not None
    assert folder.read_findings() is None


def test_report_is_written_beside_the_records(folder: RunFolder) -> None:
    file = folder.write_report("<!doctype html>")
    assert file == folder.path / "report.html"
    assert file.read_text() == "<!doctype html>"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"schema_version": 1, "part": "loa', r"Unterminated string"),
        ("", r"Expecting value"),
        ("[1, 2]", r"it holds a list, not an object"),
        ('{"part": "loader"}', r"schema_version must be a positive integer; got None"),
        ('{"schema_version": true}', r"schema_version must be a positive integer; got True"),
        ('{"schema_version": 1, "part": "memory", "fingerprint": "", "measured_at": "", "data": {}}', r"it holds the part 'memory'"),
        ('{"schema_version": 1, "part": "loader", "fingerprint": "", "measured_at": ""}', r"the document: "),
        ('{"schema_version": 1, "part": "loader", "measured_at": "", "data": {}}', r"fingerprint: Field required"),
        ("[" * 100_000, r"recursion"),
    ],
)
def test_corrupt_part_is_refused_by_its_file_and_the_reason(folder: RunFolder, content: str, reason: str) -> None:
    (folder.path / "loader.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"loader\.json is not a rightbatch record: .*" + reason) as caught:
        folder.read_part("loader", LoaderMeasurements)
    assert str(caught.value).endswith("delete the folder or pass --fresh / another --out.")


def edit(folder: RunFolder, name: str, change: dict) -> None:
    file = folder.path / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    ("samples_per_s", "reason"),
    [
        (["100", 110.5], r"points\.0\.samples_per_s\.0: Input should be a valid number"),
        ([float("nan")], r"NaN is not a number that a record can hold"),
        ([float("inf")], r"Infinity is not a number that a record can hold"),
        ([-1.0], r"points\.0\.samples_per_s\.0: Input should be greater than 0"),
    ],
)
def test_wrong_types_and_numbers_are_refused_by_their_place(folder: RunFolder, samples_per_s: list, reason: str) -> None:
    point = {"num_workers": 0, "batch_size": 8, "samples_per_s": samples_per_s}
    edit(folder, "loader.json", {"data": {"points": [point], "configured_num_workers": None}})
    with pytest.raises(RunFolderError, match=reason):
        folder.read_part("loader", LoaderMeasurements)


def test_bytes_that_are_no_text_are_refused(folder: RunFolder) -> None:
    (folder.path / "findings.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunFolderError, match=r"findings\.json is not a rightbatch record: it is not UTF-8 text"):
        folder.read_findings()


def test_pickle_in_place_of_a_record_is_not_run(folder: RunFolder, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb"
    (folder.path / "loader.json").write_bytes(f"cos\nsystem\n(S'touch {bomb}'\ntR.".encode())
    with pytest.raises(RunFolderError, match="is not a rightbatch record"):
        folder.read_part("loader", LoaderMeasurements)
    assert not bomb.exists()


def test_newer_version_is_refused_even_when_measuring_afresh(folder: RunFolder) -> None:
    edit(folder, "run.json", {"schema_version": 99})
    expected = r"run\.json has schema version 99; this rightbatch reads up to 1; update rightbatch"
    with pytest.raises(RunFolderError, match=expected):
        RunFolder.open(folder.path)
    with pytest.raises(RunFolderError, match=expected):
        RunFolder.create(folder.path, fresh=True)


def test_manifest_of_another_program_is_refused(folder: RunFolder) -> None:
    edit(folder, "run.json", {"written_by": "other"})
    for take in (RunFolder.open, RunFolder.create, lambda path: RunFolder.create(path, fresh=True)):
        with pytest.raises(RunFolderError, match=r"run\.json was not written by rightbatch"):
            take(folder.path)


def test_corrupt_manifest_yields_only_to_fresh_measuring(folder: RunFolder) -> None:
    (folder.path / "run.json").write_text('{"schema_version": 1, "wri')
    with pytest.raises(RunFolderError, match=r"run\.json is not a rightbatch record"):
        RunFolder.create(folder.path)
    assert RunFolder.create(folder.path, fresh=True).path == folder.path
    (folder.path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"must be empty or a run's; .* holds thesis\.tex; pass another --out"):
        RunFolder.create(folder.path, fresh=True)


def test_folder_of_someone_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).touch()
    with pytest.raises(RunFolderError, match=r"must be empty or a run's; .* holds a\.txt, b\.txt, c\.txt, \.\.\.; pass another --out"):
        RunFolder.create(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(RunFolderError, match=r"is not a run folder: it holds no run\.json"):
        RunFolder.open(tmp_path)


def test_folder_that_an_interrupted_start_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.0a1b2c3d.tmp").touch()
    assert RunFolder.create(tmp_path).read_manifest() is None


def test_missing_folder_and_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no run folder .*nowhere"):
        RunFolder.open(tmp_path / "nowhere")
    file = tmp_path / "run.json"
    file.write_text("{}")
    with pytest.raises(RunFolderError, match=r"a run is a folder; .*run\.json is a file"):
        RunFolder.open(file)
    with pytest.raises(RunFolderError, match=r"the run folder must be a folder; .*run\.json is a file"):
        RunFolder.create(file)


def test_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # root may write anywhere but not below a file
    with pytest.raises(
        RunFolderError, match=r"cannot make .*file/below: Not a directory; make room or set permissions, or pass another --out"
    ):
        RunFolder.create(tmp_path / "file" / "below")


def test_folder_without_permission_to_write_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RunFolderError, match=r"cannot write into the run folder .*: permission denied"):
        RunFolder.create(tmp_path / "closed")


def test_crash_before_the_rename_leaves_the_old_file_whole(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(entry.name for entry in folder.path.iterdir())

    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.write_manifest(manifest("interrupted"))
    assert folder.read_manifest() == manifest("complete")
    assert sorted(entry.name for entry in folder.path.iterdir()) == before


def test_full_disk_leaves_the_old_file_whole_and_is_said(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"cannot write .*loader\.json: No space left on device; make room"):
        folder.write_part("loader", LOADER, fingerprint="new", measured_at="2027-01-01T00:00:00+00:00")
    assert folder.read_part("loader", LoaderMeasurements).fingerprint == "l"


def test_written_files_follow_the_users_umask(folder: RunFolder) -> None:
    before = os.umask(0o027)
    try:
        folder.write_manifest(manifest())
    finally:
        os.umask(before)
    assert (folder.path / "run.json").stat().st_mode & 0o777 == 0o640


def test_folder_that_another_process_uses_is_busy(folder: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from rightbatch.records.run import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunFolderBusyError, match=r"another process is using the run folder .*; wait for it to end"), folder.lock():
            pass
        other.stdin.close()
        other.wait(60)
    with folder.lock():
        assert (folder.path / ".lock").exists()


def test_lock_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot lock .*file"), RunFolder(tmp_path / "file").lock():
        pass


def test_old_documents_are_upgraded_one_version_at_a_time() -> None:
    steps = {
        1: lambda file, document: {"file": file, "value_s": document["value_ms"] / 1000},
        2: lambda file, document: document | {"unit": "s"},
    }
    upgraded = upgrade("runs/one/loader.json", {"schema_version": 1, "value_ms": 2500}, upgrades=steps, current=3)
    assert upgraded == {"schema_version": 3, "file": "loader.json", "value_s": 2.5, "unit": "s"}


def test_version_without_an_upgrade_is_refused() -> None:
    with pytest.raises(RunFolderError, match="has schema version 1, which this rightbatch can no longer read"):
        upgrade("loader.json", {"schema_version": 1}, upgrades={2: lambda file, document: document}, current=3)


def test_reading_a_folder_upgrades_it(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder, "run.json", {"schema_version": 1, "workload_spec": "old"})
    steps = {1: lambda file, document: document | {"workload_spec": f"{document['workload_spec']} in {file}"}}
    monkeypatch.setattr(document_module, "UPGRADES", steps)
    monkeypatch.setattr(document_module, "SCHEMA_VERSION", 2)
    upgraded = RunFolder.open(folder.path).read_manifest()
    assert (upgraded.schema_version, upgraded.workload_spec) == (2, "old in run.json")


def test_schema_covers_every_file_and_resolves() -> None:
    whole = schema()
    assert set(whole["properties"]) == {
        *("run.json", "findings.json", "training.json", "log.jsonl", "train --json", "sweep.json", "result.json"),
        *(f"{name}.json" for name in PART_KINDS),
    }
    text = json.dumps(whole)
    for reference in set(text.split('"#/$defs/')[1:]):
        assert reference.split('"')[0] in whole["$defs"]
    assert set(whole["$defs"]["PartFields"]["properties"]) == {"schema_version", "part", "fingerprint", "measured_at"}
    assert "description" in whole["$defs"]["LoaderPoint"]["properties"]["samples_per_s"]


def test_run_folder_is_read_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rightbatch.records.run as run; run.schema(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'rightbatch.records.plan'" in loaded
    assert "'scipy'" not in loaded
