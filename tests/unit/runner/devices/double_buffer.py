"""A small user of a device: records stream through two slots, a kernel sums each, the host reads the sums.

Two chunks, two slots and three sums are in turn. The host reads a sum two steps late, so that no event does by chance
what another one is for. Each wait and each record can be left out, everywhere or in one step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.devices.device import Buffer, Device, Event

NBYTES = 64
WAITS_AND_RECORDS = (
    "the host waits for chunk.copied",
    "the copy queue waits for slot.last_use",
    "chunk.copied is recorded",
    "slot.ready is recorded",
    "the compute queue waits for slot.ready",
    "slot.last_use is recorded",
    "sum.written is recorded",
    "the host waits for sum.written",
)


@dataclass(frozen=True)
class Omission:
    """What to leave out; `step` None: in every step."""

    what: str
    step: int | None = None


@dataclass(frozen=True)
class Slot:
    buffer: Buffer
    ready: Event
    last_use: Event


@dataclass(frozen=True)
class Chunk:
    buffer: Buffer
    copied: Event


@dataclass(frozen=True)
class Sum:
    buffer: Buffer
    written: Event


class DoubleBuffer:
    """Streams records through a device."""

    def __init__(self, device: Device, omission: Omission | None = None) -> None:
        self.device = device
        self.omission = omission
        event = device.new_event
        self.slots = [
            Slot(device.new_slot(f"slot {n}", NBYTES), event(f"slot {n} ready"), event(f"slot {n} last_use"))
            for n in range(2)
        ]
        self.chunks = [Chunk(device.new_chunk(f"chunk {n}", NBYTES), event(f"chunk {n} copied")) for n in range(2)]
        self.sums = [
            Sum(device.new_host_buffer(f"sum {n}", torch.zeros(1, dtype=torch.int64)), event(f"sum {n} written"))
            for n in range(3)
        ]

    def run(self, records: list[Tensor]) -> list[int]:
        """Return the sums of the records, each uint8 [NBYTES]."""
        sums = []
        for step, record in enumerate(records):
            self._fill_slot(step, record)
            self._launch_sum(step)
            if step >= 2:
                sums.append(self._read_sum(step - 2))
        return sums + [self._read_sum(step) for step in range(max(0, len(records) - 2), len(records))]

    def _fill_slot(self, step: int, record: Tensor) -> None:
        device, slot, chunk = self.device, self.slots[step % 2], self.chunks[step % 2]
        if step >= 2:
            self._unless_omitted(step, "the host waits for chunk.copied", lambda: device.synchronize(chunk.copied))
            device.release_chunk(chunk.buffer)
        with device.host_write(chunk.buffer) as tensor:
            tensor.copy_(record)
        if step >= 2:
            self._unless_omitted(
                step, "the copy queue waits for slot.last_use", lambda: device.copies.wait(slot.last_use)
            )
        device.poison_slot(slot.buffer)
        device.copy_in(chunk.buffer, slot.buffer, 0, NBYTES)
        self._unless_omitted(step, "chunk.copied is recorded", lambda: device.copies.record(chunk.copied))
        self._unless_omitted(step, "slot.ready is recorded", lambda: device.copies.record(slot.ready))

    def _launch_sum(self, step: int) -> None:
        device, slot, result = self.device, self.slots[step % 2], self.sums[step % 3]

        def kernel() -> None:
            torch.sum(slot.buffer.tensor, dim=0, keepdim=True, out=result.buffer.tensor)

        self._unless_omitted(step, "the compute queue waits for slot.ready", lambda: device.compute.wait(slot.ready))
        device.launch(kernel, reads=[slot.buffer], writes=[result.buffer])
        self._unless_omitted(step, "slot.last_use is recorded", lambda: device.compute.record(slot.last_use))
        self._unless_omitted(step, "sum.written is recorded", lambda: device.compute.record(result.written))

    def _read_sum(self, step: int) -> int:
        result = self.sums[step % 3]
        self._unless_omitted(step, "the host waits for sum.written", lambda: self.device.synchronize(result.written))
        with self.device.host_read(result.buffer) as tensor:
            return int(tensor.item())

    def _unless_omitted(self, step: int, what: str, call: Callable[[], None]) -> None:
        if self.omission not in (Omission(what), Omission(what, step)):
            call()
