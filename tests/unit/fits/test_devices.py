"""More devices follow the closed form of an affine step and a hyperbola, and stop paying where it says."""

import math

import numpy as np
import pytest

from oracles.oracle_curves import law_s, loader, noise, timed, workload
from rightbatch.fits.devices import exchange_time_s, fit_devices
from rightbatch.fits.step_time import fit_step_time
from rightbatch.fits.tradeoff import draw_costs
from rightbatch.records.devices import Interconnect
from rightbatch.records.estimates import Status
from rightbatch.records.plan import Constraints

FIXED_S, RATE = 0.02, 8000.0
HALF = FIXED_S * RATE
GRID = tuple(sorted({round(2 ** (i / 8)) for i in range(8, 120)}))
"""Sizes so close together that the best of them costs the least possible to within a thousandth."""
ALONE = Constraints()
MANY = workload(train_size=10**8)


def planted(critical, *, constraints=ALONE, sizes=GRID, work=MANY, **given):
    """Curves of a device with a planted law whose critical batch size is known exactly."""
    curve = fit_step_time(timed({b: law_s(b, FIXED_S, RATE) for b in sizes}))
    shared = {"step_time": curve, "loader": None, "noise_scale": noise(), "memory": None, "workload": work, "constraints": constraints}
    draws = draw_costs(**{**shared, **given}, rng=np.random.default_rng(0))
    draws.curves.log_critical[:] = math.log(critical)
    return fit_devices(draws, workload=work, constraints=constraints)


def closed_form(ranks, ratio):
    return ((1 + math.sqrt(ratio)) / (math.sqrt(ranks) + math.sqrt(ratio))) ** 2


@pytest.mark.parametrize("ratio", [1.0, 16.0, 100.0])
def test_efficiency_follows_the_closed_form_of_an_affine_step_and_a_hyperbola(ratio):
    curve = planted(ratio * HALF)

    assert len(curve.points) >= 4
    for point in curve.points:
        assert point.efficiency.value == pytest.approx(closed_form(point.ranks, ratio), rel=3e-3)
        assert point.relative_time.value == pytest.approx(1 / (point.ranks * closed_form(point.ranks, ratio)), rel=3e-3)
        assert point.global_batch_size == pytest.approx(math.sqrt(ratio * point.ranks) * HALF, rel=0.1)


@pytest.mark.parametrize(("ratio", "limit"), [(1.0, 2), (16.0, 8), (100.0, 16), (400.0, 64)])
def test_devices_stop_paying_where_the_closed_form_falls_below_half(ratio, limit):
    assert closed_form(limit, ratio) >= 0.5 > closed_form(2 * limit, ratio)

    curve = planted(ratio * HALF)

    assert (curve.pays_up_to.value, curve.pays_up_to.low, curve.pays_up_to.high) == (limit, limit, limit)
    assert curve.pays_up_to.status is Status.OK
    assert curve.points[-1].ranks == max(8, 2 * limit)


def test_efficiency_where_devices_times_half_saturation_is_the_critical_size_is_a_quarter_or_more():
    for ratio in (4.0, 64.0, 256.0):
        efficiency = closed_form(ratio, ratio)
        assert 0.25 < efficiency == pytest.approx(((1 + math.sqrt(ratio)) / (2 * math.sqrt(ratio))) ** 2)


def test_dataset_that_ends_the_table_leaves_only_a_lower_bound():
    curve = planted(1e6 * HALF, sizes=(64, 128), work=workload(train_size=600, couples_samples=True))

    assert [point.ranks for point in curve.points] == [1, 2, 4, 8]
    assert curve.points[-1].global_batch_size == 512
    assert (curve.pays_up_to.status, curve.pays_up_to.value, curve.pays_up_to.high) == (Status.AT_LEAST, 8, None)


def test_exchange_takes_the_time_of_a_ring_and_costs_efficiency():
    link = Interconnect(bytes_per_s=1e9, latency_s=1e-3)
    work = workload(train_size=10**8, trainable_parameter_count=10**6)

    curve = planted(16 * HALF, constraints=Constraints(interconnect=link), work=work)

    free = planted(16 * HALF, work=work)
    for point, without in zip(curve.points[1:], free.points[1:], strict=False):
        r = point.ranks
        assert point.exchange_time_s == pytest.approx(2 * (r - 1) * (1e-3 + 4e6 / r / 1e9))
        assert point.efficiency.value < without.efficiency.value
    assert curve.gradient_bytes == 4 * 10**6
    assert curve.points[0].efficiency.value == 1.0


def test_exchange_needs_a_partner_and_a_stated_link():
    link = Interconnect(bytes_per_s=1e9)
    assert exchange_time_s(10**9, 1, link) == 0.0
    assert exchange_time_s(10**9, 8, None) == 0.0
    assert exchange_time_s(10**9, 8, link) == pytest.approx(2 * 7 / 8)


def test_wider_belief_about_the_critical_size_widens_the_number_of_devices_that_pay():
    curve = fit_step_time(timed({b: law_s(b, FIXED_S, RATE) for b in GRID}))
    draws = draw_costs(
        step_time=curve, loader=None, noise_scale=noise(2000.0), memory=None, workload=MANY, constraints=Constraints(),
        rng=np.random.default_rng(0),
    )  # fmt: skip
    scaling = fit_devices(draws, workload=MANY, constraints=Constraints())

    assert scaling.pays_up_to.low < scaling.pays_up_to.value < scaling.pays_up_to.high
    assert all(point.efficiency.low < point.efficiency.value < point.efficiency.high for point in scaling.points[1:])


def test_only_one_device_was_measured_and_the_planned_number_is_always_shown():
    curve = planted(HALF, constraints=Constraints(world_size=12))

    assert {point.ranks: point.evidence for point in curve.points} == {
        1: "measured", 2: "extrapolated", 4: "extrapolated", 8: "extrapolated", 12: "extrapolated",
    }  # fmt: skip


def test_loader_of_each_process_limits_its_own_device_only():
    slow = planted(16 * HALF, loader=loader(100.0))

    assert slow.points[1].efficiency.value > 0.9


def test_without_a_noise_scale_nothing_is_said():
    curve = fit_step_time(timed({b: law_s(b, FIXED_S, RATE) for b in GRID}))
    draws = draw_costs(
        step_time=curve, loader=None, noise_scale=None, memory=None, workload=MANY, constraints=Constraints(), rng=np.random.default_rng(0)
    )
    assert fit_devices(draws, workload=MANY, constraints=Constraints()) is None
