"""The log of a training, a JSON line each: optimizer steps, evaluations, and what else happened."""

import json
import math
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from rightbatch.errors import UsageError
from rightbatch.records.document import refuse_io, refuse_record
from rightbatch.records.estimates import Estimate
from rightbatch.records.record import Record

_TARGET = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")


class TrainingTarget(Record):
    """What the validation samples must show for the training to end early."""

    quantity: str
    """``loss``, or the user's word for the workload's metric."""
    value: float
    is_loss: bool

    @classmethod
    def parse(cls, text: str) -> "TrainingTarget":
        """Read ``accuracy>=0.97`` or ``loss<=0.1``.

        Raises:
            UsageError: It has another form.
        """
        match = _TARGET.fullmatch(text)
        try:
            value = float(match[3]) if match is not None else 0.0
        except ValueError:
            match = None
        if match is None or not math.isfinite(value) or (match[1] == "loss") != (match[2] == "<="):
            raise UsageError(
                f"a target is loss<=VALUE, or NAME>=VALUE with any name for the workload's metric, of which more is better; got {text!r}; "
                "write it like 'accuracy>=0.97', in quotes."
            )
        return cls(quantity=match[1], value=value, is_loss=match[1] == "loss")

    def is_met_by(self, evaluation: "EvaluationLine") -> bool:
        """Whether an evaluation reaches it."""
        found = evaluation.loss if self.is_loss else evaluation.metric
        return found is not None and (found <= self.value if self.is_loss else found >= self.value)

    def __str__(self) -> str:
        return f"{self.quantity} {'<=' if self.is_loss else '>='} {self.value:g}"


class LogEvent(StrEnum):
    """What a training does apart from steps and evaluations."""

    STARTED = "started"
    RESUMED = "resumed"
    BATCH_SIZE = "batch size"
    OUT_OF_MEMORY = "out of memory"
    CHECKPOINT = "checkpoint"
    CHECKPOINT_DAMAGED = "checkpoint damaged"
    TARGET_REACHED = "target reached"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"
    FINISHED = "finished"


class _Line(Record):
    step: NonNegativeInt
    """Optimizer steps so far."""
    samples: NonNegativeInt
    """Samples trained on so far, over all epochs and ranks."""
    training_s: NonNegativeFloat
    """Seconds of training so far, loading of batches included; evaluations, checkpoints and interruptions not."""


class StepLine(_Line):
    """The optimizer steps since the line before, all of one batch size."""

    kind: Literal["step"] = "step"
    global_batch_size: PositiveInt
    """Of these steps; the last batch of an epoch may hold fewer samples."""
    micro_batch_size: PositiveInt
    lr: float | None
    """Of the first parameter group, at the last of these steps."""
    loss: float | None
    """Mean over the samples of these steps; none when it is not finite."""
    grad_norm: NonNegativeFloat | None = None
    """Of the last of these steps; none when it was not computed or is not finite."""
    samples_per_s: PositiveFloat | None = None
    """Over these steps."""
    noise_scale: Estimate | None = None
    """Of the run so far, when it is due."""


class EvaluationLine(_Line):
    """The validation samples, in evaluation mode and without gradients."""

    kind: Literal["evaluation"] = "evaluation"
    loss: float | None
    """Mean over the validation samples; none when it is not finite."""
    metric: float | None = None
    """The workload's metric, averaged over batches by their samples; none without one, or when it is not finite."""
    evaluated_samples: PositiveInt
    of_average: bool = False
    """Whether the moving average of the weights was evaluated instead of the weights."""


class EventLine(_Line):
    """Anything else."""

    kind: Literal["event"] = "event"
    event: LogEvent
    detail: str = ""


LogLine = StepLine | EvaluationLine | EventLine
_LINE: TypeAdapter[LogLine] = TypeAdapter(Annotated[LogLine, Field(discriminator="kind")])


def read_log(file: Path) -> tuple[LogLine, ...]:
    """Read a log; a last line that was not written to its end is left out.

    Raises:
        RunFolderError: It cannot be read, or a line is none of a training's log.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except OSError as error:
        refuse_io("read", file, error)
    except UnicodeDecodeError:
        refuse_record(file, "it is not UTF-8 text")
    whole = text[: text.rfind("\n") + 1].splitlines()
    return tuple(_parsed(line, number, file) for number, line in enumerate(whole, start=1))


def _parsed(text: str, number: int, file: Path) -> LogLine:
    try:
        json.loads(text)
        return _LINE.validate_json(text, strict=True)
    except (ValueError, ValidationError) as error:
        refuse_record(file, f"line {number} is no line of a training's log ({str(error).splitlines()[0]})")
