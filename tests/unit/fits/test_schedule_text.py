"""A schedule reads back from its own word; a wrong word gets an error that shows the right form."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.errors import UsageError
from rightbatch.fits.schedule_text import FORMS, parse_schedule, schedule_text
from rightbatch.records.schedule import (
    ConstantSize,
    GeometricGrowth,
    GrowthForDecay,
    LinearGrowth,
    MilestoneSizes,
    NoiseAdaptive,
)

SIZES = st.integers(1, 10**6)
SAMPLES = st.integers(1, 10**12)
ABOVE_ONE = st.floats(1.0, 1e6, exclude_min=True)
POSITIVE = st.floats(1e-300, 1e300)


@st.composite
def schedules(draw):
    ascending = sorted(draw(st.sets(SAMPLES, min_size=1, max_size=5)))
    low, middle, high = sorted(draw(st.tuples(SIZES, SIZES, SIZES)))
    growth = {"start": draw(SIZES), "stop": draw(SIZES), "over_samples": draw(SAMPLES)}
    return draw(
        st.sampled_from(
            [
                ConstantSize(global_batch_size=low),
                MilestoneSizes(milestones=((0, high), *zip(ascending, itertools.repeat(middle), strict=False))),
                LinearGrowth(**growth),
                GeometricGrowth(**growth),
                GrowthForDecay(start=low, factor=draw(ABOVE_ONE), at_samples=tuple(ascending), largest=high),
                NoiseAdaptive(
                    start=middle,
                    smallest=low,
                    largest=high,
                    half_saturation=draw(POSITIVE),
                    calibration=draw(POSITIVE),
                    hysteresis=draw(st.floats(0, 1)),
                    most_growth=draw(ABOVE_ONE),
                ),
            ]
        )
    )


@given(schedules())
def test_schedule_reads_back_from_its_own_word(schedule):
    assert parse_schedule(schedule_text(schedule)) == schedule


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_that_an_error_shows_is_read_as_its_kind(kind):
    assert parse_schedule(FORMS[kind]).kind == kind


def test_defaults_of_the_noise_adaptive_kind_need_not_be_written():
    schedule = parse_schedule("noise:64,16..1024,half=240,c=1.3")

    assert (schedule.hysteresis, schedule.most_growth) == (0.05, 2.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exponential:64..512@100", "a batch schedule is 64, milestones:0=64,100000=256, .* or noise:.*; got 'exponential:64..512@100'"),
        ("sixty", "a batch schedule is 64, milestones:0=64,100000=256, .* or noise:.*; got 'sixty'"),
        ("noise", "'noise' is no batch schedule: .*; write it like noise:64"),
        ("0", "greater than 0"),
        ("linear:64..512", "form of its kind; write it like linear:64..512@200000"),
        ("geometric:64..0@5", "greater than 0; write it like geometric"),
        ("milestones:10=64", "begin at 0; got 10; write it like milestones:"),
        ("milestones:0=64,,5=7", "form of its kind"),
        ("grow:64x1.0@5..128", "greater than 1; write it like grow:"),
        ("grow:64xe@5..128", "form of its kind"),
        ("grow:64x1.2.3@5..128", "could not convert"),
        ("noise:64,16..1024", "c and half must be given; write it like noise:"),
        ("noise:64,16..1024,half=240,c=1.3,speed=2", "speed is none of half, c, hysteresis, most"),
        ("noise:8,16..1024,half=240,c=1.3", "between smallest and largest; got 8, 16 and 1024; write"),
    ],
)
def test_wrong_word_is_refused_with_the_right_form(text, words):
    with pytest.raises(UsageError, match=words):
        parse_schedule(text)
