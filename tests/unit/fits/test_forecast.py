"""What is taken off a GPU's memory, what is added to a step, and what the forecast says about itself."""

import pytest

from rightbatch.errors import UsageError
from rightbatch.fits.caching_allocator import Recording, hard_ceiling, smooth_ceiling
from rightbatch.fits.forecast import forecast, with_workspaces
from rightbatch.fits.gpus import GPUS, Gpu, find_gpu
from rightbatch.records.measurements import AllocationKind, AllocationTable, LiveMoment, MemoryTrace
from rightbatch.units import GIB, MIB

KEPT = -1
OPERATIONS = ("aten.relu", "aten.convolution")
RELU, CONVOLUTION = 0, 1


def table(*rows: tuple[int, int, int, int]) -> AllocationTable:
    """Rows of (fixed bytes, bytes per sample, death, operation)."""
    count = len(rows)
    return AllocationTable(
        fixed_bytes=tuple(row[0] for row in rows),
        per_sample_bytes=tuple(row[1] for row in rows),
        per_sample_squared_bytes=(0,) * count,
        rounding_bytes=(1,) * count,
        death=tuple(row[2] for row in rows),
        kind=(AllocationKind.ACTIVATION,) * count,
        module=(0,) * count,
        operation=tuple(row[3] for row in rows),
        modules=("layer",),
        operations=OPERATIONS[: 1 + max(row[3] for row in rows)],
    )


CNN = table((100 * MIB, 0, KEPT, RELU), (0, 20 * MIB, 3, CONVOLUTION), (0, 10 * MIB, 4, RELU), (0, 12 * MIB, KEPT, CONVOLUTION))
PLAIN = table((100 * MIB, 0, KEPT, RELU), (0, 20 * MIB, KEPT, RELU))


def trace(allocations: AllocationTable | None = CNN, **fields: object) -> MemoryTrace:
    given = {
        "batch_sizes": (2, 3, 5),
        "recorded_on": "cpu",
        "event_count": 4,
        "moments": (LiveMoment(fixed_bytes=1, per_sample_bytes=2, module="layer", operation="aten.convolution"),),
        "consistent": True,
        "allocations": allocations,
    }
    return MemoryTrace.model_validate(given | fields)


# --- GPUs


@pytest.mark.parametrize("spelling", ["a100-40gb", "A100 40GB", "nvidia-a100_40gb", "a10040gb"])
def test_names_are_found_however_they_are_spaced(spelling) -> None:
    assert find_gpu(spelling).name == "a100-40gb"


@pytest.mark.parametrize(
    ("spelling", "name"), [("4090", "rtx4090"), ("GeForce RTX 3090", "rtx3090"), ("Tesla T4", "t4"), ("rtx a6000", "a6000")]
)
def test_makers_words_may_be_left_out_or_added(spelling, name) -> None:
    assert find_gpu(spelling).name == name


def test_every_name_finds_itself() -> None:
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)


def test_size_is_a_gpu_of_that_memory() -> None:
    assert find_gpu("24GiB") == Gpu(name="24GiB", total_bytes=24 * GIB)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"got 'a100'; use a size such as 24GiB or one of t4, .*a100-40gb, a100-80gb"):
        find_gpu("a100")


def test_number_without_a_unit_is_no_size() -> None:
    with pytest.raises(UsageError, match=r"memory of 1 GiB at least; got '24', 24 B"):
        find_gpu("24")


def test_driver_reports_less_than_the_data_sheet() -> None:
    sheet_gib = {"t4": 16, "v100-16gb": 16, "v100-32gb": 32, "a100-40gb": 40, "a100-80gb": 80, "h100": 80, "h200": 141, "b200": 192}
    for name, gib in sheet_gib.items():
        assert 0.9 * gib < find_gpu(name).total_bytes / GIB < gib


def test_more_context_leaves_less() -> None:
    gpu = find_gpu("t4")

    assert gpu.least_available_bytes < gpu.available_bytes < gpu.largest_available_bytes < gpu.total_bytes


# --- scratch memory


def test_scratch_follows_every_convolution_and_is_gone_before_the_next_allocation() -> None:
    made = with_workspaces(CNN, 2)

    assert made.per_sample_bytes == (0, 20 * MIB, 40 * MIB, 10 * MIB, 12 * MIB, 24 * MIB)
    assert made.death == (KEPT, 4, 3, 6, KEPT, 6)
    assert made.kind[2] == made.kind[5] == AllocationKind.TEMPORARY
    assert made.per_sample_cubed_bytes == ()
    cubic = CNN.model_copy(update={"per_sample_cubed_bytes": (0, 5, 0, 0)})
    assert with_workspaces(cubic, 2).per_sample_cubed_bytes == (0, 5, 10, 0, 0, 0)


def test_no_scratch_leaves_the_step_as_it_was() -> None:
    assert with_workspaces(CNN, 0) is CNN
    assert with_workspaces(PLAIN, 2) is PLAIN


def test_what_is_live_without_scratch_stays_as_it_was() -> None:
    bare, made = Recording(CNN), Recording(with_workspaces(CNN, 1))

    # At the second convolution 100 MiB + 12 b and its scratch; the peak is at the first: 100 + 20 b + 20 b.
    assert made.live_bytes(10) == (100 + 20 * 10 + 20 * 10) * MIB
    assert bare.live_bytes(10) == (100 + 20 * 10 + 10 * 10) * MIB


# --- forecasts


def test_ceilings_are_those_of_the_replay_on_what_is_available() -> None:
    gpu = find_gpu("t4")
    found = forecast(trace(PLAIN), [gpu]).ceilings[0]

    assert (found.gpu, found.total_bytes, found.available_bytes) == ("t4", gpu.total_bytes, gpu.available_bytes)
    assert found.smooth_ceiling == smooth_ceiling(PLAIN, gpu.available_bytes)
    assert found.hard_ceiling == hard_ceiling(PLAIN, gpu.available_bytes)
    assert found.peak_reserved_bytes == Recording(PLAIN).at(found.smooth_ceiling).peak_reserved_bytes <= gpu.available_bytes


def test_value_takes_scratch_as_large_as_the_result() -> None:
    gpu = find_gpu("t4")

    assert forecast(trace(), [gpu]).ceilings[0].smooth_ceiling == smooth_ceiling(with_workspaces(CNN, 1), gpu.available_bytes)


def test_range_spans_contexts_and_scratch() -> None:
    gpu = find_gpu("t4")
    found = forecast(trace(), [gpu]).ceilings[0]
    ceilings = [[smooth_ceiling(with_workspaces(CNN, factor), bytes_) for factor in (0, 1, 2)] for bytes_ in
                (gpu.least_available_bytes, gpu.largest_available_bytes)]  # fmt: skip

    assert found.low == pytest.approx(min(ceilings[0]), rel=0.005)
    assert found.high == pytest.approx(max(ceilings[1]), rel=0.005)
    assert found.low < found.smooth_ceiling < found.high


def test_larger_gpus_allow_more() -> None:
    sizes = [ceiling.smooth_ceiling for ceiling in forecast(trace(), [find_gpu(name) for name in ("t4", "l40s", "h200")]).ceilings]

    assert sizes == sorted(set(sizes))


def test_gpu_that_holds_not_even_one_sample_has_no_ceiling() -> None:
    found = forecast(trace(table((30 * GIB, MIB, KEPT, RELU))), [find_gpu("t4"), find_gpu("h100")]).ceilings

    assert (found[0].smooth_ceiling, found[0].hard_ceiling, found[0].low, found[0].high, found[0].peak_reserved_bytes) == (None,) * 4 + (0,)
    assert found[1].smooth_ceiling is not None


def test_cap_from_elsewhere_is_said() -> None:
    found = forecast(trace(), [find_gpu("t4")], largest=16)

    assert found.ceilings[0].smooth_ceiling == 16
    assert "No size above 16 was considered." in found.remarks


def test_dataset_that_is_smaller_than_what_would_fit_is_said_with_the_gpus() -> None:
    gpus = [find_gpu("t4"), find_gpu("h100")]
    smaller, larger = (ceiling.smooth_ceiling for ceiling in forecast(trace(), gpus).ceilings)

    def said(train_size: int | None) -> list[str]:
        return [remark for remark in forecast(trace(), gpus, train_size=train_size).remarks if "training set" in remark]

    words = "The training set holds {} samples, fewer than would fit on {}: no batch can be larger than it."
    assert said(None) == said(larger) == []
    assert said(larger - 1) == [words.format(larger - 1, "h100")]
    assert said(smaller - 1) == [words.format(smaller - 1, "t4, h100")]


def test_forecast_says_that_nothing_was_checked_on_a_gpu() -> None:
    found = forecast(trace(recorded_on="meta"), [find_gpu("t4")])

    assert found.recorded_on == "meta"
    assert "no step of this has been checked on a GPU" in found.remarks[0]
    assert any("450 MiB" in remark and "300 MiB to 700 MiB" in remark for remark in found.remarks)
    assert any("convolution" in remark for remark in found.remarks)


def test_remarks_speak_only_of_what_is_there() -> None:
    remarks = forecast(trace(PLAIN), [find_gpu("t4")]).remarks

    assert not any("convolution" in remark or "disagree" in remark for remark in remarks)


def test_recordings_that_disagree_are_said() -> None:
    found = forecast(trace(consistent=False, remark="aten.nonzero depends on the data."), [find_gpu("t4")])

    assert not found.consistent
    assert "aten.nonzero depends on the data." in found.remarks
    assert any("ceilings are rough" in remark for remark in found.remarks)


def test_expandable_segments_are_spoken_of_where_they_help() -> None:
    # Blocks that grow a little: without expandable segments the old segments cannot serve the new requests.
    growing = table(*((100 * MIB, (20 + index) * MIB, min(index + 2, 6), RELU) for index in range(6)))

    assert any("expandable_segments:True" in remark for remark in forecast(trace(growing), [find_gpu("t4")]).remarks)
    assert not any("expandable_segments:True" in remark for remark in forecast(trace(PLAIN), [find_gpu("t4")]).remarks)


@pytest.mark.parametrize(
    "missing", [trace(None, remark="The model cannot be recorded."), trace(recorded_on="none", remark="The model cannot be recorded.")]
)
def test_without_allocations_there_is_no_ceiling_but_a_reason(missing) -> None:
    found = forecast(missing, [find_gpu("t4")])

    assert (found.recorded_on, found.ceilings, found.remarks) == ("none", (), ("The model cannot be recorded.",))
