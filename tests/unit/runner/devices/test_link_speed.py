import re

import pytest

from runner.devices.link_speed import LinkSpeed, parse_link
from runner.errors import DeviceUnavailable


@pytest.mark.parametrize(
    ("device", "bytes_per_s", "latency_s"),
    [
        ("link:12GB/s", 12e9, 0.0),
        ("link:800MB/s", 800e6, 0.0),
        ("link:2GiB/s", 2.0 * 2**30, 0.0),
        ("link:0.5MiB/s", 0.5 * 2**20, 0.0),
        ("link:12GB/s,10us", 12e9, 10e-6),
        ("link:12GB/s,1.5ms", 12e9, 1.5e-3),
        ("link:12GB/s,0us", 12e9, 0.0),
    ],
)
def test_a_links_name_states_its_speed_and_latency(device: str, bytes_per_s: float, latency_s: float) -> None:
    speed = parse_link(device)

    assert speed.bytes_per_s == bytes_per_s
    assert speed.latency_s == pytest.approx(latency_s, rel=1e-12)


@pytest.mark.parametrize(
    "speed", ["", "12", "GB/s", "12 GB/s", "12gb/s", "12GBps", "-1GB/s", "1e9GB/s", "nanGB/s", "\u0661GB/s"]
)
def test_a_speed_that_is_none_is_refused_with_what_was_expected(speed: str) -> None:
    expected = (
        f"device {'link:' + speed!r}: the speed is a number and one of MB/s, GB/s, MiB/s, GiB/s"
        f" (as in link:12GB/s or link:12GB/s,10us), not {speed!r}"
    )

    with pytest.raises(DeviceUnavailable, match=re.escape(expected)):
        parse_link(f"link:{speed}")


@pytest.mark.parametrize("latency", ["", "10", "us", "10 us", "-1us", "10us,", "1s"])
def test_a_latency_that_is_none_is_refused_with_what_was_expected(latency: str) -> None:
    with pytest.raises(DeviceUnavailable, match=rf"the latency is a number and one of us, ms .* not '{latency}'"):
        parse_link(f"link:12GB/s,{latency}")


def test_a_link_without_speed_is_refused() -> None:
    with pytest.raises(DeviceUnavailable, match="device 'link:0GB/s': the speed must be above 0"):
        parse_link("link:0GB/s")


def test_a_copy_takes_the_latency_and_what_its_bytes_take() -> None:
    assert LinkSpeed(1e9, 10e-6).copy_s(500_000) == pytest.approx(510e-6, rel=1e-12)
