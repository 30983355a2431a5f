"""What a Python program or a notebook calls: the tuner behind one function, and a plan that shows itself."""

import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import PrivateAttr

from rightbatch.errors import InconclusiveError, NothingFitsError, RightbatchWarning
from rightbatch.records.plan import BatchPlan, Constraints, Findings, Goal, Objective
from rightbatch.report.html import render_html, render_notebook
from rightbatch.report.text import render_text
from rightbatch.tuner.find import find as find_run
from rightbatch.tuner.request import STANDARD_PARTS, Part, Request, SilentProgress
from rightbatch.units import parse_bytes, parse_duration_s
from rightbatch.workload.ingredients import Precision, Workload


class FoundPlan(BatchPlan):
    """A plan with the findings it rests on. In a notebook it shows itself; ``print`` gives the report."""

    _findings: Findings = PrivateAttr()

    @classmethod
    def of(cls, findings: Findings) -> "FoundPlan":
        """Return the recommended plan of some findings.

        Raises:
            NothingFitsError: Not even one sample fits.
            InconclusiveError: What was measured names no plan.
        """
        plan = findings.recommendation.plan
        if plan is None:
            kind = NothingFitsError if findings.recommendation.status == "nothing_fits" else InconclusiveError
            raise kind(render_text(findings, width=80, colour=False).strip().splitlines()[0])
        found = cls(**plan.model_dump())
        found._findings = findings
        return found

    @property
    def findings(self) -> Findings:
        """Everything that was concluded."""
        return self._findings

    def write_report(self, path: str | Path) -> Path:
        """Write the HTML report to a file; return its path."""
        target = Path(path)
        target.write_text(render_html(self._findings), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return render_notebook(self._findings)

    def __str__(self) -> str:
        return render_text(self._findings, width=80, colour=False, now=datetime.now(UTC))


@dataclass(frozen=True)
class _Given:
    """A workload that exists already, as a source."""

    workload: Workload
    spec: str = "a workload given in Python"
    arguments: tuple[str, ...] = ()
    name: str = "python"

    def load(self) -> Workload:
        return self.workload

    def code_files(self) -> tuple[tuple[str, str], ...]:
        return ()

    def code_is_unchanged(self, files: tuple[tuple[str, str], ...]) -> bool:  # noqa: ARG002  # nothing on disk tells
        return False


def find(
    workload: Workload,
    *,
    goal: Goal | Literal["time", "samples", "energy", "accuracy"] = Goal.TIME,
    budget: str = "2m",
    limit: str | None = None,
    max_batch: int | None = None,
    max_global_batch: int | None = None,
    verify: bool = False,
    device: str = "auto",
    precision: Precision | None = None,
    seed: int = 0,
    threads: int | None = None,
    isolation: Literal["child", "in-process"] = "child",
    lr_range: bool = False,
    out: str | Path | None = None,
) -> FoundPlan:
    """Measure a workload and return the batch plan to train it with.

    Under ``torchrun`` every rank calls this with the same arguments and returns the same plan, for as many ranks as there are; each
    takes the GPU of its ``LOCAL_RANK``. See ``docs/decisions/010-ranks.md``.

    Args:
        workload: What is trained.
        goal: What to have least of: ``time``, ``samples`` or ``energy`` to a target; or ``accuracy``, near the least time.
        budget: Time that the measurements may take, such as ``2m``.
        limit: Most memory that training may use, such as ``24GiB``; ``None`` takes what is free.
        max_batch: Largest micro-batch to consider, in samples.
        max_global_batch: Largest global batch to consider, in samples.
        verify: Whether to check the answer by training from a checkpoint at several sizes, which takes half of the budget.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: Overrides the workload's precision.
        seed: Seed of everything random.
        threads: Threads torch computes with; ``None`` leaves its default.
        isolation: ``child`` measures in a process of its own; ``in-process`` here, and puts everything back.
        lr_range: Whether to test learning rates even if the workload says where its own was tuned; without a tuned one that is done anyway.
        out: Run folder to keep everything in; ``None`` keeps nothing. Of several ranks the first writes it.

    Returns:
        The plan, with its findings.

    Raises:
        NothingFitsError: Not even one sample fits in the limit.
        InconclusiveError: What was measured names no plan.
        UserCodeError: The model, dataset or loss raised.
        UsageError: An argument is not of the form above.
        RankError: Another rank failed; the message names it and its reason.
    """
    request = Request(
        parts=STANDARD_PARTS | ({Part.BRANCHES} if verify else frozenset()) | ({Part.LR_RANGE} if lr_range else frozenset()),
        lr_range_if_untuned=True,
        objective=Objective(goal=Goal(goal)),
        constraints=Constraints(max_global_batch_size=max_global_batch),
        device=device,
        precision=precision,
        max_batch=max_batch,
        limit_bytes=None if limit is None else parse_bytes(limit),
        budget_s=parse_duration_s(budget),
        seed=seed,
        threads=threads,
        isolation=isolation,
        out=None if out is None else Path(out),
        fresh=True,
        save=out is not None,
    )
    found = find_run(_Given(workload), request, SilentProgress())
    plan = FoundPlan.of(found.findings)
    if found.findings.recommendation.status != "ok" and found.rank == 0:
        message = f"the recommendation is {found.findings.recommendation.status}; print(plan) says why and what to do."
        warnings.warn(message, RightbatchWarning, stacklevel=2)
    return plan
