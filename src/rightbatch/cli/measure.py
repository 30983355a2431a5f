"""The commands that measure: find, memory, speed and noise."""

import json
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

from rightbatch.cli.options import FindOptions, MeasureOptions, MemoryOptions, OutputOptions
from rightbatch.cli.output import answer, answer_findings, say, shown_path, stdout_reserved
from rightbatch.cli.progress import show_progress
from rightbatch.errors import RunFolderError, UsageError
from rightbatch.units import format_bytes

if TYPE_CHECKING:
    from rightbatch.records.devices import Interconnect
    from rightbatch.records.estimates import MemoryCurve
    from rightbatch.records.plan import Findings
    from rightbatch.tuner.request import Part, Request
    from rightbatch.workload.source import WorkloadSource

ANSWERED, CHECK_FAILED, NOTHING_FITS, INCONCLUSIVE = 0, 1, 4, 5

PARTS = {
    "find": ("memory", "step_time", "loader", "gradient_noise"),
    "memory": ("memory",),
    "speed": ("memory", "step_time", "loader"),
    "noise": ("memory", "gradient_noise"),
}
"""The parts that each command measures."""


def measure(
    command: str,
    source: "WorkloadSource",
    measuring: MeasureOptions,
    output: OutputOptions,
    wanted: FindOptions,
    *,
    memory: MemoryOptions,
    repeat: tuple[str, ...],
) -> int:
    """Measure, print the answer, write the report, and return the exit code.

    Args:
        command: A key of ``PARTS``.
        source: The workload.
        measuring: How to measure.
        output: How to print.
        wanted: What the answer is for.
        memory: What to find out about memory, and the size that is expected to fit.
        repeat: The command that repeats this one.

    Raises:
        RightbatchError: Whatever the tuner could not do.
    """
    source.check()
    if answered_help(source):
        return ANSWERED
    check_expectation(memory.expect, measuring.max_batch)
    request = build_request(command, measuring, wanted, memory)
    from rightbatch.tuner.find import find

    with stdout_reserved(), show_progress(quiet=output.quiet) as progress:
        found = find(source, request, progress, command=without_fresh(repeat))
    code = exit_code(command, found.findings)
    if memory.expect is None:
        answer_findings(found.findings, as_json=output.json)
    else:
        code = _answer_expectation(found.findings, memory.expect, code, as_json=output.json)
    if found.folder is not None:
        _keep_report(found.findings, found.folder, quiet=output.quiet)
    return code


def without_fresh(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command that goes on with what this one began: ``--fresh`` would measure or train all of it again."""
    end = command.index("--") if "--" in command else len(command)
    return (*(word for word in command[:end] if word != "--fresh"), *command[end:])


def answered_help(source: "WorkloadSource") -> bool:
    """Print the help of the workload's own function if that is what its arguments ask for."""
    if not source.wants_help():
        return False
    with stdout_reserved():
        text = source.help_text()
    answer(text)
    return True


def build_request(command: str, measuring: MeasureOptions, wanted: FindOptions, memory: MemoryOptions) -> "Request":
    """Turn the options into the tuner's request."""
    from rightbatch.records.plan import Constraints, Goal, Objective
    from rightbatch.tuner.request import Part, Request

    return Request(
        parts=frozenset(Part(part) for part in PARTS[command]) | _extra_parts(wanted),
        lr_range_if_untuned=command == "find",
        objective=Objective(goal=Goal(wanted.goal)),
        constraints=Constraints(
            max_global_batch_size=wanted.max_global_batch, world_size=wanted.world_size, interconnect=interconnect(wanted)
        ),
        device=measuring.device,
        precision=measuring.precision,
        max_batch=measuring.max_batch,
        limit_bytes=measuring.limit,
        budget_s=measuring.budget,
        seed=measuring.seed,
        threads=measuring.threads,
        isolation=measuring.isolation,
        out=measuring.out,
        fresh=measuring.fresh,
        certify=memory.certify,
        alternatives=command == "memory",
        malloc=memory.malloc,
    )


def interconnect(wanted: FindOptions) -> "Interconnect | None":
    """Return what gradients are exchanged over, as the options state it; none when they do not.

    Raises:
        UsageError: A latency without a speed.
    """
    from rightbatch.records.devices import Interconnect

    if wanted.link_speed is None:
        if wanted.link_latency is not None:
            raise UsageError("--link-latency needs --link-speed, without which exchanging is free; got the latency alone; add the speed.")
        return None
    return Interconnect(bytes_per_s=wanted.link_speed, latency_s=wanted.link_latency or 0.0)


def _extra_parts(wanted: FindOptions) -> "frozenset[Part]":
    from rightbatch.tuner.request import Part

    asked = {Part.BRANCHES: wanted.verify, Part.LR_RANGE: wanted.lr_range}
    return frozenset(part for part, is_asked in asked.items() if is_asked)


def check_expectation(expected: int | None, max_batch: int | None) -> None:
    """Refuse to look for a size that the search is told to stay below.

    Raises:
        UsageError: ``--expect`` is larger than ``--max-batch``.
    """
    if expected is not None and max_batch is not None and expected > max_batch:
        raise UsageError(f"--expect must not exceed --max-batch, above which no size is tried; got {expected} and {max_batch}; raise it.")


def judge_expectation(memory: "MemoryCurve | None", expected: int) -> tuple[int, str]:
    """Return the exit code for the size that is expected to fit, and the sentence that says why.

    0 when a size as large ran, 5 when the search was stopped before it was settled, 1 when memory or the dataset does not allow it.
    """
    ceiling = memory.ceiling if memory is not None else None
    if memory is None or ceiling is None:
        return CHECK_FAILED, f"{expected} samples were expected to fit: no size ran."
    if expected <= ceiling:
        return ANSWERED, f"{expected} samples fit: {ceiling} ran within the limit."
    if memory.stopped_by == "budget":
        return INCONCLUSIVE, f"{expected} samples were not tried: the time budget ended the search at {ceiling}; give a larger --budget."
    if memory.stopped_by == "cap":
        cap = "the dataset holds no more" if memory.largest_allowed_source == "dataset" else "--max-batch allows no more"
        return CHECK_FAILED, f"{expected} samples were expected to fit: {cap} than {memory.largest_allowed}."
    limit = format_bytes(memory.limit.limit_bytes)
    return CHECK_FAILED, f"{expected} samples were expected to fit: the largest size that ran within {limit} is {ceiling}."


def _answer_expectation(findings: "Findings", expected: int, code: int, *, as_json: bool) -> int:
    """Write the findings with the judgement of the expected size; return the exit code."""
    judged, sentence = judge_expectation(findings.memory, expected)
    if as_json:
        document = findings.model_dump(mode="json") | {"expected": expected, "holds": judged == ANSWERED}
        answer(json.dumps(document, indent=2))
        say(f"rightbatch: {sentence}")
    else:
        answer_findings(findings, as_json=False)
        answer(f"\n{sentence}")
    return code or judged


def exit_code(command: str, findings: "Findings") -> int:
    """Return 0 when the command's question was answered, 4 when nothing fits, 5 when the measurements decide nothing or cannot be trusted.

    ``memory``, ``speed`` and ``noise`` ask for less than a recommendation, so their own part decides.
    """
    from rightbatch.records.estimates import Status

    recommendation = findings.recommendation
    if recommendation.status == "nothing_fits":
        return NOTHING_FITS
    if command == "find":
        return ANSWERED if recommendation.status == "ok" and recommendation.plan is not None else INCONCLUSIVE
    if command == "noise":
        answered: AbstractSet[Status] = {Status.OK, Status.AT_LEAST}
        return ANSWERED if findings.noise_scale is not None and findings.noise_scale.status in answered else INCONCLUSIVE
    part = findings.memory if command == "memory" else findings.step_time
    return INCONCLUSIVE if part is None or part.status in {Status.INDETERMINATE, Status.UNSTABLE} else ANSWERED


def _keep_report(findings: "Findings", path: Path, *, quiet: bool) -> None:
    """Write the HTML report into the run folder; when that fails the answer still stands, so it is only said."""
    from rightbatch.records.run import RunFolder
    from rightbatch.report.html import render_html

    try:
        report = RunFolder(path).write_report(render_html(findings))
    except RunFolderError as error:
        say(f"rightbatch: the report was not written: {error}")
        return
    if not quiet:
        say(f"run folder: {shown_path(path)}\nreport: {shown_path(report)}")
