"""Slow obvious twin of the samples curve: one draw and one size at a time, the level integrated out by quadrature."""

import math

from scipy.integrate import quad
from scipy.stats import norm

from rightbatch.records.training import ProbeOutcome


def log_samples(draws, row, size):
    critical, low = math.exp(draws.log_critical[row]), math.exp(draws.log_low[row])
    features = len(draws.frequencies[row])
    waves = sum(math.cos(w * math.log(size) + phase) for w, phase in zip(draws.frequencies[row], draws.phases[row], strict=True))
    rise = math.log(1 + (size / critical) ** draws.exponent[row])
    return rise + math.log(1 + low / size) + draws.discrepancy_sd * math.sqrt(2 / features) * waves


def spread(draws, row, size):
    hot = math.log(1 + math.exp(draws.log_low[row]) / size)
    return math.sqrt(draws.run_log_sd[row] ** 2 + (draws.heat * hot) ** 2)


def log_rate_cost(draws, row, size, lr_over_rule):
    x = lr_over_rule / math.exp(draws.rates.log_best[row] + draws.rates.slope[row] * math.log(size / draws.rates.size))
    return -math.log(max(2 * x - x * x, 0.1))


def expected_of(draws, row, probe):
    expected = log_samples(draws, row, probe.global_batch_size)
    return expected if draws.rates is None else expected + log_rate_cost(draws, row, probe.global_batch_size, probe.lr_over_rule)


def likelihood(draws, row, probes):
    """Density of the reached probes with a flat prior on the level."""

    def density(level):
        product = 1.0
        for probe in probes:
            assert probe.outcome is ProbeOutcome.REACHED
            expected = level + expected_of(draws, row, probe)
            product *= norm.pdf(math.log(probe.samples), expected, spread(draws, row, probe.global_batch_size))
        return product

    centre = math.log(probes[0].samples) - expected_of(draws, row, probes[0])
    return quad(density, centre - 6, centre + 6, points=[centre], limit=400)[0]
