"""The memory command with ``--gpu``: forecast the ceiling on GPUs that need not be here."""

import json
from typing import TYPE_CHECKING

from rightbatch.cli.measure import ANSWERED, CHECK_FAILED, INCONCLUSIVE, NOTHING_FITS, answered_help, build_request, check_expectation
from rightbatch.cli.options import FindOptions, MeasureOptions, MemoryOptions, OutputOptions
from rightbatch.cli.output import answer, say, stdout_reserved, text_layout
from rightbatch.cli.progress import show_progress
from rightbatch.errors import UsageError

if TYPE_CHECKING:
    from rightbatch.records.estimates import MemoryForecast
    from rightbatch.workload.source import WorkloadSource


def forecast(
    source: "WorkloadSource", names: tuple[str, ...], wanted: MemoryOptions, measuring: MeasureOptions, output: OutputOptions
) -> int:
    """Forecast the ceiling on every GPU, print it, and return the exit code.

    Args:
        source: The workload.
        names: Names of GPUs, or sizes.
        wanted: What to find out, and the size that is expected to fit.
        measuring: How to record; what only concerns measuring is refused where it would be ignored.
        output: How to print.

    Raises:
        UsageError: A name is unknown, or an option contradicts ``--gpu``.
        RightbatchError: Whatever the tuner could not do.
    """
    source.check()
    if answered_help(source):
        return ANSWERED
    _check_options(wanted, measuring)
    from rightbatch.fits.gpus import find_gpu

    gpus = tuple(find_gpu(name) for name in dict.fromkeys(names))
    request = build_request("memory", measuring, FindOptions(), wanted)
    from rightbatch.tuner.forecast import forecast_memory

    with stdout_reserved(), show_progress(quiet=output.quiet) as progress:
        found = forecast_memory(source, request, gpus, progress)
    _answer(found, wanted.expect, as_json=output.json)
    return exit_code(found, wanted.expect)


def exit_code(found: "MemoryForecast", expected: int | None) -> int:
    """Return 5 without a forecast, 1 when the expected size does not fit everywhere, 4 when nothing fits anywhere, else 0."""
    from rightbatch.report.forecast_text import holds

    if not found.ceilings:
        return INCONCLUSIVE
    if expected is not None:
        return ANSWERED if holds(found, expected) else CHECK_FAILED
    return NOTHING_FITS if all(ceiling.hard_ceiling is None for ceiling in found.ceilings) else ANSWERED


def _check_options(wanted: MemoryOptions, measuring: MeasureOptions) -> None:
    check_expectation(wanted.expect, measuring.max_batch)
    if wanted.certify:
        raise UsageError("--certify runs on the device that is here; with --gpu nothing is run there; leave one of them out.")
    if measuring.limit is not None:
        raise UsageError("--limit is for the device that is here; with --gpu give the size itself, such as --gpu 24GiB.")


def _answer(found: "MemoryForecast", expected: int | None, *, as_json: bool) -> None:
    from rightbatch.report.forecast_text import expectation, holds, render_forecast

    if not as_json:
        answer(render_forecast(found, width=text_layout()["width"], expected=expected))
        return
    from rightbatch.records.record import SCHEMA_VERSION

    document: dict[str, object] = {"schema_version": SCHEMA_VERSION, "forecast": found.model_dump(mode="json")}
    if expected is not None and found.ceilings:
        document |= {"expected": expected, "holds": holds(found, expected)}
        for sentence in expectation(found, expected):
            say(f"rightbatch: {sentence}")
    answer(json.dumps(document, indent=2))
