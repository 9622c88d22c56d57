"""What the expert cache asks of an accelerator: two in-order queues, events that order them, memory of three kinds.

Knows no expert, no layer and no kernel. The same cache, copy engine and prefetch run on every device behind these
protocols. Who may block whom: a host thread blocks in `synchronize`, `drain` and `close`, and nowhere else; what is
submitted to a queue runs later, in the order of submission; a queue is blocked by an event it waits for, never by a
host thread. So no lock may be held around the three that block, and any may be held around all others. Every method may
be called by several host threads at once; work that was launched calls none of them.

Events are CUDA's. `record` captures all that the queue was given before; recording again replaces what the event stood
for, and whoever waits already keeps waiting for the record that was the latest when it began. An event that was never
recorded counts as having happened: waiting for it does nothing. That hides mistakes, so a strict device raises
UnrecordedEvent instead, from all of `wait`, `synchronize` and `has_happened`: the caller keeps in mind whether a slot
was used or a chunk was copied before.

An error in submitted work is raised, as it is, by every later call that submits or blocks; the work behind it is
skipped.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from runner.devices.vector_clocks import Clock


class Event(Protocol):
    """A point in a queue. Belongs to one slot, chunk or host buffer for good; recorded again, never pooled."""

    @property
    def name(self) -> str:
        """Return what errors call it."""
        ...


class Buffer(Protocol):
    """Memory whose accesses an event must order: a slot, a staging chunk, or a small host buffer."""

    @property
    def name(self) -> str:
        """Return what errors call it."""
        ...

    @property
    def tensor(self) -> Tensor:
        """Return the memory; work that is launched reads and writes it, the host goes through host_read, host_write."""
        ...


class Queue(Protocol):
    """Work in order, asynchronous to the host threads that submit it."""

    def record(self, event: Event) -> None:
        """Make the event stand for all that was submitted to this queue until now."""
        ...

    def wait(self, event: Event) -> None:
        """Run what is submitted from now on only after the event's latest record; strict: raise UnrecordedEvent."""
        ...


class Device(Protocol):
    """An accelerator with memory of its own, a queue of copies into it and a queue of computations on it."""

    @property
    def copies(self) -> Queue:
        """Return the copy queue: `copy_in` and `poison_slot` submit to it."""
        ...

    @property
    def compute(self) -> Queue:
        """Return the compute queue: `launch` submits to it."""
        ...

    @property
    def is_asynchronous(self) -> bool:
        """Return whether work goes on while the host does something else."""
        ...

    def new_event(self, name: str) -> Event:
        """Return an event that was never recorded."""
        ...

    def new_slot(self, name: str, nbytes: int) -> Buffer:
        """Return device memory for a record, uint8 [nbytes]; raise OutOfMemory."""
        ...

    def new_chunk(self, name: str, nbytes: int) -> Buffer:
        """Return host memory that copies may read while the host goes on, uint8 [nbytes]; raise OutOfMemory."""
        ...

    def new_host_buffer(self, name: str, tensor: Tensor) -> Buffer:
        """Return a small host buffer, made from the tensor, that the device writes and the host reads.

        Its memory is the `tensor` of what is returned, which need not be the one that was given.
        """
        ...

    def copy_in(self, source: Buffer | Tensor, slot: Buffer, offset: int, nbytes: int) -> None:
        """Submit to the copy queue: source[:nbytes] → slot[offset : offset + nbytes]; the source is read when it runs.

        A plain tensor, uint8, is host memory that nobody writes as long as the device is open.
        """
        ...

    def launch(
        self,
        work: Callable[[], None],
        *,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
        is_awaited: bool = False,
    ) -> None:
        """Submit to the compute queue; `reads` and `writes` are all buffers of this device that the work touches.

        `is_awaited`: the calling thread blocks for it next; a hint that changes no order.
        """
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Return a context for the calling thread in which it may allocate what launched work will use."""
        ...

    def synchronize(self, event: Event) -> None:
        """Block the calling thread until the event's latest record was reached; strict: raise UnrecordedEvent."""
        ...

    def has_happened(self, event: Event) -> bool:
        """Return whether the event's latest record was reached; strict: raise UnrecordedEvent."""
        ...

    def host_write(self, buffer: Buffer) -> AbstractContextManager[Tensor]:
        """Return the buffer's memory for the calling thread to write inside the `with`; strict: raise UnorderedAccess.

        Nothing that touches the buffer is submitted inside.
        """
        ...

    def host_read(self, buffer: Buffer) -> AbstractContextManager[Tensor]:
        """Return the buffer's memory for the calling thread to read inside the `with`; strict: raise UnorderedAccess.

        Nothing that writes the buffer is submitted inside.
        """
        ...

    def publish(self) -> Clock:
        """Return what the calling thread did and knows has happened, to be left under the lock that it holds."""
        ...

    def observe(self, clock: Clock) -> None:
        """Let the calling thread know what another one published, taken from under the same lock."""
        ...

    def poison_slot(self, slot: Buffer) -> None:
        """Submit to the copy queue, when a slot is refilled: what it held is gone. Strict: its bytes become 0xFF."""
        ...

    def release_chunk(self, chunk: Buffer) -> None:
        """Say that no copy reads the chunk any more, a write by the calling thread. Strict: its bytes become 0xFF."""
        ...

    def drain(self) -> None:
        """Block the calling thread until both queues have run all that was submitted to them before."""
        ...

    def close(self) -> None:
        """Drain and end both queues; nothing is called afterwards. Raise the error of work if no call has yet."""
        ...
