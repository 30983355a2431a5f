"""The report's five charts, one function each: a part of the findings in, a plotly figure out.

Colours are defined here once. The data colours keep a contrast of 3 to 1 on the light and on the dark page, and differ for colour-blind
readers (after Okabe and Ito); text, axes and grid are left to the page's style sheet, which knows light, dark and print.
"""

import math
from collections.abc import Sequence
from typing import Literal

import plotly.graph_objects as go

from rightbatch.records.estimates import Estimate, LoaderCurve, MemoryCurve, NoiseScale, StepTimeCurve, Tradeoff
from rightbatch.records.measurements import Outcome
from rightbatch.units import GIB, format_bytes, format_number

BLUE, ORANGE, GREEN, GREY = "#3a7ebf", "#cf5c0c", "#0b8f6b", "#7b8491"
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#14171c"
"""Backgrounds that the charts are drawn on; the page's style sheet takes them from here."""
_FAR = 2.5
"""A limit so many times above everything measured would flatten the curve that the chart is about."""
_BELOW_NOTE = 0.87
"""Where a line ends that words at the top of a chart would be written across."""
BAND = "rgba(58, 126, 191, 0.18)"
SHADE = "rgba(11, 143, 107, 0.13)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def memory_chart(curve: MemoryCurve) -> go.Figure:
    """Draw the calibrated curve, what was measured, the limit, and the ceiling."""
    figure = new_figure("micro-batch size", "memory in GiB")
    sizes = [size for size, _ in curve.curve]
    figure.add_scatter(
        x=sizes, y=[used / GIB for _, used in curve.curve], name="calibrated trace", mode="lines", line={"color": BLUE, "width": 2}
    )
    for outcome, name, symbol, colour in ((Outcome.RAN, "ran", "circle", BLUE), (Outcome.OVER_LIMIT, "over the limit", "x", ORANGE)):
        points = [
            (point.micro_batch_size, point.used_bytes)
            for point in curve.points
            if point.outcome is outcome and point.used_bytes is not None
        ]
        if points:
            heights = [used / GIB for _, used in points]
            figure.add_scatter(x=[size for size, _ in points], y=heights, name=name, mode="markers", marker=marker_of(colour, symbol))
    drawn = [used for _, used in curve.curve] + [point.used_bytes for point in curve.points if point.used_bytes is not None]
    top = _limit(figure, curve.limit.limit_bytes / GIB, max(drawn, default=0) / GIB, "limit", format_bytes(curve.limit.limit_bytes))
    if curve.ceiling is not None:
        vertical_line(figure, curve.ceiling, f"ceiling {curve.ceiling}", GREEN, log=False, top=top)
    figure.update_yaxes(rangemode="tozero")
    return figure


def speed_chart(curve: StepTimeCurve, loader: LoaderCurve | None) -> go.Figure:
    """Draw throughput by micro-batch size with intervals, the fit, the knee, and what the data loader delivers."""
    figure = new_figure("micro-batch size", "samples per second")
    sizes = [point.micro_batch_size for point in curve.points]
    fitted = [
        (point.micro_batch_size, point.micro_batch_size / point.fitted_step_time_s) for point in curve.points if point.fitted_step_time_s
    ]
    if fitted:
        figure.add_scatter(
            x=[size for size, _ in fitted],
            y=[rate for _, rate in fitted],
            name="fit",
            mode="lines",
            line={"color": BLUE, "width": 2, "shape": "spline"},
        )
    add_estimates(figure, sizes, [point.samples_per_s for point in curve.points], name="measured, 95 %")
    top = 1.0
    if loader is not None and loader.samples_per_s.value is not None:
        best = max((point.samples_per_s.value or 0.0 for point in curve.points), default=0.0)
        top = _limit(figure, loader.samples_per_s.value, best, "data loader", f"{format_number(loader.samples_per_s.value)} samples/s")
    log_sizes(figure, sizes)
    if curve.knee is not None:
        vertical_line(figure, curve.knee, f"knee {curve.knee}", GREEN, top=top)
    figure.update_yaxes(rangemode="tozero")
    return figure


def noise_chart(scale: NoiseScale) -> go.Figure:
    """Draw the noise scale of every snapshot with its interval along the samples seen."""
    figure = new_figure("samples seen", "noise scale in samples")
    known = [snapshot for snapshot in scale.snapshots if snapshot.noise_scale.value is not None]
    add_estimates(
        figure,
        [snapshot.samples_seen for snapshot in known],
        [snapshot.noise_scale for snapshot in known],
        name="snapshot, 95 %",
        line=True,
    )
    if scale.low is not None and scale.high is not None:
        figure.add_hrect(y0=scale.low, y1=scale.high, fillcolor=SHADE, line_width=0, layer="below")
    if scale.value is not None:
        figure.add_hline(y=scale.value, line={"color": GREEN, "width": 1.5})
        _note(figure, x=0.02, y=scale.value, text="of the run", colour=GREEN)
    figure.update_yaxes(rangemode="tozero")
    return figure


def cost_chart(tradeoff: Tradeoff, chosen: int | None, equivalent: Sequence[int]) -> go.Figure:
    """Draw the predicted time to target over the batch size with its interval, the choice, and the set of sizes as good."""
    figure = new_figure("batch size", "time to target (best = 1)")
    points = [point for point in tradeoff.points if point.relative_time.value is not None]
    sizes, times = [point.global_batch_size for point in points], [point.relative_time for point in points]
    banded = [(size, time) for size, time in zip(sizes, times, strict=True) if time.low is not None and time.high is not None]
    if banded:
        across = [size for size, _ in banded]
        figure.add_scatter(
            x=across + across[::-1],
            y=[time.high for _, time in banded] + [time.low for _, time in banded][::-1],
            fill="toself",
            fillcolor=BAND,
            line={"width": 0},
            mode="lines",
            name="90 % interval",
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=sizes,
        y=[time.value for time in times],
        name="predicted",
        mode="lines+markers",
        line={"color": BLUE, "width": 2},
        marker=marker_of(BLUE, "circle"),
    )
    log_sizes(figure, sizes)
    if equivalent:
        figure.add_vrect(x0=min(equivalent) / 1.15, x1=max(equivalent) * 1.15, fillcolor=SHADE, line_width=0, layer="below")
    if chosen is not None:
        vertical_line(figure, chosen, f"choice {chosen}", GREEN)
    ceiling = (
        3.0 if any((time.value or 0.0) > 3 for time in times) else max((time.high or time.value or 1.0 for time in times), default=1.0)
    )
    figure.update_yaxes(range=[0.0, ceiling * 1.12])
    return figure


def pareto_chart(tradeoff: Tradeoff, chosen: int | None) -> go.Figure:
    """Draw time against samples to target, one point a size, labelled by the size."""
    figure = new_figure("samples to target (least = 1)", "time to target (best = 1)")
    points = [point for point in tradeoff.points if point.relative_time.value is not None and point.relative_samples.value is not None]
    for name, colour, kept in (
        ("batch size", BLUE, [point for point in points if point.global_batch_size != chosen]),
        ("the choice", GREEN, [point for point in points if point.global_batch_size == chosen]),
    ):
        figure.add_scatter(
            x=[point.relative_samples.value for point in kept],
            y=[point.relative_time.value for point in kept],
            name=name,
            mode="markers+text",
            text=[str(point.global_batch_size) for point in kept],
            cliponaxis=False,
            textposition=["top center" if points.index(point) % 2 else "bottom center" for point in kept],
            marker=marker_of(colour, "circle", 10),
        )
    for axis, ticks in ((figure.update_xaxes, (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50)), (figure.update_yaxes, (1, 1.5, 2, 3, 5, 10, 20, 50))):
        axis(type="log", tickvals=list(ticks), ticktext=[str(tick) for tick in ticks])
    return figure


def new_figure(x_title: str, y_title: str) -> go.Figure:
    """Return an empty figure in the report's style."""
    layout = go.Layout(
        template=go.layout.Template(),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=340,
        font={"family": _FONT, "size": 13},
        margin={"l": 56, "r": 16, "t": 34, "b": 48},
        hovermode="closest",
        dragmode=False,
        legend={"orientation": "h", "x": 0, "y": 1.0, "xanchor": "left", "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        showlegend=True,
    )
    figure = go.Figure(layout=layout)
    for axis, title in ((figure.update_xaxes, x_title), (figure.update_yaxes, y_title)):
        axis(
            title={"text": title, "standoff": 10},
            zeroline=False,
            showline=False,
            gridcolor="rgba(123,132,145,0.22)",
            fixedrange=True,
            automargin=True,
        )
    figure.update_xaxes(showgrid=False, showline=True, linecolor=GREY, ticks="outside", tickcolor=GREY)
    return figure


def marker_of(colour: str, symbol: str, size: int = 8) -> dict[str, str | int]:
    """Return plotly's description of a marker."""
    return {"color": colour, "symbol": symbol, "size": size}


def add_estimates(figure: go.Figure, sizes: Sequence[int], values: Sequence[Estimate], *, name: str, line: bool = False) -> None:
    """Draw estimates with their intervals over sizes or samples; those without a value are left out."""
    known = [(size, value.value, value.low, value.high) for size, value in zip(sizes, values, strict=True) if value.value is not None]
    heights = [height for _, height, _, _ in known]
    above = [0.0 if high is None else high - height for _, height, _, high in known]
    below = [0.0 if low is None else height - low for _, height, low, _ in known]
    bars = {"type": "data", "array": above, "arrayminus": below, "symmetric": False, "color": BLUE, "thickness": 1.5, "width": 4}
    mode: Literal["lines+markers", "markers"] = "lines+markers" if line else "markers"
    figure.add_scatter(
        x=[size for size, *_ in known],
        y=heights,
        error_y=bars,
        name=name,
        mode=mode,
        marker=marker_of(BLUE, "circle"),
        line={"color": BLUE, "width": 2},
    )


def log_sizes(figure: go.Figure, sizes: Sequence[int]) -> None:
    """Make the horizontal axis logarithmic with a tick at each size that leaves room for its words."""
    kept: list[int] = []
    for size in sorted(sizes):
        if not kept or size >= 1.7 * kept[-1]:
            kept.append(size)
    figure.update_xaxes(type="log", tickvals=kept, ticktext=[str(size) for size in kept])


def vertical_line(figure: go.Figure, size: float, text: str, colour: str, *, log: bool = True, top: float = 1.0) -> None:
    """Draw a dotted line at a size up to a fraction of the height, its words beside it; ``log``: whether the axis is logarithmic."""
    figure.add_vline(x=size, y1=top, line={"color": colour, "width": 1.5, "dash": "dot"})
    place = math.log10(size) if log else size
    figure.add_annotation(
        x=place, y=0.03, yref="paper", text=text, showarrow=False, xanchor="right", yanchor="bottom", xshift=-5, font={"color": colour}
    )


def _limit(figure: go.Figure, height: float, highest_drawn: float, name: str, value: str) -> float:
    """Draw a dashed line that bounds the curve, or say where it is when it lies far above.

    Returns:
        The part of the height below those words.
    """
    if 0 < _FAR * highest_drawn < height:
        place = {"x": 0.02, "xref": "paper", "y": 0.98, "yref": "paper", "xanchor": "left", "yanchor": "top"}
        figure.add_annotation(**place, text=f"{name}: {value}, far above", showarrow=False, font={"color": ORANGE})
        return _BELOW_NOTE
    figure.add_hline(y=height, line={"color": ORANGE, "width": 1.5, "dash": "dash"})
    _note(figure, x=0.0, y=height, text=name, colour=ORANGE)
    return 1.0


def _note(figure: go.Figure, *, x: float, y: float, text: str, colour: str) -> None:
    side = "left" if x < 0.5 else "right"
    figure.add_annotation(x=x, xref="paper", y=y, text=text, showarrow=False, xanchor=side, yanchor="bottom", font={"color": colour})
