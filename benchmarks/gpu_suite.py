"""Everything that rightbatch relies on about a CUDA GPU, checked on the one that is here and kept as a record.

Run: python benchmarks/gpu_suite.py --out benchmarks/records/YYYY-MM-DD_device_gpu-suite [--data CIFAR10] [--only NAMES] [--json]
Without a GPU: python benchmarks/gpu_suite.py --device cpu rehearses, at tiny sizes, what makes sense there; its figures say nothing
about a GPU, and a check whose two sides are the same thing on a CPU is run but not judged.

Every check has a share of the budget and is told when to be done; one that raises has failed, and the others still run. The record is
written anew after each. Exit code 0: every check that promises something holds; 1: one does not, raised, or was not reached in time; 2:
there is no such device.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

import gpu_checks_gradients as gradients
import gpu_checks_memory as memory
import gpu_checks_speed as speed
import gpu_checks_tuner as tuner
from gpu_checks_context import CheckResult, Context, context_for
from rightbatch import __version__
from rightbatch.engine.provenance import cpu_name
from rightbatch.engine.rig import resolve_device
from rightbatch.errors import RightbatchError
from rightbatch.records.document import write_whole

HERE = Path(__file__).resolve().parent
BUDGET_S = 450.0
NEEDS_CUDA = "needs cuda"
NOT_RUN = "not run"
NOT_CHECKED = "not checked on a CPU"
HOLDS, FAILED, UNUSABLE = 0, 1, 2
_LEAST_SHARE = 0.25
"""A check is not begun with less than this part of its share left: it would say too little."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check and its part of the budget.

    Attributes:
        name: As ``--only`` takes it, and as its result is called.
        run: The check.
        share: Part of the budget. What the others leave goes to the last check, which takes as long as a compiler does.
        on_cpu: What a rehearsal does with it: judge it as on a GPU; run it only, because a CPU would be compared with itself; or skip it.
        same_on_cpu: What is compared with itself there, where it is only run.
    """

    name: str
    run: Callable[[Context], CheckResult]
    share: float
    on_cpu: Literal["judged", "run", "skipped"] = "judged"
    same_on_cpu: str = ""


_ALLOCATOR = "the allocator that is counted there is the replay itself"

CHECKS = (
    Check(name="trace", run=memory.trace_against_counters, share=0.16),
    Check(name="calibration", run=memory.calibration, share=0.01),
    Check(name="allocator replay", run=memory.replayed_allocator, share=0.02, on_cpu="run", same_on_cpu=_ALLOCATOR),
    Check(name="allocator retries", run=memory.allocator_retries, share=0.03, on_cpu="run", same_on_cpu=_ALLOCATOR),
    Check(name="context", run=memory.context_bytes, share=0.01, on_cpu="skipped"),
    Check(name="out of memory", run=memory.out_of_memory, share=0.06),
    Check(name="gradient noise", run=gradients.noise, share=0.04, on_cpu="run", same_on_cpu="both gradients are the CPU's"),
    Check(name="half precision", run=gradients.half_precision, share=0.02),
    Check(name="clock", run=speed.clock, share=0.02, on_cpu="skipped"),
    Check(name="energy", run=speed.energy, share=0.02, on_cpu="skipped"),
    Check(name="contention", run=tuner.contention, share=0.05, on_cpu="skipped"),
    Check(name="step time", run=speed.step_time_curve, share=0.06),
    Check(name="powers of two", run=speed.powers_of_two, share=0.07),
    Check(name="channels last", run=speed.channels_last, share=0.03),
    Check(name="proven ceiling", run=tuner.proven_ceiling, share=0.18),
    Check(name="find", run=tuner.whole_run, share=0.16),
    Check(name="compile", run=speed.compiled, share=0.06, on_cpu="skipped"),
)
"""In the order in which they run: what much rests on, and is quick, first."""


def run_checks(
    checks: Sequence[Check], context: Context, budget_s: float, say: Callable[[CheckResult], None] = lambda _: None
) -> tuple[CheckResult, ...]:
    """Run checks in order within a budget; return one result each.

    Args:
        checks: What to run.
        context: Given to each, with the time at which it should be done.
        budget_s: Seconds by the context's clock.
        say: Receives every result as it comes.
    """
    end_s = context.clock_s() + budget_s
    results = []
    for check in checks:
        begun_s = context.clock_s()
        share_s = check.share * budget_s
        left_s = end_s - begun_s
        if check.on_cpu == "skipped" and context.device.type != "cuda":
            result = _skipped(check, NEEDS_CUDA)
        elif left_s < _LEAST_SHARE * share_s:
            result = _skipped(check, f"{NOT_RUN}: {max(0.0, left_s):.0f} s of the budget of {budget_s:.0f} s were left")
        else:
            result = _result(check, context.until(end_s if check is checks[-1] else begun_s + min(left_s, share_s)))
        result = replace(result, name=check.name, seconds=round(context.clock_s() - begun_s, 2))
        say(result)
        results.append(result)
    return tuple(results)


def _result(check: Check, context: Context) -> CheckResult:
    try:
        result = check.run(context)
        if check.on_cpu == "judged" or context.device.type == "cuda":
            return result
        return replace(result, holds=None, goal=NOT_CHECKED, detail=f"{NOT_CHECKED}, since {check.same_on_cpu}: {result.detail}")
    except Exception as error:  # noqa: BLE001  # whatever one check meets, the others are to run
        first_line = (str(error).strip().splitlines() or ["without a message"])[0]
        return replace(_skipped(check, f"{type(error).__name__}: {first_line}"), holds=False)


def _skipped(check: Check, reason: str) -> CheckResult:
    return CheckResult(name=check.name, value=None, unit="", goal="", holds=None, detail=reason)


def exit_code(results: Sequence[CheckResult]) -> int:
    """Return 1 when a check failed or was not reached: a record with holes must not pass for a good one."""
    return FAILED if any(result.holds is False or result.detail.startswith(NOT_RUN) for result in results) else HOLDS


def document(results: Sequence[CheckResult], context: Context, words: Sequence[str]) -> dict[str, object]:
    """Return the record of a run: the goals in short, every result in full, and where and how they came about."""
    found = {
        "goals": [{key: getattr(result, key) for key in ("name", "value", "unit", "goal", "holds")} for result in results],
        "results": [asdict(result) for result in results],
        "environment": environment(context, words, sum(result.value is not None for result in results)),
    }
    return json.loads(_public(json.dumps(found), context.data), parse_constant=str)  # JSON knows no NaN


def environment(context: Context, words: Sequence[str], n: int) -> dict[str, object]:
    """Say on what and with what the checks ran; ``n`` counts those that gave a value, their details count repetitions."""
    is_cuda = context.device.type == "cuda"
    properties = torch.cuda.get_device_properties(context.device) if is_cuda else None
    return {
        "device": str(context.device),
        "device_name": properties.name if properties else cpu_name(),
        "rehearsal": not is_cuda,
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "total_bytes": context.counters.capacity(),
        "driver": _driver() if is_cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rightbatch": __version__,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default"),
        "threads": torch.get_num_threads(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/gpu_suite.py", *map(_public_word, words)]),
        "n": n,
    }


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001  # a missing library or driver, each with its own class: the record says so
        return "unknown"


def _public_word(word: str) -> str:
    """Shorten an absolute path on the command line to its name."""
    head, equals, value = word.rpartition("=")
    return f"{head}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def _public(text: str, data: str | None) -> str:
    """Take this machine's folders out of what may be committed."""
    if data is not None and Path(data).is_absolute():
        text = text.replace(data, "PATH")
    for folder in (HERE.parent, Path.cwd(), Path.home()):
        if folder != Path(folder.root):
            text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    return text


def write_record(folder: Path, record: dict[str, object]) -> Path:
    """Write the record whole or not at all; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "record.json"
    write_whole(path, json.dumps(record, indent=2) + "\n")
    return path


def line(result: CheckResult) -> str:
    """Return one result as a line of text."""
    mark = {True: "ok  ", False: "FAIL", None: "-   "}[result.holds]
    goal = "" if result.goal == NOT_CHECKED else f" (goal {result.goal})"
    value = "" if result.value is None else f"{result.value} {result.unit}{goal} · "
    return f"{mark} {result.name} [{result.seconds:.1f} s]: {value}{result.detail}"


def _gaps(results: Sequence[CheckResult]) -> str:
    """Say how many checks were not judged, and why."""
    counts = {words: sum(result.detail.startswith(words) for result in results) for words in (NOT_CHECKED, NEEDS_CUDA, NOT_RUN)}
    return "".join(f"; {count} {words}" for words, count in counts.items() if count)


def chosen(names: str | None) -> tuple[Check, ...]:
    """Return the checks of some names, in the order in which they run.

    Raises:
        ValueError: A name is none of a check.
    """
    if names is None:
        return CHECKS
    wanted = {name.strip().replace("-", " ") for name in names.split(",")}
    unknown = wanted - {check.name for check in CHECKS}
    if unknown:
        raise ValueError(f"--only takes {', '.join(check.name for check in CHECKS)}; got {', '.join(sorted(unknown))}.")
    return tuple(check for check in CHECKS if check.name in wanted)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a rehearsal (%(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="what all checks may take together (%(default)s)")
    parser.add_argument("--data", metavar="PATH", help="CIFAR-10, as examples/cifar10.py takes it; synthetic images without it")
    parser.add_argument("--only", metavar="NAMES", help="checks to run, with commas between them")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write record.json there")
    parser.add_argument("--json", action="store_true", help="print the record instead of text")
    return parser.parse_args(words)


def main(
    words: Sequence[str] | None = None,
    *,
    resolve: Callable[[str], torch.device] = resolve_device,
    context_of: Callable[..., Context] = context_for,
) -> int:
    """Run what the words of a command ask for; return the exit code."""
    options = _options(words)
    words = sys.argv[1:] if words is None else words
    results: list[CheckResult] = []

    def keep() -> None:
        """Write what there is: an interrupted run leaves a record that says which checks it has not come to."""
        if options.out is not None:
            waiting = [_skipped(check, f"{NOT_RUN} yet") for check in checks[len(results) :]]
            write_record(options.out, document([*results, *waiting], context, words))

    def take(result: CheckResult) -> None:
        results.append(result)
        print(line(result), file=sys.stderr, flush=True)
        keep()

    start_s = time.monotonic()
    try:
        checks = chosen(options.only)
        context = context_of(resolve(options.device), data=options.data)
        keep()
    except (ValueError, OSError, RightbatchError) as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return UNUSABLE
    run_checks(checks, context, options.budget, take)
    record = document(results, context, words)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        judged = [result for result in results if result.holds is not None]
        print(f"{sum(result.holds for result in judged)} of {len(judged)} checks hold, {time.monotonic() - start_s:.0f} s{_gaps(results)}")
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
