"""The check by training, in words: what every branch needed to the common loss."""

from rightbatch.records.estimates import BranchCurve, BranchPoint
from rightbatch.records.plan import Findings
from rightbatch.records.training import ProbeOutcome
from rightbatch.report.document import Section, Table
from rightbatch.report.phrases import number, plain

_OUTCOMES = {
    ProbeOutcome.REACHED: "compared",
    ProbeOutcome.STOPPED: "stopped: slower",
    ProbeOutcome.FAILED: "failed",
}


def branches(findings: Findings) -> Section | None:
    """Say what training at several sizes from one checkpoint showed."""
    curve = findings.branches
    if curve is None:
        return None
    table = Table(
        caption="What each branch needed, over the first",
        header=("batch", "lr", "samples", "time", "outcome"),
        rows=tuple(_row(point) for point in curve.points),
    )
    return Section(
        key="branches",
        title="Checked by training",
        sentences=(*_sentences(curve), *(plain(remark) for remark in curve.remarks)),
        tables=(table,) if curve.points else (),
    )


def swept(findings: Findings) -> Section | None:
    """Say what the sweep that the answer rests on showed."""
    evidence = findings.swept
    if evidence is None:
        return None
    sizes = [probe.global_batch_size for probe in evidence.probes]
    table = Table(
        caption=f"Samples to {evidence.target}, each size at its tuned rate",
        header=("batch", "lr", "samples"),
        rows=tuple((str(p.global_batch_size), "-" if p.lr is None else number(p.lr), number(round(p.samples))) for p in evidence.probes),
    )
    return Section(
        key="swept",
        title="Sweep",
        sentences=(
            f"A sweep of this workload trained sizes from {min(sizes)} to {max(sizes)} to {evidence.target}. The answer rests on it, and "
            "is no size outside it.",
            f"It is kept in {plain(evidence.folder)}.",
        ),
        tables=(table,),
    )


def _sentences(curve: BranchCurve) -> tuple[str, ...]:
    if curve.target_loss is None:
        return ()
    return (
        f"From a checkpoint after {number(curve.checkpoint_samples)} samples, each branch trained on the same samples in the same order, "
        f"until the loss on {curve.evaluated_samples} held-out samples was {number(curve.target_loss)}: at the learning rate that the rule "
        "gives its size, or half to twice that.",
        "Samples and time are means over the losses on the later half of the way. A branch ends when it has taken as long as the best one.",
    )


def _row(point: BranchPoint) -> tuple[str, ...]:
    bound = "" if point.outcome is ProbeOutcome.REACHED else "> "
    return (
        str(point.global_batch_size),
        "" if point.lr is None else number(point.lr),
        f"{bound}{number(point.relative_samples)}",
        "" if point.relative_time is None else f"{bound}{number(point.relative_time)}",
        _OUTCOMES[point.outcome],
    )
