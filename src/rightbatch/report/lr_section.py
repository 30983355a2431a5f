"""The learning rate, in words: how it follows the size, what moves with it, and what a range test of rates found."""

from rightbatch.records.lr_range import LrRange, LrVerdict
from rightbatch.records.plan import BatchPlan, Findings
from rightbatch.report.document import Section, Table
from rightbatch.report.phrases import estimate, number, plain

_DIVERGED, _AS_GOOD = "diverged", "as good as the best"


def learning_rate(findings: Findings) -> Section | None:
    """Say how the learning rate follows the size, what moves with it, and what the range test found."""
    plan, lr, tested = findings.recommendation.plan, findings.recommendation.lr, findings.lr_range
    if plan is None and tested is None:
        return None
    sentences: list[str] = []
    tables: list[Table] = []
    if plan is not None:
        sentences.extend(_coupling(plan, findings))
        rows = tuple((plain(name), plain(value)) for name, value in lr.companions)
        tables.extend([Table(caption="What moves with it", header=("setting", "becomes"), rows=rows)] if rows else [])
    if tested is not None:
        sentences.extend(_range_test(tested, findings))
        rates = tuple(_row(verdict) for verdict in tested.verdicts)
        header = ("rate", "loss", "over the best", "")
        tables.extend([Table(caption=f"Rates tested at batch {tested.batch_size}", header=header, rows=rates)] if rates else [])
    return Section(key="lr", title="Learning rate", sentences=tuple(sentences), tables=tuple(tables))


def _coupling(plan: BatchPlan, findings: Findings) -> list[str]:
    lr, sentences = findings.recommendation.lr, []
    if plan.lr is None:
        sentences.append("The workload names no learning rate tuned at a known batch size, so none is given here.")
    elif lr.base_lr is not None and lr.base_batch_size is not None:
        rule = "" if lr.rule == "none" or lr.factor == 1 else f", by the {lr.rule} rule"
        factor = "the" if lr.factor == 1 else f"{number(lr.factor)} times the"
        tested = "that the range test found" if lr.base_is_tested else "tuned"
        how = tested if findings.swept is None else "that the sweep tuned"
        ruled = number(plan.lr if lr.over_rule is None else lr.base_lr * lr.factor)
        sentences.append(f"{ruled} is {factor} rate {how} at {lr.base_batch_size} ({number(lr.base_lr)}){rule}.")
        if lr.over_rule is not None:
            sentences.append(
                f"Trained from one checkpoint, the best rate is {number(lr.over_rule.value or 1.0)} [{number(lr.over_rule.low or 0.0)}, "
                f"{number(lr.over_rule.high or 0.0)}] times that, so {number(plan.lr)} is given."
            )
    return [*sentences, *([plain(lr.validity)] if lr.validity else []), *_further_groups(plan, findings)]


def _further_groups(plan: BatchPlan, findings: Findings) -> list[str]:
    """Say what the rates of further parameter groups become."""
    own, further = findings.workload.lr, findings.workload.further_lrs
    if plan.lr is None or own is None or not further:
        return []
    become = " and ".join(f"{number(rate)} becomes {number(rate * plan.lr / own)}" for rate in further)
    return [f"The rates above are those of the first parameter group; the others' follow by the same factor: {become}."]


def _range_test(tested: LrRange, findings: Findings) -> list[str]:
    """Say what short runs found, for which optimizer, and how that compares with the user's own rate."""
    remarks = [plain(remark) for remark in tested.remarks]
    if tested.value is None:
        return remarks
    work = findings.workload
    optimizer = (
        plain(tested.optimizer) if work.optimizer_given else f"{plain(tested.optimizer)}, in place of the optimizer that is not given"
    )
    edge = "none of them diverged" if tested.divergence_edge is None else f"the loss diverges at {number(tested.divergence_edge)}"
    at = f"at batch {tested.batch_size} with {optimizer}"
    sentences = [f"Range test {at}: {number(tested.value)}{_interval(tested)} from {tested.n} samples of short runs; {edge}."]
    if work.lr_batch_size is not None and work.lr is not None:
        ratio = number(work.lr / tested.value)
        sentences.append(f"The workload's own rate, {number(work.lr)}, is {ratio} times that; it stays the base, because it was tuned.")
    sentences.append("Short runs favour rates that pay off soon: if the score matters, try half and twice the rate.")
    return [*sentences, *remarks]


def _interval(tested: LrRange) -> str:
    if tested.low is None and tested.high is None:
        return ""
    low = "open" if tested.low is None else number(tested.low)
    high = "open" if tested.high is None else number(tested.high)
    return f" [{low}, {high}]"


def _row(verdict: LrVerdict) -> tuple[str, ...]:
    if verdict.loss is None or verdict.excess is None:
        return number(verdict.lr), "", "", _DIVERGED
    return number(verdict.lr), number(verdict.loss), estimate(verdict.excess), _AS_GOOD if verdict.is_tied else ""
