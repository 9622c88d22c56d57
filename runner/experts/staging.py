"""Filling staging chunks: bytes of the shared mapping into page-locked memory, by several threads at once.

One thread does not read memory as fast as a PCIe 4 link takes it. Called by the copy engine's thread, which blocks
until a chunk is full, without the interpreter's lock.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from runner.devices.device import Device

# Below this a part is not worth a thread.
_PART_NBYTES_MIN = 1 << 20
_ALIGNMENT = 4096
_N_TRIALS = 6


class Stager:
    """Copies memory with so many threads, the calling one among them; close it."""

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._others = ThreadPoolExecutor(n_threads - 1, "stager") if n_threads > 1 else None

    def close(self) -> None:
        """End the threads."""
        if self._others is not None:
            self._others.shutdown()

    def copy(self, target: Tensor, source: Tensor, offset: int, nbytes: int) -> None:
        """Copy source[offset : offset + nbytes] to the start of target, both uint8; return when it is done."""
        to_address, from_address = target.data_ptr(), source.data_ptr() + offset
        first, *others = self._parts(nbytes)
        running = [
            self._others.submit(ctypes.memmove, to_address + start, from_address + start, end - start)
            for start, end in others
            if self._others is not None
        ]
        # Without the interpreter's lock, as all calls through ctypes.
        ctypes.memmove(to_address, from_address, first[1])
        for part in running:
            part.result()

    def _parts(self, nbytes: int) -> list[tuple[int, int]]:
        """Return where the threads' parts start and end, whole pages but for the last one."""
        n_parts = max(1, min(self._n_threads, nbytes // _PART_NBYTES_MIN))
        each = -(-nbytes // n_parts // _ALIGNMENT) * _ALIGNMENT
        return [(start, min(start + each, nbytes)) for start in range(0, nbytes, each)]


@dataclass(frozen=True, slots=True)
class StagingSpeed:
    """How fast chunks are filled, and how fast the link takes them; both in bytes a second."""

    fill_bytes_per_s: float
    link_bytes_per_s: float

    @property
    def lost_share(self) -> float:
        """Which share of the link's speed is lost because filling is slower; 0 if it is not."""
        return max(0.0, 1 - self.fill_bytes_per_s / self.link_bytes_per_s)


def measure_staging(device: Device, stager: Stager, source: Tensor, chunk_nbytes: int) -> StagingSpeed:
    """Return both speeds, each the fastest of some trials, on a record that the device copies from."""
    nbytes = min(chunk_nbytes, source.numel())
    chunk, slot = device.new_chunk("measured chunk", nbytes), device.new_slot("measured slot", nbytes)
    copied = device.new_event("measured copy")
    fill_s, link_s = [], []
    for trial in range(_N_TRIALS):
        offset = trial * nbytes % max(1, source.numel() - nbytes + 1) // _ALIGNMENT * _ALIGNMENT
        with device.host_write(chunk) as memory:
            began_s = perf_counter()
            stager.copy(memory, source, offset, nbytes)
            fill_s.append(perf_counter() - began_s)
        began_s = perf_counter()
        device.copy_in(chunk, slot, 0, nbytes)
        device.copies.record(copied)
        device.synchronize(copied)
        link_s.append(perf_counter() - began_s)
    return StagingSpeed(nbytes / min(fill_s), nbytes / min(link_s))
