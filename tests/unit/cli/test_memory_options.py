"""The memory command's own options: GPUs that are not here, and a size that is expected to fit."""

import json
import sys
import types
from pathlib import Path

import pytest

import findings_samples
import rightbatch.probes
from rightbatch.cli import main
from rightbatch.cli.measure import judge_expectation
from rightbatch.records.estimates import GpuCeiling, MemoryForecast
from rightbatch.records.measurements import AllocationKind, AllocationTable, MemoryTrace
from rightbatch.report.forecast_text import render_forecast
from rightbatch.units import GIB, MIB

WORKLOAD = "train.py:workload"

TRAIN = """
import torch
import rightbatch as rb

def workload():
    data = torch.utils.data.TensorDataset(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
    return rb.Workload(model=lambda: torch.nn.Linear(3, 2), train=data, loss=torch.nn.functional.cross_entropy)
"""

TRACE = MemoryTrace(
    batch_sizes=(2, 3, 5, 7),
    recorded_on="cpu",
    event_count=1,
    moments=(),
    consistent=True,
    allocations=AllocationTable(
        fixed_bytes=(0,),
        per_sample_bytes=(100 * MIB,),
        per_sample_squared_bytes=(0,),
        rounding_bytes=(1,),
        death=(-1,),
        kind=(AllocationKind.INPUT,),
        module=(0,),
        operation=(0,),
        modules=("",),
        operations=("held",),
    ),
)


def ceiling(gpu: str, smooth: int | None, hard: int | None = None, low: int | None = None, high: int | None = None) -> GpuCeiling:
    return GpuCeiling(
        gpu=gpu,
        total_bytes=16 * GIB,
        available_bytes=15 * GIB,
        smooth_ceiling=smooth,
        hard_ceiling=hard or smooth,
        low=low or smooth,
        high=high or smooth,
        peak_reserved_bytes=14 * GIB,
    )


def forecast_of(*ceilings: GpuCeiling) -> MemoryForecast:
    return MemoryForecast(
        recorded_on="cpu" if ceilings else "none",
        consistent=True,
        ceilings=ceilings,
        bytes_at_one=100 * MIB,
        peak_module="conv1",
        peak_operation="aten.convolution",
        remarks=("Forecast, not measured.",),
    )


@pytest.fixture
def forecaster(tuner, monkeypatch):
    """A tuner whose forecast is ``found``; remembers what it was asked."""
    fake = types.SimpleNamespace(found=forecast_of(ceiling("t4", 100, 120, 90, 110), ceiling("h100", 800, 900, 700, 850)))

    def forecast_memory(source, request, gpus, progress):
        fake.source, fake.request, fake.gpus = source, request, gpus
        progress.update("memory forecast", 0.5, "recording")
        return fake.found

    module = types.ModuleType("rightbatch.tuner.forecast")
    module.forecast_memory = forecast_memory
    monkeypatch.setitem(sys.modules, "rightbatch.tuner.forecast", module)
    return fake


def test_table_is_on_stdout_and_progress_on_stderr(forecaster, capsys) -> None:
    assert main(["memory", WORKLOAD, "--gpu", "t4,h100"]) == 0
    out, err = capsys.readouterr()

    assert out.splitlines()[:3] == [
        "GPU     memory  smooth ceiling    range  hard ceiling  reserved",
        "t4    16.0 GiB             100   90-110           120  14.0 GiB",
        "h100  16.0 GiB             800  700-850           900  14.0 GiB",
    ]
    assert "One sample reserves 100 MiB. The peak is in conv1 (aten.convolution)." in out
    assert "- Forecast, not measured." in out
    assert "recording" in err


def test_names_and_sizes_become_gpus_once_each(forecaster) -> None:
    assert main(["memory", WORKLOAD, "--gpu", "t4, A100 40GB,24GiB,t4", "--precision", "bf16", "--max-batch", "512"]) == 0

    assert [gpu.name for gpu in forecaster.gpus] == ["t4", "a100-40gb", "24GiB"]
    assert (forecaster.request.precision, forecaster.request.max_batch) == ("bf16", 512)


def test_json_is_one_document(forecaster, capsys) -> None:
    assert main(["memory", WORKLOAD, "--gpu", "t4", "--json"]) == 0

    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "forecast": forecaster.found.model_dump(mode="json")}


@pytest.mark.parametrize(("expected", "code"), [(90, 0), (100, 0), (101, 1), (801, 1)])
def test_expected_size_must_fit_on_every_gpu(forecaster, capsys, expected, code) -> None:
    assert main(["memory", WORKLOAD, "--gpu", "t4,h100", "--expect", str(expected), "--json"]) == code
    document = json.loads(capsys.readouterr().out)

    assert (document["expected"], document["holds"]) == (expected, code == 0)


def test_gpu_that_falls_short_is_named_with_its_ceiling(forecaster, capsys) -> None:
    assert main(["memory", WORKLOAD, "--gpu", "t4,h100", "--expect", "110"]) == 1
    out = " ".join(capsys.readouterr().out.split())

    assert (
        "t4 falls short: 110 samples exceed its smooth ceiling of 100, range 90 to 110 (it may fit with retries, at a loss of speed)."
        in out
    )
    assert "h100 falls short" not in out


def test_size_within_the_range_is_called_uncertain(forecaster, capsys) -> None:
    assert main(["memory", WORKLOAD, "--gpu", "t4,h100", "--expect", "95"]) == 0
    out = " ".join(capsys.readouterr().out.split())

    assert "95 samples should fit on t4 and h100. 95 is within the range of the forecast for t4 (90 to 110): try it there" in out


def test_nothing_fits_anywhere_is_exit_code_4(forecaster) -> None:
    forecaster.found = forecast_of(ceiling("t4", None), ceiling("h100", None))
    assert main(["memory", WORKLOAD, "--gpu", "t4,h100"]) == 4
    forecaster.found = forecast_of(ceiling("t4", None), ceiling("h100", 3))
    assert main(["memory", WORKLOAD, "--gpu", "t4,h100"]) == 0


def test_no_recording_is_inconclusive_and_says_why(forecaster, capsys) -> None:
    forecaster.found = forecast_of().model_copy(update={"remarks": ("The model cannot be recorded.",)})

    assert main(["memory", WORKLOAD, "--gpu", "t4", "--expect", "8"]) == 5
    assert capsys.readouterr().out == "- The model cannot be recorded.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "gtx9"], "got 'gtx9'; use a size such as 24GiB or one of t4,"),
        (["--gpu", "t4,,h100"], "names of GPUs separated by single commas are needed"),
        (["--gpu", "t4", "--certify"], "--certify runs on the device that is here"),
        (["--gpu", "t4", "--limit", "8GiB"], "give the size itself, such as --gpu 24GiB"),
        (["--gpu", "t4", "--expect", "64", "--max-batch", "32"], "--expect must not exceed --max-batch"),
        (["--expect", "64", "--max-batch", "32"], "got 64 and 32"),
        (["--expect", "0"], "Must be >= 1"),
    ],
)
def test_contradictions_are_usage_errors(forecaster, capsys, words, message) -> None:
    assert main(["memory", WORKLOAD, *words]) == 2
    assert message in capsys.readouterr().err


def test_only_the_memory_command_knows_these_options(forecaster) -> None:
    assert main(["find", WORKLOAD, "--gpu", "t4"]) == 2
    assert main(["speed", WORKLOAD, "--expect", "8"]) == 2


def test_help_after_the_dashes_is_the_functions_own(forecaster, capsys) -> None:
    assert main(["memory", WORKLOAD, "--gpu", "t4", "--", "--help"]) == 0
    assert "--width" in capsys.readouterr().out


def test_proof_and_allocator_become_the_request(tuner) -> None:
    assert main(["memory", WORKLOAD, "--certify", "--malloc", "tight"]) == 0
    assert (tuner.request.certify, tuner.request.malloc) == (True, "tight")
    assert main(["memory", WORKLOAD]) == 0
    assert (tuner.request.certify, tuner.request.malloc) == (False, "default")


def test_help_explains_the_options(capsys) -> None:
    assert main(["memory", "--help"]) == 0
    out = capsys.readouterr().out

    assert "--empty-gpu" not in out
    assert all(option in out for option in ("--gpu", "--expect", "--certify", "--malloc"))


def test_measured_ceiling_is_held_against_the_expected_size(tuner, capsys) -> None:
    ran = tuner.findings.memory.ceiling

    assert main(["memory", WORKLOAD, "--expect", str(ran)]) == 0
    assert f"{ran} samples fit: {ran} ran within the limit." in capsys.readouterr().out
    assert main(["memory", WORKLOAD, "--expect", str(ran + 1), "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["expected"], document["holds"]) == (ran + 1, False)
    assert document["memory"]["ceiling"] == ran
    assert f"rightbatch: {ran + 1} samples were expected to fit" in err


@pytest.mark.parametrize(
    ("stopped_by", "source", "code", "words"),
    [
        ("limit", "dataset", 1, "the largest size that ran within"),
        ("failure", "dataset", 1, "the largest size that ran within"),
        ("budget", "dataset", 5, "the time budget ended the search at 64; give a larger --budget"),
        ("cap", "dataset", 1, "the dataset holds no more than 64"),
        ("cap", "--max-batch", 1, "--max-batch allows no more than 64"),
    ],
)
def test_what_stopped_the_search_decides_what_is_said(stopped_by, source, code, words) -> None:
    memory = findings_samples.good().memory.model_copy(
        update={"ceiling": 64, "stopped_by": stopped_by, "largest_allowed": 64, "largest_allowed_source": source}
    )
    judged, sentence = judge_expectation(memory, 65)

    assert judged == code
    assert words in sentence


def test_without_any_size_that_ran_the_expectation_fails() -> None:
    assert judge_expectation(None, 1)[0] == 1


def test_table_keeps_to_80_columns_and_to_plain_characters() -> None:
    wide = forecast_of(ceiling("rtx6000-ada", 1234567, 1345678, 1123456, 1456789), ceiling("x\x1b[31m", 12345678, 2**40, 10**7, 2**40))
    lines = render_forecast(wide, width=80).splitlines()

    assert max(len(line) for line in lines) <= 81  # 2**40, the end of all searches, takes 13 digits
    assert max(len(line) for line in lines[:2]) <= 80
    assert "\x1b" not in "".join(lines)


def test_workload_is_recorded_once_for_all_gpus(tuner, monkeypatch, capsys) -> None:
    calls = []

    def record(rig):
        calls.append((rig.device.type, rig.workload.precision, rig.train_size))
        return TRACE

    module = types.ModuleType("rightbatch.probes.absent_device")
    module.record = record
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(rightbatch.probes, "absent_device", module, raising=False)
    Path("train.py").write_text(TRAIN)

    words = ["--gpu", "t4,10GiB", "--isolation", "in-process", "--precision", "bf16", "--expect", "95", "--json"]
    assert main(["memory", WORKLOAD, *words]) == 0
    document = json.loads(capsys.readouterr().out)

    assert calls == [("cpu", "bf16", 8)]
    # 14.56 GiB less 450 MiB and two workspaces of 8.125 MiB leave 14442 MiB; 10 GiB leave 9773 MiB.
    assert [found["smooth_ceiling"] for found in document["forecast"]["ceilings"]] == [144, 97]
    assert document["holds"] is True
