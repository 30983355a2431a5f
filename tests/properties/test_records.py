"""Any record that can be made is read back equal from its JSON, and equal JSON comes out again."""

import math
import types
from collections.abc import Iterator
from enum import EnumType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Gt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rightbatch.records.document import validate
from rightbatch.records.measurements import Measurements
from rightbatch.records.plan import BatchPlan, Findings
from rightbatch.records.record import Record
from rightbatch.records.run import PART_KINDS, RunManifest

KINDS = {**PART_KINDS, "measurements": Measurements, "findings": Findings, "manifest": RunManifest}


def bounds(metadata: tuple[object, ...]) -> Iterator[tuple[float, bool]]:
    for item in metadata:
        if isinstance(item, Gt):
            yield item.gt, True
        if isinstance(item, Ge):
            yield item.ge, False


def numbers(kind: type, metadata: tuple[object, ...]) -> st.SearchStrategy:
    least, excluded = next(bounds(metadata), (None, False))
    if kind is int:
        return st.integers(min_value=None if least is None else int(least) + excluded)
    return st.floats(min_value=least, exclude_min=excluded, allow_nan=False, allow_infinity=False)


def values(kind: Any) -> st.SearchStrategy:
    """A strategy for any annotation that records use; an annotation it does not know fails the test."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return numbers(arguments[0], arguments[1:])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=2).map(tuple)
        return st.tuples(*map(values, arguments))
    if isinstance(kind, EnumType):
        return st.sampled_from(list(kind))
    if kind is BatchPlan:
        return st.builds(plan, st.integers(1), st.integers(1), st.integers(1), values(float | None))
    if isinstance(kind, type) and issubclass(kind, Record):
        return st.deferred(
            lambda: st.builds(
                kind,
                **{name: values(hint) for name, hint in get_type_hints(kind, include_extras=True).items() if name in kind.model_fields},
            )
        )
    simple = {int: st.integers(), float: numbers(float, ()), str: st.text(max_size=5), bool: st.booleans(), type(None): st.none()}
    return simple[kind]


def plan(micro: int, steps: int, ranks: int, lr: float | None) -> BatchPlan:
    rate = abs(lr) if lr else None
    return BatchPlan(global_batch_size=micro * steps * ranks, micro_batch_size=micro, accumulation_steps=steps, world_size=ranks, lr=rate)


@pytest.mark.parametrize("name", KINDS)
def test_record_round_trips(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    kind = KINDS[name]

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(record=values(kind))
    def check(record: Record) -> None:
        text = record.model_dump_json()
        again = validate(kind, record.model_dump(mode="json"), tmp_path_factory.getbasetemp())
        assert again == record
        assert kind.model_validate_json(text, strict=True) == record
        assert again.model_dump_json() == text

    check()


@given(value=st.floats(allow_nan=False, allow_infinity=False))
@settings(derandomize=True, database=None)
def test_numbers_survive_bit_for_bit(value: float) -> None:
    from rightbatch.records.estimates import Estimate

    again = Estimate.model_validate_json(Estimate(value=value, low=None, high=None, n=0).model_dump_json()).value
    assert (again, math.copysign(1, again)) == (value, math.copysign(1, value))
