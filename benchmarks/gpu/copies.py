"""How fast records reach the GPU: by size of chunk and way, while it computes and while it does not; and whether both
go on at once, as events say.
"""

import torch
from torch import Tensor

from benchmarks.gpu.figures import MIB, Busy, gb_per_s, median_s, open_gpu, timed
from benchmarks.gpu.steps import StepInput
from runner.devices.device import Device
from runner.experts.staging import Stager

_CHUNKS_NBYTES = (1 * MIB, 4 * MIB, 8 * MIB, 32 * MIB)
_STAGERS = (1, 2, 3, 4)
_TOTAL_NBYTES = 128 * MIB


def measure(_: StepInput) -> dict[str, object]:
    """Return the speeds and the overlap."""
    device = open_gpu()
    try:
        busy = Busy(device, device.torch_device)
        return {
            "gb_per_s": {
                f"{chunk // MIB} MiB": copy_speeds(device, busy, chunk, _TOTAL_NBYTES) for chunk in _CHUNKS_NBYTES
            },
            "overlap": overlap(device, busy, _TOTAL_NBYTES),
        }
    finally:
        device.close()


def copy_speeds(device: Device, busy: Busy, chunk_nbytes: int, total_nbytes: int) -> dict[str, dict[str, float]]:
    """Return GB/s of every way: pageable memory, chunks that 1 to 4 threads fill, page-locked memory as it lies."""
    source = torch.zeros(total_nbytes, dtype=torch.uint8)
    ways = {"pageable": _Copies(device, chunk_nbytes, source)}
    ways |= {f"staged by {n}": _Staged(device, chunk_nbytes, source, n) for n in _STAGERS}
    ways["direct"] = _Copies(device, chunk_nbytes, _pinned(device, source))
    speeds = {}
    for name, way in ways.items():
        idle_s = median_s(way.run, 3)

        def computing(way: "_Copies" = way, idle_s: float = idle_s) -> float:
            busy.launch(2 * idle_s)
            took_s = timed(way.run)
            device.drain()
            return took_s

        computing()
        speeds[name] = {
            "idle": gb_per_s(total_nbytes, idle_s),
            "computing": gb_per_s(total_nbytes, min(computing() for _ in range(3))),
        }
        way.close()
    return speeds


def overlap(device: Device, busy: Busy, nbytes: int) -> dict[str, object]:
    """Return what copying and computing take one by one and at once, and which of their events came first."""
    way = _Copies(device, 8 * MIB, _pinned(device, torch.zeros(nbytes, dtype=torch.uint8)))
    computed = device.new_event("computed")
    copy_s = median_s(way.run, 3)
    compute_s = 2 * copy_s

    def compute() -> None:
        busy.launch(compute_s)
        device.compute.record(computed)

    def compute_alone() -> None:
        compute()
        device.synchronize(computed)

    alone_s = median_s(compute_alone, 3)

    def copy_and_compute() -> None:
        compute()
        way.run()
        device.synchronize(computed)

    both_s = median_s(copy_and_compute, 3)
    compute()
    way.run()
    is_first = not device.has_happened(computed)
    device.drain()
    return {
        "copy_s": round(copy_s, 5),
        "compute_s": round(alone_s, 5),
        "both_s": round(both_s, 5),
        "hidden_share_of_the_shorter": round((copy_s + alone_s - both_s) / min(copy_s, alone_s), 3),
        "copies_were_done_before_the_work_that_was_submitted_first": is_first,
    }


class _Copies:
    """Copies of a whole source, chunk by chunk, at most two of them queued."""

    def __init__(self, device: Device, chunk_nbytes: int, source: Tensor) -> None:
        self._device = device
        self._chunk_nbytes = chunk_nbytes
        self._source = source
        self._slot = device.new_slot("copied to", chunk_nbytes)
        self._copied = [device.new_event(f"chunk {index} copied") for index in range(3)]

    def run(self) -> None:
        """Copy all of it; return when it is there."""
        chunks = range(0, self._source.numel() - self._chunk_nbytes + 1, self._chunk_nbytes)
        for index, offset in enumerate(chunks):
            if index >= 2:
                self._device.synchronize(self._copied[(index - 2) % 3])
            self._copy(index, offset)
            self._device.copies.record(self._copied[index % 3])
        self._device.synchronize(self._copied[(len(chunks) - 1) % 3])

    def close(self) -> None:
        """Let go of what is held beside memory."""

    def _copy(self, index: int, offset: int) -> None:
        del index
        chunk = self._source[offset : offset + self._chunk_nbytes]
        self._device.copy_in(chunk, self._slot, 0, self._chunk_nbytes)


class _Staged(_Copies):
    """The same through page-locked chunks that some threads fill."""

    def __init__(self, device: Device, chunk_nbytes: int, source: Tensor, n_stagers: int) -> None:
        super().__init__(device, chunk_nbytes, source)
        self._stager = Stager(n_stagers)
        self._chunks = [device.new_chunk(f"chunk {index}", chunk_nbytes) for index in range(3)]

    def close(self) -> None:
        """End the threads."""
        self._stager.close()

    def _copy(self, index: int, offset: int) -> None:
        chunk = self._chunks[index % 3]
        with self._device.host_write(chunk) as memory:
            self._stager.copy(memory, self._source, offset, self._chunk_nbytes)
        self._device.copy_in(chunk, self._slot, 0, self._chunk_nbytes)


def _pinned(device: Device, source: Tensor) -> Tensor:
    return device.new_host_buffer("page-locked source", source).tensor
