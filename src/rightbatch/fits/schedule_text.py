"""Batch schedules as a word on the command line, and back.

64                                  the same size throughout
milestones:0=64,100000=256          sizes from so many samples on
linear:64..512@200000               from one size to another over so many samples
geometric:64..512@200000
grow:64x5@60000,120000..1024        times five where the rate would be divided by five, up to 1024
noise:64,16..1024,half=240,c=1.3    follow the gradient noise: start, bounds, b_half and c (hysteresis= and most= may follow)
"""

import re
from collections.abc import Callable
from typing import NoReturn

from pydantic import ValidationError

from rightbatch.errors import UsageError
from rightbatch.records.schedule import (
    BatchSchedule,
    ConstantSize,
    GeometricGrowth,
    GrowthForDecay,
    LinearGrowth,
    MilestoneSizes,
    NoiseAdaptive,
)

FORMS = {
    "constant": "64",
    "milestones": "milestones:0=64,100000=256",
    "linear": "linear:64..512@200000",
    "geometric": "geometric:64..512@200000",
    "grow": "grow:64x5@60000,120000..1024",
    "noise": "noise:64,16..1024,half=240,c=1.3",
}
"""An example of each kind, by its name."""
_WHOLE = r"\d[\d_]*"
_NUMBER = r"[0-9][0-9.e+-]*"
_NOISE_NAMES = {"half": "half_saturation", "c": "calibration", "hysteresis": "hysteresis", "most": "most_growth"}


def schedule_text(schedule: BatchSchedule) -> str:
    """The word that ``parse_schedule`` reads back as the same schedule; its coupling is not part of it."""
    if isinstance(schedule, ConstantSize):
        return str(schedule.global_batch_size)
    if isinstance(schedule, MilestoneSizes):
        return f"{schedule.kind}:" + ",".join(f"{samples}={size}" for samples, size in schedule.milestones)
    if isinstance(schedule, GrowthForDecay):
        at = ",".join(map(str, schedule.at_samples))
        return f"{schedule.kind}:{schedule.start}x{schedule.factor!r}@{at}..{schedule.largest}"
    if isinstance(schedule, NoiseAdaptive):
        named = ",".join(f"{short}={getattr(schedule, name)!r}" for short, name in _NOISE_NAMES.items())
        return f"{schedule.kind}:{schedule.start},{schedule.smallest}..{schedule.largest},{named}"
    return f"{schedule.kind}:{schedule.start}..{schedule.stop}@{schedule.over_samples}"


def parse_schedule(text: str) -> BatchSchedule:
    """Read a schedule from its word.

    Raises:
        UsageError: The word has none of the forms, or its numbers contradict one another.
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon and re.fullmatch(_WHOLE, kind):
        kind, rest = "constant", kind
    if kind not in _PARSERS:
        raise UsageError(f"a batch schedule is {_listed(FORMS)}; got {text!r}; write one of these forms with your numbers.")
    try:
        return _PARSERS[kind](rest)
    except ValidationError as error:
        _refuse(text, kind, error.errors(include_url=False)[0]["msg"].removeprefix("Value error, "))
    except ValueError as error:
        _refuse(text, kind, str(error))


def _refuse(text: str, kind: str, reason: str) -> NoReturn:
    raise UsageError(f"{text!r} is no batch schedule: {reason.rstrip('.')}; write it like {FORMS[kind]}.") from None


def _listed(forms: dict[str, str]) -> str:
    return ", ".join(list(forms.values())[:-1]) + f" or {forms['noise']}"


def _match(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text)
    if found is None:
        raise ValueError("it is not of the form of its kind")
    return found.groups()


def _constant(text: str) -> ConstantSize:
    (size,) = _match(f"({_WHOLE})", text)
    return ConstantSize(global_batch_size=int(size))


def _milestones(text: str) -> MilestoneSizes:
    pairs = [_match(f"({_WHOLE})=({_WHOLE})", part) for part in text.split(",")]
    return MilestoneSizes(milestones=tuple((int(samples), int(size)) for samples, size in pairs))


def _linear(text: str) -> LinearGrowth:
    start, stop, over = map(int, _match(f"({_WHOLE})\\.\\.({_WHOLE})@({_WHOLE})", text))
    return LinearGrowth(start=start, stop=stop, over_samples=over)


def _geometric(text: str) -> GeometricGrowth:
    line = _linear(text)
    return GeometricGrowth(start=line.start, stop=line.stop, over_samples=line.over_samples)


def _grow(text: str) -> GrowthForDecay:
    start, factor, at, largest = _match(f"({_WHOLE})x({_NUMBER})@({_WHOLE}(?:,{_WHOLE})*)\\.\\.({_WHOLE})", text)
    return GrowthForDecay(start=int(start), factor=float(factor), at_samples=tuple(map(int, at.split(","))), largest=int(largest))


def _noise(text: str) -> NoiseAdaptive:
    start, smallest, largest, named = _match(f"({_WHOLE}),({_WHOLE})\\.\\.({_WHOLE})((?:,[a-z]+={_NUMBER})*)", text)
    values = dict(part.split("=") for part in named.split(",")[1:])
    if unknown := values.keys() - _NOISE_NAMES.keys():
        raise ValueError(f"{', '.join(sorted(unknown))} is none of {', '.join(_NOISE_NAMES)}")
    if missing := {"half", "c"} - values.keys():
        raise ValueError(f"{' and '.join(sorted(missing))} must be given")
    sizes = {"start": int(start), "smallest": int(smallest), "largest": int(largest)}
    return NoiseAdaptive.model_validate(sizes | {_NOISE_NAMES[name]: float(value) for name, value in values.items()})


_PARSERS: dict[str, Callable[[str], BatchSchedule]] = {
    "constant": _constant,
    "milestones": _milestones,
    "linear": _linear,
    "geometric": _geometric,
    "grow": _grow,
    "noise": _noise,
}
