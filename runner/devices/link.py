"""The stand-in accelerator: a device whose memory is the host's, behind a link as fast as it was told to be.

Two in-order asynchronous queues, one of copies and one of computations, with CUDA's events (see device). What a GPU
would do in parallel to the host runs in a thread a queue, in real time, and a copy takes as long as on the link; or,
with a scheduler, one operation at a time in an order drawn from a seed. A strict device checks the order of all
accesses besides. Every method may be called by several host threads at once; it holds the executor's lock meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from quant.timed_copies import Copies, start_copies
from runner.devices.device import Buffer, Event
from runner.devices.errors import ForeignBuffer, OutOfBounds
from runner.devices.link_copies import LinkCopies
from runner.devices.link_order import POISON, NoOrder, Order, StrictOrder
from runner.devices.link_queue import Copy, Executor, Failure, Launch, Mark, OperationQueue, Wait, Work
from runner.devices.link_speed import LinkSpeed
from runner.devices.link_stepped import RandomScheduler, SteppedExecutor
from runner.devices.link_threads import ThreadedExecutor
from runner.devices.vector_clocks import AccessHistory, Clock
from runner.errors import OutOfMemory

# What is known where nobody keeps count.
NOTHING = Clock()


class LinkEvent:
    """An event: its latest mark, None as long as it was never recorded."""

    def __init__(self, device: "LinkDevice", name: str) -> None:
        self.device = device
        self.name = name
        self.latest: Mark | None = None


class LinkBuffer:
    """Memory and the accesses it has seen."""

    def __init__(self, device: "LinkDevice", name: str, tensor: Tensor) -> None:
        self.device = device
        self.name = name
        self.tensor = tensor
        self.nbytes = tensor.nbytes
        self.address = tensor.data_ptr()
        self.history = AccessHistory(name)


class LinkQueue:
    """A queue as the host sees it; what it holds is the executor's."""

    def __init__(self, device: "LinkDevice", operations: OperationQueue) -> None:
        self._device = device
        self._operations = operations

    def record(self, event: Event) -> None:
        """Make the event stand for all that was submitted to this queue until now."""
        self._device.record(self._operations, event)

    def wait(self, event: Event) -> None:
        """Run what is submitted from now on only after the event's latest record; strict: raise UnrecordedEvent."""
        self._device.wait(self._operations, event)


class LinkDevice:
    """A Device made of two threads, or of a scheduler. Whoever creates it closes it."""

    is_asynchronous = True

    def __init__(
        self,
        speed: LinkSpeed,
        *,
        strict: bool = False,
        scheduler: RandomScheduler | None = None,
        new_copies: Callable[[], Copies] = start_copies,
    ) -> None:
        """Start the threads: the copies', if they have one, and that of computations; or none, with a scheduler."""
        self._speed = speed
        self._order: Order = StrictOrder() if strict else NoOrder()
        self._failure = Failure()
        self._copies = OperationQueue("copy queue")
        self._compute = OperationQueue("compute queue")
        self._executor: Executor
        if scheduler is None:
            copies = LinkCopies(new_copies())
            self._executor = ThreadedExecutor(copies, self._copies, self._compute, self._failure)
        else:
            self._executor = SteppedExecutor((self._copies, self._compute), self._failure, scheduler)
        self._lock = self._executor.lock
        self._n_submitted = 0
        self.copies = LinkQueue(self, self._copies)
        self.compute = LinkQueue(self, self._compute)

    def new_event(self, name: str) -> Event:
        """Return an event that was never recorded."""
        return LinkEvent(self, name)

    def new_slot(self, name: str, nbytes: int) -> Buffer:
        """Return memory for a record, uint8 [nbytes]; raise OutOfMemory."""
        return self._new_buffer(name, nbytes)

    def new_chunk(self, name: str, nbytes: int) -> Buffer:
        """Return memory that copies read, uint8 [nbytes]; raise OutOfMemory."""
        return self._new_buffer(name, nbytes)

    def new_host_buffer(self, name: str, tensor: Tensor) -> Buffer:
        """Return a host buffer in the tensor's own memory."""
        return LinkBuffer(self, name, tensor)

    def copy_in(self, source: Buffer | Tensor, slot: Buffer, offset: int, nbytes: int) -> None:
        """Submit to the copy queue: source[:nbytes] → slot[offset : offset + nbytes]; raise UnorderedAccess."""
        target = self._own_buffer(slot)
        if isinstance(source, Tensor):
            reads, origin, source_name = [], source, "host memory"
            from_address = _address(source)
        else:
            own = self._own_buffer(source)
            reads, origin, source_name = [own], own.tensor, own.name
            from_address = own.address
        _check_range(source_name, origin.nbytes, 0, nbytes)
        _check_range(target.name, target.nbytes, offset, nbytes)
        self._submit(
            self._copies,
            Copy(
                (source_name, target.name, offset),
                from_address,
                target.address + offset,
                nbytes,
                (origin, target.tensor),
                self._speed.copy_s(nbytes),
            ),
            reads,
            [target],
        )

    def launch(
        self,
        work: Callable[[], None],
        *,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
        is_awaited: bool = False,
    ) -> None:
        """Submit to the compute queue; raise UnorderedAccess. What is awaited at once is left to whoever waits."""
        own_reads, own_writes = ([self._own_buffer(buffer) for buffer in buffers] for buffers in (reads, writes))
        self._submit(self._compute, Launch(work), own_reads, own_writes, wakes=not is_awaited)

    def computing(self) -> AbstractContextManager[None]:
        """Return a context in which nothing is different: all memory is the host's."""
        return nullcontext()

    def record(self, queue: OperationQueue, event: Event) -> None:
        """Make the event stand for all that was submitted to the queue until now; for LinkQueue."""
        own = self._own_event(event)
        with self._lock:
            self._enter()
            own.latest = Mark(own.name, self._order.record(queue.name))
            self._executor.submit(queue, own.latest)

    def wait(self, queue: OperationQueue, event: Event) -> None:
        """Let what is submitted to the queue from now on wait for the event's latest record; for LinkQueue."""
        own = self._own_event(event)
        with self._lock:
            self._enter()
            if own.latest is None:
                self._order.unrecorded(own.name)
                return
            self._order.wait(queue.name, own.latest.clock)
            if not own.latest.is_reached:
                self._executor.submit(queue, Wait(own.latest))

    def synchronize(self, event: Event) -> None:
        """Block the calling thread until the event's latest record was reached; strict: raise UnrecordedEvent."""
        own = self._own_event(event)
        with self._lock:
            self._enter()
            if own.latest is None:
                self._order.unrecorded(own.name)
            else:
                self._reach(own.latest)

    def has_happened(self, event: Event) -> bool:
        """Return whether the event's latest record was reached; strict: raise UnrecordedEvent."""
        own = self._own_event(event)
        with self._lock:
            self._executor.progress()
            if own.latest is None:
                self._order.unrecorded(own.name)
                return True
            is_reached = own.latest.is_reached  # asked once: it may be a moment later
            if is_reached:
                self._order.learn(own.latest.clock)
            return is_reached

    @contextmanager
    def host_write(self, buffer: Buffer) -> Iterator[Tensor]:
        """Return the buffer's memory for the calling thread to write inside the `with`; raise UnorderedAccess."""
        with self._host_access(buffer, "host_write", writes=True) as tensor:
            yield tensor

    @contextmanager
    def host_read(self, buffer: Buffer) -> Iterator[Tensor]:
        """Return the buffer's memory for the calling thread to read inside the `with`; raise UnorderedAccess."""
        with self._host_access(buffer, "host_read", writes=False) as tensor:
            yield tensor

    def publish(self) -> Clock:
        """Return what the calling thread did and knows has happened."""
        if not self._order.is_strict:
            return NOTHING
        with self._lock:
            return self._order.publish()

    def observe(self, clock: Clock) -> None:
        """Let the calling thread know what another one published."""
        if self._order.is_strict:
            with self._lock:
                self._order.learn(clock)

    def poison_slot(self, slot: Buffer) -> None:
        """Submit to the copy queue: what the slot held is gone; raise UnorderedAccess."""
        target = self._own_buffer(slot)
        if not self._order.is_strict:
            return
        poison = torch.full_like(target.tensor, POISON)
        kept = (poison, target.tensor)
        fill = Copy(("poison", target.name, 0), poison.data_ptr(), target.address, target.nbytes, kept)
        self._submit(self._copies, fill, [], [target])

    def release_chunk(self, chunk: Buffer) -> None:
        """Say that no copy reads the chunk any more; raise UnorderedAccess."""
        if not self._order.is_strict:
            return
        with self._host_access(chunk, "release_chunk", writes=True) as tensor:
            self._order.poison(tensor)

    def drain(self) -> None:
        """Block the calling thread until both queues have run all that was submitted to them before."""
        with self._lock:
            self._enter()
            marks = []
            for queue in (self._copies, self._compute):
                marks.append(Mark("drain", self._order.record(queue.name)))
                self._executor.submit(queue, marks[-1])
            for mark in marks:
                self._reach(mark)

    def close(self) -> None:
        """Run all that was submitted and end both queues. Raise the error of work if no call has yet."""
        self._executor.close()
        self._failure.check_unraised()

    def _enter(self) -> None:
        """Let the queues go on by chance, and raise what went wrong in them; under the lock."""
        self._executor.progress()
        self._failure.check()

    def _submit(
        self,
        queue: OperationQueue,
        work: Work,
        reads: Sequence[LinkBuffer],
        writes: Sequence[LinkBuffer],
        *,
        wakes: bool = True,
    ) -> None:
        with self._lock:
            self._enter()
            self._n_submitted += 1
            work.number = self._n_submitted
            if self._order.is_strict:
                histories = [[buffer.history for buffer in buffers] for buffers in (reads, writes)]
                self._order.submit(queue.name, work.label, reads=histories[0], writes=histories[1])
            self._executor.submit(queue, work, wakes=wakes)

    def _reach(self, mark: Mark) -> None:
        """Block until the mark is reached; raise what went wrong before it; under the lock."""
        self._executor.reach(mark)
        self._failure.check()
        self._order.learn(mark.clock)

    @contextmanager
    def _host_access(self, buffer: Buffer, label: str, *, writes: bool) -> Iterator[Tensor]:
        own = self._own_buffer(buffer)
        with self._lock:
            self._executor.progress()
            access = self._order.begin(own.history, label, writes=writes)
        try:
            yield own.tensor
        finally:
            with self._lock:
                self._order.end(own.history, access)
                self._executor.progress()

    def _new_buffer(self, name: str, nbytes: int) -> LinkBuffer:
        try:
            tensor = torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise OutOfMemory(f"{name}: {nbytes} bytes cannot be had") from error
        tensor.zero_()  # the pages are there before the first copy is timed
        self._order.poison(tensor)
        return LinkBuffer(self, name, tensor)

    def _own_buffer(self, buffer: Buffer) -> LinkBuffer:
        if not isinstance(buffer, LinkBuffer) or buffer.device is not self:
            raise ForeignBuffer(f"{buffer.name} is no buffer of this device")
        return buffer

    def _own_event(self, event: Event) -> LinkEvent:
        if not isinstance(event, LinkEvent) or event.device is not self:
            raise ForeignBuffer(f"{event.name} is no event of this device")
        return event


def _address(source: Tensor) -> int:
    """Return where a row of bytes begins; raise OutOfBounds if a tensor is none."""
    if source.dtype != torch.uint8 or not source.is_contiguous() or source.dim() != 1:
        raise OutOfBounds(f"host memory is not a row of bytes: {source.dtype} {list(source.shape)}")
    return source.data_ptr()


def _check_range(name: str, length: int, offset: int, nbytes: int) -> None:
    """Raise OutOfBounds unless those bytes are among so many."""
    if offset < 0 or nbytes <= 0 or offset + nbytes > length:
        raise OutOfBounds(f"{name} has {length} bytes; [{offset}:{offset + nbytes}] asked")
