"""Small helpers of the steps: timing what a device does, and the numbers that are reported of it."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from runner.devices.cuda import CudaDevice
from runner.devices.cuda_runtime import TorchRuntime
from runner.devices.device import Device

MIB = 1 << 20


def open_gpu() -> CudaDevice:
    """Return the first GPU as the runner uses it."""
    return CudaDevice(TorchRuntime(0))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that the call takes."""
    began_s = perf_counter()
    work()
    return perf_counter() - began_s


def median_s(work: Callable[[], object], n_times: int) -> float:
    """Return the median of so many calls' seconds; a first one is not counted."""
    work()
    return median(timed(work) for _ in range(n_times))


def gb_per_s(nbytes: int, seconds: float) -> float:
    """Return the speed, rounded as it is reported."""
    return round(nbytes / seconds / 1e9, 3)


def microseconds(seconds: float) -> float:
    """Return them, rounded as they are reported."""
    return round(seconds * 1e6, 2)


class Busy:
    """Work that keeps the compute queue busy for about so long: products of square matrices, measured beforehand."""

    def __init__(self, device: Device, torch_device: torch.device, *, size: int = 2048) -> None:
        self._device = device
        dtype = torch.float16 if torch_device.type == "cuda" else torch.float32
        with device.computing():
            self._matrix = torch.zeros(size, size, dtype=dtype, device=torch_device)
            self._product = torch.empty_like(self._matrix)
        self._done = device.new_event("busy work done")
        self._each_s = median_s(self._run_one, 9)

    def launch(self, seconds: float) -> None:
        """Submit work for about that long."""
        self._launch(max(1, round(seconds / self._each_s)))

    def _launch(self, n_times: int) -> None:
        def work() -> None:
            for _ in range(n_times):
                torch.mm(self._matrix, self._matrix, out=self._product)

        self._device.launch(work)

    def _run_one(self) -> None:
        self._launch(1)
        self._device.compute.record(self._done)
        self._device.synchronize(self._done)
