"""The charts of a sweep: its result in, plotly figures out."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import plotly.graph_objects as go

from rightbatch.records.estimates import Estimate
from rightbatch.records.sweep import SweepPoint, SweepResult
from rightbatch.report.charts import BAND, BLUE, GREEN, GREY, ORANGE, add_estimates, log_sizes, marker_of, new_figure, vertical_line
from rightbatch.report.html import Chart
from rightbatch.report.phrases import number

_CURVE_POINTS = 60
_SHORT = 5
"""An axis over less than this factor is short of ticks."""


def sweep_charts(result: SweepResult) -> Iterator[Chart]:
    """Yield the charts that a result has something for."""
    tuned = [point for point in result.points if point.samples.value is not None]
    if not tuned:
        return
    name = result.settings.target.quantity
    yield Chart(
        section="sizes",
        title="Time to the target",
        description="Seconds to the target over batch size with 95 % intervals, each size at its best rate; the fastest is marked.",
        figure=time_chart(result, tuned),
    )
    yield Chart(
        section="sizes",
        title="Samples to the target",
        description="Samples to the target over batch size with 95 % intervals, the hyperbola, the robust curve's 90 % band and B_crit.",
        figure=samples_chart(result, tuned),
    )
    yield Chart(
        section="sizes",
        title="Steps to the target",
        description="Optimizer steps to the target over batch size with 95 % intervals, and the hyperbola with its least number of steps.",
        figure=steps_chart(result, tuned),
    )
    yield Chart(
        section="critical",
        title="Samples against steps",
        description="Samples against steps to the target, one point a size; the hyperbola bends at B_crit, where both are twice the least.",
        figure=pareto_chart(result, tuned),
    )
    yield Chart(
        section="lr",
        title="Best learning rate",
        description="Tuned learning rate over batch size, the range of rates nearly as good, and the scaling rule from the first size.",
        figure=rate_chart(result, tuned),
    )
    yield Chart(
        section="generalisation",
        title=f"Best {name} at equal samples and at equal time",
        description=f"Best smoothed {name} over batch size within the samples, and within the seconds, that every size had.",
        figure=generalisation_chart(result, tuned),
    )


def time_chart(result: SweepResult, tuned: Sequence[SweepPoint]) -> go.Figure:
    """Draw seconds to the target by size, and the fastest size."""
    figure = new_figure("batch size", "seconds to the target")
    _estimates(figure, tuned, lambda point: point.seconds, name="measured, 95 %")
    if result.best_size is not None:
        vertical_line(figure, result.best_size, f"fastest {result.best_size}", GREEN)
    figure.update_yaxes(rangemode="tozero")
    return figure


def samples_chart(result: SweepResult, tuned: Sequence[SweepPoint]) -> go.Figure:
    """Draw samples to the target by size, the hyperbola, and the band of the robust curve."""
    figure = new_figure("batch size", "samples to the target")
    if result.band:
        across = [point.global_batch_size for point in result.band]
        figure.add_scatter(
            x=across + across[::-1],
            y=[point.high for point in result.band] + [point.low for point in result.band][::-1],
            fill="toself",
            fillcolor=BAND,
            line={"width": 0},
            hoverinfo="skip",
            name="robust curve, 90 %",
        )
    _hyperbola(figure, result, tuned, lambda size, fewest, critical: fewest * (1 + size / critical))
    _estimates(figure, tuned, lambda point: point.samples, name="measured, 95 %")
    _critical_line(figure, result, tuned)
    figure.update_yaxes(rangemode="tozero")
    return figure


def steps_chart(result: SweepResult, tuned: Sequence[SweepPoint]) -> go.Figure:
    """Draw steps to the target by size on logarithmic axes, where perfect scaling is a straight line."""
    figure = new_figure("batch size", "steps to the target")
    _hyperbola(figure, result, tuned, lambda size, fewest, critical: fewest * (1 / size + 1 / critical))
    _estimates(figure, tuned, lambda point: point.steps, name="measured, 95 %")
    _critical_line(figure, result, tuned)
    _log_axis(figure.update_yaxes, [point.steps for point in tuned])
    return figure


def pareto_chart(result: SweepResult, tuned: Sequence[SweepPoint]) -> go.Figure:
    """Draw samples against steps, labelled by size, with the hyperbola and the point of B_crit on it."""
    figure = new_figure("steps to the target", "samples to the target")
    fewest, critical = result.fewest_samples, result.critical_batch_size.value
    if fewest is not None and critical:
        sizes = _between(tuned)
        figure.add_scatter(
            x=fewest * (1 / sizes + 1 / critical),
            y=fewest * (1 + sizes / critical),
            name="hyperbola",
            mode="lines",
            line={"color": BLUE, "width": 2},
        )
        if tuned[0].global_batch_size <= critical <= tuned[-1].global_batch_size:
            figure.add_scatter(
                x=[2 * fewest / critical], y=[2 * fewest], name="B_crit", mode="markers", marker=marker_of(ORANGE, "diamond", 11)
            )
    figure.add_scatter(
        x=[point.steps.value for point in tuned],
        y=[point.samples.value for point in tuned],
        text=[str(point.global_batch_size) for point in tuned],
        name="batch size",
        mode="markers+text",
        textposition="top right",
        cliponaxis=False,
        marker=marker_of(GREEN, "circle", 9),
    )
    _log_axis(figure.update_xaxes, [Estimate(value=point.steps.value, low=None, high=None, n=point.steps.n) for point in tuned])
    figure.update_yaxes(rangemode="tozero")
    return figure


def rate_chart(result: SweepResult, tuned: Sequence[SweepPoint]) -> go.Figure:
    """Draw the best rate by size with the range of good ones, and the scaling rule beside it."""
    figure = new_figure("batch size", "learning rate")
    if result.rule_rates:
        figure.add_scatter(
            x=[size for size, _ in result.rule_rates],
            y=[lr for _, lr in result.rule_rates],
            name=f"rule: {result.rule}",
            mode="lines",
            line={"color": GREY, "width": 2, "dash": "dash"},
        )
    rates = [Estimate(value=point.lr, low=point.lr_low, high=point.lr_high, n=point.samples.n) for point in tuned]
    add_estimates(figure, [point.global_batch_size for point in tuned], rates, name="best, range of good rates")
    log_sizes(figure, [point.global_batch_size for point in tuned])
    _log_axis(figure.update_yaxes, rates)
    return figure


def generalisation_chart(result: SweepResult, tuned: Sequence[SweepPoint]) -> go.Figure:
    """Draw the best metric within the same samples, and within the same time, by size."""
    figure = new_figure("batch size", result.settings.target.quantity)
    _estimates(figure, tuned, lambda point: point.metric_at_equal_samples, name="at equal samples, 95 %", line=True)
    known = [(point.global_batch_size, point.metric_at_equal_time.value) for point in tuned]
    figure.add_scatter(
        x=[size for size, value in known if value is not None],
        y=[value for _, value in known if value is not None],
        name="at equal time",
        mode="lines+markers",
        line={"color": ORANGE, "width": 2},
        marker=marker_of(ORANGE, "square"),
    )
    return figure


def _estimates(
    figure: go.Figure, tuned: Sequence[SweepPoint], of: Callable[[SweepPoint], Estimate], *, name: str, line: bool = False
) -> None:
    sizes = [point.global_batch_size for point in tuned]
    add_estimates(figure, sizes, [of(point) for point in tuned], name=name, line=line)
    log_sizes(figure, sizes)


def _log_axis(update: Callable[..., object], values: Sequence[Estimate]) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5 times powers of ten; with more of them where that would leave one or none."""
    known = [end for value in values for end in (value.value, value.low, value.high) if end]
    steps = (1, 2, 5) if max(known) > _SHORT * min(known) else (1, 1.5, 2, 3, 4, 5, 7)
    low, high = min(known) / 2, max(known) * 2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
    update(type="log", tickvals=ticks, ticktext=[number(tick) for tick in ticks])


def _between(tuned: Sequence[SweepPoint]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.geomspace(tuned[0].global_batch_size, tuned[-1].global_batch_size, _CURVE_POINTS)


def _hyperbola(
    figure: go.Figure,
    result: SweepResult,
    tuned: Sequence[SweepPoint],
    law: Callable[..., np.ndarray[tuple[int, ...], np.dtype[np.float64]]],
) -> None:
    fewest, critical = result.fewest_samples, result.critical_batch_size.value
    if fewest is None or not critical:
        return
    sizes = _between(tuned)
    figure.add_scatter(x=sizes, y=law(sizes, fewest, critical), name="hyperbola", mode="lines", line={"color": BLUE, "width": 2})


def _critical_line(figure: go.Figure, result: SweepResult, tuned: Sequence[SweepPoint]) -> None:
    critical = result.critical_batch_size.value
    if critical is not None and tuned[0].global_batch_size <= critical <= tuned[-1].global_batch_size:
        vertical_line(figure, critical, f"B_crit {critical:.0f}", ORANGE)
