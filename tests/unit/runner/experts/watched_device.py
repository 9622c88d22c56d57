"""A device around a device: it tells of each call before it is made, and leaves out those it is told to leave out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from runner.devices.device import Buffer, Device, Event, Queue
from runner.devices.vector_clocks import Clock

# Called with what is called and with the event's or the buffer's name; returns whether to make the call.
Watcher = Callable[[str, str], bool]


class WatchedQueue:
    def __init__(self, name: str, queue: Queue, watcher: Watcher) -> None:
        self._name = name
        self._queue = queue
        self._watcher = watcher

    def record(self, event: Event) -> None:
        if self._watcher(f"{self._name}.record", event.name):
            self._queue.record(event)

    def wait(self, event: Event) -> None:
        if self._watcher(f"{self._name}.wait", event.name):
            self._queue.wait(event)


class WatchedDevice:
    is_asynchronous = True

    def __init__(self, device: Device, watcher: Watcher) -> None:
        self._device = device
        self._watcher = watcher
        self.copies: Queue = WatchedQueue("copies", device.copies, watcher)
        self.compute: Queue = WatchedQueue("compute", device.compute, watcher)

    def new_event(self, name: str) -> Event:
        return self._device.new_event(name)

    def new_slot(self, name: str, nbytes: int) -> Buffer:
        return self._device.new_slot(name, nbytes)

    def new_chunk(self, name: str, nbytes: int) -> Buffer:
        return self._device.new_chunk(name, nbytes)

    def new_host_buffer(self, name: str, tensor: Tensor) -> Buffer:
        return self._device.new_host_buffer(name, tensor)

    def copy_in(self, source: Buffer | Tensor, slot: Buffer, offset: int, nbytes: int) -> None:
        if self._watcher("copy_in", slot.name):
            self._device.copy_in(source, slot, offset, nbytes)

    def launch(
        self,
        work: Callable[[], None],
        *,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
        is_awaited: bool = False,
    ) -> None:
        if self._watcher("launch", ""):
            self._device.launch(work, reads=reads, writes=writes, is_awaited=is_awaited)

    def computing(self) -> AbstractContextManager[None]:
        return self._device.computing()

    def synchronize(self, event: Event) -> None:
        if self._watcher("synchronize", event.name):
            self._device.synchronize(event)

    def has_happened(self, event: Event) -> bool:
        return self._device.has_happened(event)

    def host_write(self, buffer: Buffer) -> AbstractContextManager[Tensor]:
        self._watcher("host_write", buffer.name)
        return self._device.host_write(buffer)

    def host_read(self, buffer: Buffer) -> AbstractContextManager[Tensor]:
        self._watcher("host_read", buffer.name)
        return self._device.host_read(buffer)

    def publish(self) -> Clock:
        return self._device.publish()

    def observe(self, clock: Clock) -> None:
        if self._watcher("observe", ""):
            self._device.observe(clock)

    def poison_slot(self, slot: Buffer) -> None:
        if self._watcher("poison_slot", slot.name):
            self._device.poison_slot(slot)

    def release_chunk(self, chunk: Buffer) -> None:
        if self._watcher("release_chunk", chunk.name):
            self._device.release_chunk(chunk)

    def drain(self) -> None:
        if self._watcher("drain", ""):
            self._device.drain()

    def close(self) -> None:
        self._device.close()
