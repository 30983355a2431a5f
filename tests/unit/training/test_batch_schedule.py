"""Everyone who asks a schedule about the same samples is told the same, before and after decisions, saving and loading."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.errors import UsageError
from rightbatch.fits.batch_schedule import setting_at
from rightbatch.records.estimates import Estimate, NoiseScale, NoiseSnapshot, Status
from rightbatch.records.schedule import GeometricGrowth, NoiseAdaptive, SizeCoupling
from rightbatch.training.batch_schedule import DynamicBatch

COUPLING = SizeCoupling(base_batch_size=64, optimizer="SGD", noise_scale_samples=200.0)
ADAPTIVE = NoiseAdaptive(start=64, smallest=8, largest=4096, half_saturation=200.0, calibration=1.0, coupling=COUPLING)
EVENTS = st.lists(st.sampled_from(["load", "step"]) | st.floats(1.0, 1e5), max_size=60)


def noise(*values):
    def known(value):
        return Estimate(value=value, low=0.9 * value, high=1.1 * value, n=1000)

    snapshots = tuple(
        NoiseSnapshot(
            samples_seen=100 * i,
            noise_scale=known(value),
            grad_sq_norm=known(1.0),
            grad_noise_trace=known(value),
            micro_batch_size=8,
            micro_batch_count=125,
        )
        for i, value in enumerate(values)
    )
    return NoiseScale(**known(values[0]).model_dump(), snapshots=snapshots, pilot_samples=100)


class Run:
    """A loader that draws at most eight batches ahead of the stepper that trains on them."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.loaded = self.trained = 0
        self.waiting = []
        self.settings = []

    def take(self, event):
        if isinstance(event, float):
            self.schedule.decide(noise(event))
        elif event == "load" and len(self.waiting) < 8:
            setting = self.schedule.setting_at(self.loaded)
            self.loaded += setting.global_batch_size
            self.waiting.append(setting)
        elif event == "step" and self.waiting:
            setting = self.schedule.setting_at(self.trained)
            assert setting == self.waiting.pop(0)
            self.trained += setting.global_batch_size
            self.settings.append(setting)


@given(EVENTS)
def test_loader_ahead_and_stepper_behind_see_the_same_settings(events):
    run = Run(DynamicBatch(ADAPTIVE))
    for event in [*events, *["step"] * 8]:
        run.take(event)

    assert not run.waiting


@given(EVENTS, EVENTS)
def test_resumed_run_goes_on_as_the_uninterrupted_one(before, after):
    whole, resumed = Run(DynamicBatch(ADAPTIVE)), Run(DynamicBatch(ADAPTIVE))
    for event in before:
        whole.take(event)
    resumed.schedule.load_state_dict(whole.schedule.state_dict())
    resumed.loaded, resumed.trained, resumed.waiting = whole.loaded, whole.trained, list(whole.waiting)
    whole.settings.clear()
    for event in after:
        whole.take(event)
        resumed.take(event)

    assert resumed.settings == whole.settings
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()


@given(st.lists(st.integers(0, 10_000) | st.floats(1.0, 1e5), max_size=40))
def test_answer_once_given_never_changes(events):
    schedule, told = DynamicBatch(ADAPTIVE), {}
    for event in events:
        if isinstance(event, float):
            schedule.decide(noise(event))
        else:
            assert told.setdefault(event, schedule.setting_at(event)) == schedule.setting_at(event)

    assert all(schedule.setting_at(position) == setting for position, setting in told.items())
    positions = [decision.samples_seen for decision in schedule.decisions]
    assert positions == sorted(set(positions))


def test_decision_holds_from_beyond_what_was_asked():
    schedule = DynamicBatch(ADAPTIVE)
    schedule.setting_at(640)

    assert schedule.decide(noise(1e5))
    assert [decision.samples_seen for decision in schedule.decisions] == [641]
    assert schedule.setting_at(640).global_batch_size == 64
    assert schedule.setting_at(704).global_batch_size == 128


def test_latest_snapshot_decides_not_the_average_of_the_run():
    schedule = DynamicBatch(ADAPTIVE)

    assert not schedule.decide(noise(1e5, 64**2 / 200))
    assert schedule.decide(noise(64**2 / 200, 1e5))


def test_noise_that_says_nothing_changes_nothing():
    schedule = DynamicBatch(ADAPTIVE)
    silent = noise(1e5).model_copy(update={"snapshots": (), "status": Status.INDETERMINATE})

    assert not schedule.decide(silent)
    assert schedule.decisions == ()


def test_training_with_a_planted_noise_scale_follows_the_optimum():
    schedule = DynamicBatch(ADAPTIVE)
    samples, ratios = 0, []
    for step in range(250):
        planted = 20.0 * (1 + samples / 5000) ** 2
        size = schedule.setting_at(samples).global_batch_size
        samples += size
        ratios.append(size / math.sqrt(planted * 200.0))
        if step % 4 == 0:
            schedule.decide(noise(planted))

    assert planted > 1000
    assert np.max(np.abs(np.log(ratios[20:]))) < 0.2
    assert len(schedule.decisions) <= 8 * math.log2(size / 64) + 1  # as many friendly sizes as there are on the way


def test_schedule_of_samples_alone_takes_no_decision():
    records = GeometricGrowth(start=64, stop=512, over_samples=10_000, coupling=COUPLING)
    schedule = DynamicBatch(records)

    assert not schedule.decide(noise(1e5))
    assert not schedule.is_adaptive
    assert schedule.setting_at(5000) == setting_at(records, 5000)


def test_state_is_plain_enough_for_weights_only():
    schedule = DynamicBatch(ADAPTIVE)
    schedule.setting_at(64)
    schedule.decide(noise(1e5))
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)

    other = DynamicBatch(ADAPTIVE)
    other.load_state_dict(torch.load(file, weights_only=True))

    assert other.decisions == schedule.decisions


def test_state_of_another_kind_is_refused():
    state = DynamicBatch(GeometricGrowth(start=64, stop=512, over_samples=10_000)).state_dict()

    with pytest.raises(UsageError, match="geometric for noise"):
        DynamicBatch(ADAPTIVE).load_state_dict(state)


def test_negative_position_is_refused():
    with pytest.raises(UsageError, match="at least 0; got -1"):
        DynamicBatch(ADAPTIVE).setting_at(-1)
