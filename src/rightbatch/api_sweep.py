"""What a Python program or a notebook calls to sweep: the driver behind one function, and a result that shows itself."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from pydantic import PrivateAttr

from rightbatch.errors import InterruptedRunError
from rightbatch.progress import drawn_sweep
from rightbatch.records.sweep import SweepResult, TrialResult
from rightbatch.records.training_log import TrainingTarget
from rightbatch.report.sweep import render_sweep_html, render_sweep_text
from rightbatch.sweeps.driver import sweep as run_sweep
from rightbatch.sweeps.request import SilentSweep, SweepProgress, SweepRequest, SweptRun, parse_sizes
from rightbatch.units import parse_duration_s
from rightbatch.workload.given import GivenWorkload
from rightbatch.workload.ingredients import Workload
from rightbatch.workload.source import WorkloadSource


class Sweep(SweepResult):
    """What a sweep came to, with its trials. ``print`` gives the report."""

    _run: SweptRun = PrivateAttr()

    @classmethod
    def of(cls, run: SweptRun) -> "Sweep":
        """Return the result of a sweep with its trials."""
        sweep = cls(**{name: getattr(run.result, name) for name in SweepResult.model_fields})
        sweep._run = run
        return sweep

    @property
    def all_trials(self) -> tuple[TrialResult, ...]:
        """Every trial that has ended."""
        return self._run.trials

    def write_report(self, path: str | Path) -> Path:
        """Write the HTML report to a file; return its path."""
        target = Path(path)
        target.write_text(render_sweep_html(self._run.result), encoding="utf-8")
        return target

    def __str__(self) -> str:
        return render_sweep_text(self._run.result, width=80, colour=False)


def sweep(
    workload: Workload | str,
    target: str | TrainingTarget,
    *,
    batches: str | Sequence[int] | None = None,
    seeds: int = 3,
    on: str = "local",
    jobs: int | None = None,
    max_samples: int | None = None,
    budget: str | None = None,
    plan: str | Path | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16", "fp64"] | None = None,
    threads: int | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    quiet: bool = False,
    progress: SweepProgress | None = None,
) -> Sweep:
    """Train to a target at several batch sizes, with the learning rate tuned at each, and say what each size needs.

    Trials run in processes of their own; nothing of the workload runs in this one. Call it again with the same ``out`` to go on with a
    sweep that was interrupted: no trial is lost, and none is trained twice.

    Args:
        workload: What is trained: a workload that can be pickled, or ``FILE.py:FUNCTION``.
        target: What every trial trains to: ``accuracy>=0.97``, with any name for the workload's metric, or ``loss<=0.1``.
        batches: Global batch sizes, or ``8..512`` by factors of two; ``None`` takes some around the plan.
        seeds: Trainings at the best rate of each size.
        on: Where trials run: ``local``, ``ray``, ``ray:ADDRESS``, ``slurm`` or ``slurm:PARTITION``.
        jobs: Trials at once; ``None`` takes one a GPU, or up to four on the cores of a processor.
        max_samples: Most samples of a trial; ``None`` allows 100 epochs.
        budget: Time after which no trial goes on, such as ``30m``; ``None`` sets no end.
        plan: Folder of a run of ``find`` whose plan is judged.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: Overrides the workload's precision.
        threads: Threads of a trial; ``None`` shares the cores.
        out: Folder to keep everything in; ``None`` keeps nothing of a ``Workload``, and for a spec takes the folder of the command line.
        fresh: Whether to train again what the folder holds.
        quiet: Whether to show nothing meanwhile.
        progress: Where to say how it goes; ``None`` draws it on a terminal and in a notebook only.

    Returns:
        The result, with its trials.

    Raises:
        UserCodeError: The model, dataset, loss or metric raised.
        InterruptedRunError: SIGINT or SIGTERM ended it; everything was kept.
        RunFolderError: The folder cannot be written, or holds something else.
        UsageError: An argument is not of the form above.
    """
    source = WorkloadSource(workload) if isinstance(workload, str) else GivenWorkload(workload)
    is_kept = out is not None or isinstance(workload, str)
    with ExitStack() as stack:
        if not is_kept:
            out = stack.enter_context(tempfile.TemporaryDirectory())
        request = SweepRequest(
            target=target if isinstance(target, TrainingTarget) else TrainingTarget.parse(target),
            sizes=parse_sizes(batches) if isinstance(batches, str) else None if batches is None else tuple(sorted(set(batches))),
            seeds=seeds,
            where=on,
            jobs=jobs,
            most_samples=max_samples,
            budget_s=None if budget is None else parse_duration_s(budget),
            plan=None if plan is None else Path(plan),
            device=device,
            precision=precision,
            threads=threads,
            out=None if out is None else Path(out),
            fresh=fresh,
        )
        drawn = stack.enter_context(drawn_sweep(quiet=quiet or progress is not None))
        try:
            return Sweep.of(run_sweep(source, request, progress or drawn or SilentSweep()))
        except InterruptedRunError as error:
            if is_kept:
                raise InterruptedRunError(f"{error} Call it again with the same out to go on.") from error
            raise InterruptedRunError("interrupted; nothing was kept, because out was not given.") from error
