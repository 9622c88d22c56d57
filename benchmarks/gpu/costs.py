"""What the host pays for each call of the device, and for the one wait a layer."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.figures import median_s, microseconds, open_gpu
from benchmarks.gpu.steps import StepInput
from runner.devices.device import Device

_N_CALLS = 200


def measure(_: StepInput) -> dict[str, object]:
    """Return microseconds a call."""
    device = open_gpu()
    try:
        return dict(call_costs(device, device.torch_device))
    finally:
        device.close()


def call_costs(device: Device, torch_device: torch.device) -> dict[str, float]:
    """Return microseconds of a launch, a record, a wait, and of a layer's wait for a small buffer of the host."""
    event = device.new_event("measured")
    on_host = device.new_host_buffer("choice", torch.zeros(8))
    with device.computing():
        values = torch.zeros(8, device=torch_device)

    def add() -> None:
        values.add_(1.0)

    def launch() -> None:
        device.launch(add)

    def copy_back() -> None:
        on_host.tensor.copy_(values, non_blocking=True)

    def layer_wait() -> None:
        device.launch(copy_back, writes=[on_host])
        device.compute.record(event)
        device.synchronize(event)

    device.compute.record(event)
    calls = {
        "launch": launch,
        "record": lambda: device.compute.record(event),
        "wait": lambda: device.copies.wait(event),
        "layer_wait": layer_wait,
    }
    return {name: microseconds(median_s(partial(_repeat, device, call), 5) / _N_CALLS) for name, call in calls.items()}


def _repeat(device: Device, call: Callable[[], None]) -> None:
    for _ in range(_N_CALLS):
        call()
    device.drain()
