"""How training is predicted to scale over devices that train together."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from rightbatch.records.estimates import Estimate
from rightbatch.records.record import Record


class Interconnect(Record):
    """What gradients are exchanged over, as the user states it."""

    bytes_per_s: PositiveFloat
    """What each device sends, and receives, in a second."""
    latency_s: NonNegativeFloat = 0.0
    """Seconds that a message takes however short it is."""


class DevicePoint(Record):
    """What training on so many devices is predicted to take, at the global batch that is best for that number."""

    ranks: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    accumulation_steps: PositiveInt
    exchange_time_s: NonNegativeFloat
    """Seconds of a step spent exchanging gradients."""
    relative_time: Estimate
    """Time to target over that of one device: median and 90 % interval."""
    efficiency: Estimate
    """Speed-up over one device, divided by the number of devices: median and 90 % interval."""
    evidence: Literal["measured", "composed", "extrapolated"]


class DeviceCurve(Record):
    """Time and efficiency by number of devices."""

    points: tuple[DevicePoint, ...]
    """In ascending order of the number; the first is one device."""
    pays_up_to: Estimate
    """Largest number of those tried up to which the efficiency stays at half or more; ``AT_LEAST`` when it does at all of them."""
    interconnect: Interconnect | None
    """What the exchange was computed with; none assumes that it takes no time."""
    gradient_bytes: PositiveInt
    """What each device exchanges in a step."""
