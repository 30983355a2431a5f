"""``find`` rests on a finished sweep of the same workload."""

import json

from integration.conftest import QUICK
from planted_sweeps import TARGET, Law, settings_of, summary, sweep
from rightbatch.fits.sweep import fit_sweep
from rightbatch.records.run import RunFolder
from rightbatch.records.sweep import SweepManifest
from rightbatch.records.sweep_folder import SweepFolder


def keep_sweep(project, *, digest=None, sizes=(16, 32, 64)):
    """Leave a finished sweep of ``train.py:workload`` as the driver would have."""
    settings = settings_of(sizes=sizes, first_size=32, target=TARGET)
    trials = sweep(Law(critical=30.0, largest=64), settings)
    folder = SweepFolder.create(project / "rightbatch-runs" / "sweep-train")
    run = RunFolder.open(project / "run").read_manifest()
    files = tuple((path, digest or known) for path, known in run.code_files)
    folder.write_manifest(
        SweepManifest(
            rightbatch_version="0",
            created_at="2026-01-01T00:00:00+00:00",
            updated_at="2026-01-01T00:00:00+00:00",
            workload_spec="train.py:workload",
            code_files=files,
            workload=summary(),
            settings=settings,
            asked="any",
            device="cpu",
            device_name="planted",
            versions=(),
            state="complete",
        )
    )
    folder.write_result(fit_sweep(settings, summary(), trials, is_complete=True, device_name="planted"))


def find(here):
    ended = here("find", "train.py:workload", *QUICK, "--json")
    assert ended.code in {0, 5}, ended.err
    return json.loads(ended.out)


def test_find_judges_again_when_there_is_a_sweep_and_measures_nothing(measured, here) -> None:
    project = measured("find")
    before = find(here)
    keep_sweep(project)

    after = find(here)

    assert before["swept"] is None
    assert before["recommendation"]["evidence_level"] < 3
    assert [probe["global_batch_size"] for probe in after["swept"]["probes"]] == [16, 32, 64]
    assert after["recommendation"]["evidence_level"] == 3
    assert 16 <= after["recommendation"]["plan"]["global_batch_size"] <= 64
    assert after["step_time"] == before["step_time"]
    assert json.loads(here("show", "run", "--json").out)["recommendation"] == after["recommendation"]
    assert "A sweep of this workload trained sizes from 16 to 64" in " ".join(here("show", "run").out.split())
    assert find(here)["recommendation"] == after["recommendation"]


def test_a_sweep_of_other_code_is_left_alone(measured, here) -> None:
    project = measured("find")
    keep_sweep(project, digest="0" * 64)

    assert find(here)["swept"] is None
