"""A GPU as a Device: a stream of its own for copies, one for computations, and CUDA's events between them.

Nothing is decided here. What the stand-in accelerator checks in strict mode (see link) a GPU does not: `publish`,
`observe`, `poison_slot` and `release_chunk` do nothing, since the same callers were checked there. One check costs
nothing and is kept: waiting for an event that was never recorded raises, where CUDA would not wait.

Why torch's allocators need not be told (`record_stream`) of the copies into slots. They hand memory out again when the
tensor over it is gone. A slot's tensor, a chunk's and a host buffer's live until `close`, which drains both streams
first; what a slot's memory was used for before, on the compute stream, the copy stream is made to wait for when the
slot is made. Copies out of the store's mapping read memory that is not torch's. All other memory of the GPU is
allocated and used on the compute stream alone, in whose order torch hands it out again: see `computing`.

No lock is held here at all, so none is held while a thread blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from runner.devices.cuda_runtime import CudaEvent, CudaRuntime, CudaStream
from runner.devices.device import Buffer, Event
from runner.devices.errors import ForeignBuffer, OutOfBounds, UnrecordedEvent
from runner.devices.vector_clocks import Clock
from runner.errors import DeviceFailed, OutOfMemory

_NOTHING = Clock()
# Since torch 2.8; before, all that CUDA reports is a RuntimeError.
_REPORTED_BY_CUDA: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)


class GpuEvent:
    """An event of one GPU, and whether it was ever recorded."""

    def __init__(self, device: "CudaDevice", name: str, event: CudaEvent) -> None:
        self.device = device
        self.name = name
        self.event = event
        self.is_recorded = False


class GpuBuffer:
    """A slot in the GPU's memory, or page-locked memory of the host."""

    def __init__(self, device: "CudaDevice", name: str, tensor: Tensor) -> None:
        self.device = device
        self.name = name
        self.tensor = tensor


class GpuQueue:
    """A stream as a Queue."""

    def __init__(self, device: "CudaDevice", stream: CudaStream) -> None:
        self._device = device
        self.stream = stream

    def record(self, event: Event) -> None:
        """Make the event stand for all that was submitted to this queue until now."""
        own = self._device.own_event(event)
        with self._device.reporting(f"recording {own.name}"):
            self.stream.record(own.event)
        own.is_recorded = True

    def wait(self, event: Event) -> None:
        """Run what is submitted from now on only after the event's latest record; raise UnrecordedEvent."""
        own = self._device.recorded_event(event)
        with self._device.reporting(f"waiting for {own.name}"):
            self.stream.wait(own.event)


class CudaDevice:
    """A Device on a GPU. Whoever creates it closes it."""

    is_asynchronous = True

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self.name = str(runtime.torch_device)
        with self.reporting("starting"):
            self.copies = GpuQueue(self, runtime.new_stream(is_urgent=True))
            self.compute = GpuQueue(self, runtime.new_stream(is_urgent=False))
            self._compute_so_far = runtime.new_event()
        self._slots: list[GpuBuffer] = []

    @property
    def torch_device(self) -> torch.device:
        """Return the GPU as torch names it."""
        return self._runtime.torch_device

    def new_event(self, name: str) -> Event:
        """Return an event that was never recorded."""
        return GpuEvent(self, name, self._runtime.new_event())

    def new_slot(self, name: str, nbytes: int) -> Buffer:
        """Return memory of the GPU for a record, uint8 [nbytes]; raise OutOfMemory."""
        with self.reporting(f"{name} of {nbytes} bytes"), self.computing():
            slot = GpuBuffer(self, name, self._runtime.device_bytes(nbytes))
            # What the compute stream still does with this memory comes before the first copy into it.
            self.compute.stream.record(self._compute_so_far)
            self.copies.stream.wait(self._compute_so_far)
        self._slots.append(slot)
        return slot

    def new_chunk(self, name: str, nbytes: int) -> Buffer:
        """Return page-locked memory of the host, uint8 [nbytes]; raise OutOfMemory."""
        with self._pinning(name, nbytes):
            return GpuBuffer(self, name, self._runtime.pinned_like(torch.empty(nbytes, dtype=torch.uint8)))

    def new_host_buffer(self, name: str, tensor: Tensor) -> Buffer:
        """Return a page-locked copy of the tensor."""
        with self._pinning(name, tensor.numel() * tensor.element_size()):
            return GpuBuffer(self, name, self._runtime.pinned_like(tensor).copy_(tensor))

    def copy_in(self, source: Buffer | Tensor, slot: Buffer, offset: int, nbytes: int) -> None:
        """Submit to the copy stream: source[:nbytes] → slot[offset : offset + nbytes].

        From memory that is not page-locked the driver copies by itself first, and the calling thread waits for that.
        """
        target = self._own_buffer(slot)
        origin = source if isinstance(source, Tensor) else self._own_buffer(source).tensor
        from_bytes = _span("the source", origin, 0, nbytes)
        to_bytes = _span(target.name, target.tensor, offset, nbytes)
        with self.reporting(f"copying into {target.name}"), self.copies.stream.current():
            to_bytes.copy_(from_bytes, non_blocking=True)

    def launch(
        self,
        work: Callable[[], None],
        *,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
        is_awaited: bool = False,  # noqa: ARG002  # the GPU begins at once, whoever waits
    ) -> None:
        """Run the work now, in the calling thread: all it asks of the GPU goes to the compute stream."""
        for buffer in (*reads, *writes):
            self._own_buffer(buffer)
        with self.reporting("computing"), self.computing():
            work()

    def computing(self) -> AbstractContextManager[None]:
        """Return a context in which memory that the calling thread allocates is the compute stream's."""
        return self.compute.stream.current()

    def synchronize(self, event: Event) -> None:
        """Block the calling thread until the event's latest record was reached; raise UnrecordedEvent."""
        own = self.recorded_event(event)
        with self.reporting(f"waiting for {own.name}"):
            own.event.synchronize()

    def has_happened(self, event: Event) -> bool:
        """Return whether the event's latest record was reached; raise UnrecordedEvent."""
        own = self.recorded_event(event)
        with self.reporting(f"asking for {own.name}"):
            return own.event.query()

    @contextmanager
    def host_write(self, buffer: Buffer) -> Iterator[Tensor]:
        """Return the buffer's memory for the calling thread to write inside the `with`."""
        yield self._own_buffer(buffer).tensor

    @contextmanager
    def host_read(self, buffer: Buffer) -> Iterator[Tensor]:
        """Return the buffer's memory for the calling thread to read inside the `with`."""
        yield self._own_buffer(buffer).tensor

    def publish(self) -> Clock:
        """Return nothing to know: the host's memory model and the lock order the host's threads."""
        return _NOTHING

    def observe(self, clock: Clock) -> None:
        """Do nothing."""

    def poison_slot(self, slot: Buffer) -> None:
        """Do nothing."""

    def release_chunk(self, chunk: Buffer) -> None:
        """Do nothing."""

    def drain(self) -> None:
        """Block the calling thread until both streams have run all that was submitted to them before."""
        with self.reporting("draining"):
            self.copies.stream.synchronize()
            self.compute.stream.synchronize()

    def close(self) -> None:
        """Drain both streams and give the slots' memory back, whoever still holds a tensor over it."""
        try:
            self.drain()
        finally:
            for slot in self._slots:
                slot.tensor.untyped_storage().resize_(0)
            self._slots.clear()
            self._runtime.give_back()

    def own_event(self, event: Event) -> GpuEvent:
        """Return the event as this device's; raise ForeignBuffer."""
        if not isinstance(event, GpuEvent) or event.device is not self:
            raise ForeignBuffer(f"{event.name} is no event of {self.name}")
        return event

    def recorded_event(self, event: Event) -> GpuEvent:
        """Return the event as this device's; raise ForeignBuffer or UnrecordedEvent."""
        own = self.own_event(event)
        if not own.is_recorded:
            raise UnrecordedEvent(f"{own.name} was never recorded; {self.name} would not wait for it")
        return own

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Raise what CUDA reports inside the `with` as one of ours: OutOfMemory or DeviceFailed."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"{self.name}: {what}: {_first_line(error)}") from error
        except _REPORTED_BY_CUDA as error:
            raise DeviceFailed(f"{self.name}: {what}: {_first_line(error)}") from error

    @contextmanager
    def _pinning(self, name: str, nbytes: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise OutOfMemory(f"{name}: {nbytes} bytes cannot be page-locked: {_first_line(error)}") from error

    def _own_buffer(self, buffer: Buffer) -> GpuBuffer:
        if not isinstance(buffer, GpuBuffer) or buffer.device is not self:
            raise ForeignBuffer(f"{buffer.name} is no buffer of {self.name}")
        return buffer


def _span(name: str, tensor: Tensor, offset: int, nbytes: int) -> Tensor:
    """Return those bytes of a tensor; raise OutOfBounds."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
        raise OutOfBounds(f"{name} is not a row of bytes: {tensor.dtype} {list(tensor.shape)}")
    if offset < 0 or nbytes <= 0 or offset + nbytes > tensor.numel():
        raise OutOfBounds(f"{name} has {tensor.numel()} bytes; [{offset}:{offset + nbytes}] asked")
    return tensor[offset : offset + nbytes]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
