"""The find command's own options reach the request."""

import pytest

from rightbatch.cli.measure import build_request, interconnect
from rightbatch.cli.options import FindOptions, MeasureOptions, MemoryOptions
from rightbatch.errors import UsageError
from rightbatch.records.devices import Interconnect


def test_stated_link_reaches_the_constraints():
    wanted = FindOptions(link_speed=10**9, link_latency=2e-5)

    request = build_request("find", MeasureOptions(), wanted, MemoryOptions())

    assert request.constraints.interconnect == Interconnect(bytes_per_s=1e9, latency_s=2e-5)


def test_link_is_unknown_unless_its_speed_is_stated():
    assert interconnect(FindOptions()) is None
    assert interconnect(FindOptions(link_speed=5)).latency_s == 0.0


def test_latency_without_a_speed_is_refused():
    with pytest.raises(UsageError, match="--link-latency needs --link-speed"):
        interconnect(FindOptions(link_latency=1e-5))
