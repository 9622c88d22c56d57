"""The devices a model can be computed on, and which one is taken."""

import re

from runner.devices.link_speed import LINK_PREFIX, parse_link
from runner.errors import DeviceUnavailable

CPU = "cpu"
DEVICES = "auto, cpu, cuda, cuda:N or link:SPEED (as in link:12GB/s)"

_CUDA = re.compile(r"cuda(:\d{1,3})?", re.ASCII)


def check_device(name: str) -> None:
    """Raise DeviceUnavailable unless there can be a device of that name."""
    if name.startswith(LINK_PREFIX):
        parse_link(name)
    elif name not in ("auto", CPU) and not _CUDA.fullmatch(name):
        raise DeviceUnavailable(f"{DEVICES} is expected, {name!r:.80} came")


def choose_device(name: str) -> str:
    """Return the device to compute on, by its full name; raise DeviceUnavailable."""
    check_device(name)
    if name in ("auto", CPU):
        return CPU
    if _CUDA.fullmatch(name):
        raise DeviceUnavailable(
            "device cuda: computing on GPUs comes with a later version; leave --device out (or say --device cpu) now"
        )
    return name
