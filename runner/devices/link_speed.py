"""How fast the stand-in accelerator's link is: the device's name read, and what each copy takes."""

import re
from dataclasses import dataclass

from runner.errors import DeviceUnavailable

LINK_PREFIX = "link:"
_EXAMPLES = "link:12GB/s or link:12GB/s,10us"
_BYTES_PER_S = {"MB/s": 1e6, "GB/s": 1e9, "MiB/s": float(1 << 20), "GiB/s": float(1 << 30)}
_LATENCY_S = {"us": 1e-6, "ms": 1e-3}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z/]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a copy takes."""

    bytes_per_s: float
    latency_s: float = 0.0

    def copy_s(self, nbytes: int) -> float:
        """Return how long a copy of that many bytes occupies the link."""
        return self.latency_s + nbytes / self.bytes_per_s


def parse_link(device: str) -> LinkSpeed:
    """Return the speed that a device's name states, like link:12GB/s,10us; raise DeviceUnavailable."""
    speed, comma, latency = device.removeprefix(LINK_PREFIX).partition(",")
    bytes_per_s = _quantity(device, "speed", speed, _BYTES_PER_S)
    if bytes_per_s <= 0:
        raise DeviceUnavailable(f"device {device!r}: the speed must be above 0")
    latency_s = _quantity(device, "latency", latency, _LATENCY_S) if comma else 0.0
    return LinkSpeed(bytes_per_s, latency_s)


def _quantity(device: str, name: str, text: str, units: dict[str, float]) -> float:
    """Return a number with its unit, in the base unit; raise DeviceUnavailable."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        raise DeviceUnavailable(
            f"device {device!r}: the {name} is a number and one of {', '.join(units)} (as in {_EXAMPLES}), not {text!r}"
        )
    return float(match[1]) * units[match[2]]
