"""The devices a model can be computed on, and which one is taken."""

import re
from pathlib import Path

from runner.devices.link_speed import LINK_PREFIX, parse_link
from runner.errors import DeviceUnavailable

AUTO = "auto"
CPU = "cpu"
DEVICES = "auto, cpu, cuda, cuda:N or link:SPEED (as in link:12GB/s)"

# The driver's own file: where it is missing, torch need not be imported to know that no GPU can be used.
_CUDA_DRIVER = Path("/dev/nvidiactl")

_CUDA = re.compile(r"cuda(:\d{1,3})?", re.ASCII)


def check_device(name: str) -> None:
    """Raise DeviceUnavailable unless there can be a device of that name."""
    if name.startswith(LINK_PREFIX):
        parse_link(name)
    elif name not in (AUTO, CPU) and not _CUDA.fullmatch(name):
        raise DeviceUnavailable(f"{DEVICES} is expected, {name!r:.80} came")


def choose_device(name: str) -> str:
    """Return the device to compute on, by its full name; raise DeviceUnavailable."""
    check_device(name)
    if name == AUTO:
        return "cuda:0" if _CUDA_DRIVER.exists() and why_no_gpu(0) is None else CPU
    if not _CUDA.fullmatch(name):
        return name
    index = int(name.partition(":")[2] or "0")
    reason = why_no_gpu(index)
    if reason is not None:
        raise DeviceUnavailable(f"device {name}: {reason}; --device cpu computes without a GPU")
    return f"cuda:{index}"


def is_gpu(name: str) -> bool:
    """Return whether a device's full name is a GPU's."""
    return _CUDA.fullmatch(name) is not None


def why_no_gpu(index: int) -> str | None:
    """Return what keeps that GPU from being used, None if nothing does."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    n_gpus = torch.cuda.device_count()
    if not n_gpus:
        return "torch finds no GPU that it can use; nvidia-smi says whether the driver does"
    return None if index < n_gpus else f"there is no such GPU, {n_gpus} can be used"
