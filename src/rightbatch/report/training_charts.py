"""The charts of a training's report: its log in, plotly figures out."""

from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from rightbatch.fits.training_result import evenly, predicted_curve, thinned
from rightbatch.records.training_log import EvaluationLine, LogLine, StepLine
from rightbatch.records.training_run import TrainingManifest
from rightbatch.report.charts import BLUE, GREEN, ORANGE, add_estimates, marker_of, new_figure
from rightbatch.report.html import Chart
from rightbatch.report.training_verdict import MOST_ROWS
from rightbatch.training.progress_words import metric_name

_MOST_POINTS = 400
_X_TITLE = "samples trained on"


def training_charts(manifest: TrainingManifest, lines: Sequence[LogLine]) -> Iterator[Chart]:
    """Yield the charts that a log has something for."""
    every_step = [line for line in lines if isinstance(line, StepLine)]
    steps = thinned(every_step, _MOST_POINTS)
    evaluations = [line for line in lines if isinstance(line, EvaluationLine)]
    if not steps:
        return
    name = metric_name(manifest.target)
    yield Chart(
        section="course",
        title="Loss",
        description="Mean loss of the training steps over the samples trained on, and the loss on the validation samples.",
        figure=loss_chart(steps, evaluations),
    )
    if any(line.metric is not None for line in evaluations):
        yield Chart(
            section="course",
            title=f"{name[0].upper()}{name[1:]} on the validation samples",
            description="The workload's metric on the validation samples over the samples trained on, with the target if there is one.",
            figure=metric_chart(evaluations, manifest),
        )
    # A size or a rate that never changes is said in a sentence; a level line would say no more.
    if len({line.global_batch_size for line in every_step}) > 1:
        yield Chart(
            section="batch",
            title="Batch size",
            description="Global batch size over the samples trained on: a step wherever the schedule changes it.",
            figure=staircase_chart(steps, [line.global_batch_size for line in steps], "batch size"),
        )
    if all(line.lr is not None for line in steps) and len({line.lr for line in every_step}) > 1:
        yield Chart(
            section="batch",
            title="Learning rate",
            description="Learning rate of the first parameter group over the samples trained on, coupled to the batch size.",
            figure=staircase_chart(steps, [line.lr or 0.0 for line in steps], "learning rate"),
        )
    if any(line.noise_scale is not None for line in every_step):
        yield Chart(
            section="noise",
            title="Noise scale",
            description="Simple noise scale of the run so far over the samples trained on, with 95 % intervals.",
            figure=noise_chart(every_step),
        )
    yield Chart(
        section="time",
        title="Training time",
        description="Seconds of training over the samples trained on, and what the plan's step times predict where there are any.",
        figure=time_chart(every_step, manifest),
    )


def loss_chart(steps: Sequence[StepLine], evaluations: Sequence[EvaluationLine]) -> go.Figure:
    """Draw the training loss, and the validation loss beside it."""
    figure = new_figure(_X_TITLE, "mean loss")
    figure.add_scatter(
        x=[line.samples for line in steps], y=[line.loss for line in steps], name="training", mode="lines", line={"color": BLUE, "width": 2}
    )
    known = [line for line in evaluations if line.loss is not None]
    if known:
        figure.add_scatter(
            x=[line.samples for line in known],
            y=[line.loss for line in known],
            name="validation",
            mode="lines+markers",
            line={"color": ORANGE, "width": 1.5},
            marker=marker_of(ORANGE, "circle"),
        )
    return figure


def metric_chart(evaluations: Sequence[EvaluationLine], manifest: TrainingManifest) -> go.Figure:
    """Draw the metric of every evaluation, and the target."""
    name = metric_name(manifest.target)
    figure = new_figure(_X_TITLE, name)
    known = [line for line in evaluations if line.metric is not None]
    figure.add_scatter(
        x=[line.samples for line in known],
        y=[line.metric for line in known],
        name=name,
        mode="lines+markers",
        line={"color": ORANGE, "width": 2},
        marker=marker_of(ORANGE, "circle"),
    )
    if manifest.target is not None and not manifest.target.is_loss:
        figure.add_hline(y=manifest.target.value, line={"color": GREEN, "width": 1.5, "dash": "dash"})
        place = {"x": 0.02, "xref": "paper", "y": manifest.target.value, "xanchor": "left", "yanchor": "bottom"}
        figure.add_annotation(**place, text="target", showarrow=False, font={"color": GREEN})
    return figure


def staircase_chart(steps: Sequence[StepLine], heights: Sequence[float], title: str) -> go.Figure:
    """Draw what holds for all steps of each line of the log."""
    figure = new_figure(_X_TITLE, title)
    figure.add_scatter(
        x=[0, *(line.samples for line in steps)],
        y=[heights[0], *heights],
        name=title,
        mode="lines",
        line={"color": BLUE, "width": 2, "shape": "vh"},
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=False)
    return figure


def noise_chart(steps: Sequence[StepLine]) -> go.Figure:
    """Draw the noise scale of the run so far."""
    figure = new_figure(_X_TITLE, "noise scale in samples")
    known = evenly([(line.samples, line.noise_scale) for line in steps if line.noise_scale is not None], MOST_ROWS)
    add_estimates(figure, [samples for samples, _ in known], [scale for _, scale in known], name="of the run so far, 95 %", line=True)
    figure.update_yaxes(rangemode="tozero")
    return figure


def time_chart(steps: Sequence[StepLine], manifest: TrainingManifest) -> go.Figure:
    """Draw the realised time, and the predicted one where it can be told."""
    figure = new_figure(_X_TITLE, "training time in s")
    predicted = predicted_curve(steps, manifest.predicted_steps)
    places = evenly(range(len(steps)), _MOST_POINTS)
    across = [0, *(steps[place].samples for place in places)]
    realised = [0.0, *(steps[place].training_s for place in places)]
    figure.add_scatter(x=across, y=realised, name="realised", mode="lines", line={"color": BLUE, "width": 2})
    if predicted:
        heights = [0.0, *(predicted[place] for place in places)]
        figure.add_scatter(x=across, y=heights, name="predicted", mode="lines", line={"color": ORANGE, "width": 1.5, "dash": "dash"})
    figure.update_yaxes(rangemode="tozero")
    return figure
