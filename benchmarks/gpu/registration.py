"""Page-locking a store's memory: which ways the driver takes, what each costs, and whom it stalls meanwhile.

sealed read-only    as a runner maps a store now
writable            what a store that is loaded for it could offer
collapsed           writable, in huge pages

A second process reads the same memory all the while, and says the longest time between two of its reads.
"""

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic, perf_counter

import torch
from torch import Tensor

from benchmarks.gpu.figures import MIB, gb_per_s, median_s, open_gpu
from benchmarks.gpu.steps import StepInput
from protocol.segment import SegmentBuilder, map_segment
from runner.devices.cuda_registration import (
    CudaDriver,
    HostRange,
    LibCuda,
    Refused,
    contiguous_ranges,
    register,
)
from runner.devices.device import Device

_NBYTES = 1 << 30
_CHUNK_NBYTES = 64 * MIB


def measure(_: StepInput) -> dict[str, object]:
    """Return every way's figures."""
    device, driver = open_gpu(), LibCuda()
    try:
        return {
            name: measure_mode(device, driver, name, _NBYTES) for name in ("sealed read-only", "writable", "collapsed")
        }
    finally:
        device.close()


def measure_mode(device: Device, driver: CudaDriver, mode: str, nbytes: int) -> dict[str, object]:
    """Return what registering so much memory of that kind costs, and how fast the device reads it then."""
    with ExitStack() as owned:
        memory, fd = owned.enter_context(_memory(mode, nbytes))
        with reader(fd, nbytes) as alone:
            device.drain()
        with reader(fd, nbytes) as meanwhile:
            began_s = perf_counter()
            outcome = register(
                driver,
                contiguous_ranges([HostRange(memory.data_ptr(), nbytes)]),
                is_read_only=mode == "sealed read-only",
            )
            took_s = perf_counter() - began_s
        figures: dict[str, object] = {
            "s_per_gb": round(took_s / (nbytes / 1e9), 4),
            "longest_pause_of_a_reader_ms": {"alone": alone[0], "meanwhile": meanwhile[0]},
        }
        if isinstance(outcome, Refused):
            return figures | {"refused": outcome.reason}
        figures["copy_gb_per_s"] = copied_gb_per_s(device, memory)
        began_s = perf_counter()
        outcome.close()
        return figures | {"unregister_s_per_gb": round((perf_counter() - began_s) / (nbytes / 1e9), 4)}


def copied_gb_per_s(device: Device, memory: Tensor) -> float:
    """Return how fast the device copies from that memory as it is."""
    nbytes = min(_CHUNK_NBYTES, memory.numel())
    slot, copied = device.new_slot("registration slot", nbytes), device.new_event("registration copy")

    def copy() -> None:
        device.copy_in(memory, slot, 0, nbytes)
        device.copies.record(copied)
        device.synchronize(copied)

    return gb_per_s(nbytes, median_s(copy, 9))


@contextmanager
def reader(fd: int, nbytes: int) -> Iterator[list[float]]:
    """Have another process read the memory; the list holds its longest pause in milliseconds afterwards."""
    longest_ms: list[float] = []
    command = [sys.executable, "-m", "benchmarks.gpu.reader", str(fd), str(nbytes)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(fd,))
    try:
        assert process.stdout is not None  # noqa: S101 - for mypy: it is a pipe
        process.stdout.readline()  # it reads now
        yield longest_ms
    finally:
        printed, _ = process.communicate()
    longest_ms.append(round(float(printed), 3))


@contextmanager
def _memory(mode: str, nbytes: int) -> Iterator[tuple[Tensor, int]]:
    """Yield memory of that kind with a descriptor of it."""
    if mode == "sealed read-only":
        with SegmentBuilder("expertd-gpu", nbytes) as builder:
            builder.populate(0, nbytes, collapse_until=monotonic())
            fd = builder.seal()
        with contextlib.closing(_Descriptor(fd)):
            yield torch.frombuffer(map_segment(fd, nbytes), dtype=torch.uint8), fd
        return
    fd = os.memfd_create("expertd-gpu", os.MFD_CLOEXEC)
    with contextlib.closing(_Descriptor(fd)):
        os.ftruncate(fd, nbytes)
        mapped = mmap.mmap(fd, nbytes)
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        memory.zero_()
        if mode == "collapsed":
            with contextlib.suppress(OSError):  # a kernel that cannot: the figures are those of small pages then
                mapped.madvise(_MADV_COLLAPSE)
        yield memory, fd


_MADV_COLLAPSE = 25


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)
