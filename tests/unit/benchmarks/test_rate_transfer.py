import math

import numpy as np
import pytest

from rate_transfer import Rates, losses


def bowl(best, *, least=1000.0):
    """Samples that rise with the square of the logarithm of the rate over the best."""
    log_rates = math.log(best) + math.log(2) * np.array([-1.0, -0.5, 0.1, 0.6, 1.1])
    return Rates(log_rates, math.log(least) + 0.5 * (log_rates - math.log(best)) ** 2, (0,) * len(log_rates))


def test_the_best_rate_is_found_between_those_that_were_trained():
    assert math.exp(bowl(0.3).best) == pytest.approx(0.3, rel=1e-6)


def test_a_rate_that_follows_the_planted_saturation_costs_next_to_nothing():
    noise = 50.0
    rates = {size: bowl(0.1 * (1 + 2 * noise / 64) / (1 + 2 * noise / size)) for size in (32, 64, 128)}

    cost = {factor: np.mean(list(losses(rates, noise, factor).values())) for factor in (0.5, 2.0, math.inf)}

    assert cost[2.0] < 0.01
    assert min(cost[0.5], cost[math.inf]) > 2 * cost[2.0]


def test_beyond_the_rates_that_were_trained_the_nearest_counts():
    rates = bowl(0.1)

    assert rates.loss(10.0) == rates.loss(float(rates.log_rates[-1]))
