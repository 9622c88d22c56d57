"""The copy engine: fills slots with experts' records, piece by piece, in a thread of its own or of who asks.

Owns the ring of staging chunks, their events, and the lock of the whole cache, `condition`. Knows no layers, no policy.

Where nothing is staged, the model's thread submits what it asks for itself, as far as it would not block: to hand that
over takes longer than to do it, and longer than copying a small expert. The rest is submitted when it comes by again,
or by the engine's thread where the copies would be over before. What is staged is that thread's. One submits at a time.

Who may block whom. The engine's thread blocks in `synchronize`, until a chunk's earlier copy is done, never with the
lock held. The model's thread blocks in `wait`, until the engine has submitted more. What orders which access:

    slot      the copy queue waits for its `last_use` before the first piece is copied into it; `ready` is recorded
              behind the last piece, and only then the slot is told to be filled, since waiting for an event that was
              not recorded yet would not wait at all
    chunk     the engine waits for its `copied` before it fills it again; it is recorded behind the copy out of it
    lock      what the model's thread recorded before it asked for a copy, the engine knows when it takes a piece of it

A cancelled copy's pieces may still run: the next copy into that slot is behind them in the same queue.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import get_ident
from types import TracebackType
from typing import Self

from torch import Tensor

from runner.devices.device import Buffer, Device, Event
from runner.devices.vector_clocks import Clock
from runner.errors import RunnerError
from runner.experts.copy_queue import CopyQueue, Outcome, Piece
from runner.experts.counters import Tally
from runner.experts.errors import CopyFailed
from runner.experts.slots import SlotTable
from runner.experts.staging import Stager

CHUNK_NBYTES = 8 << 20

# Copies that lie in the copy queue at once, beside those that a call waits for, which are never behind more than these.
_N_QUEUED_MAX = 2
# One more chunk than copies that are queued: it is filled meanwhile.
_N_CHUNKS = _N_QUEUED_MAX + 1


# Where the model's thread comes by before the queued copies are over, the engine's thread is not called: each piece
# that it submits would take the interpreter from who computes. Once they were over, it is called so many times.
_N_CALLS = 64


@dataclass(slots=True, eq=False)
class DeviceSlot:
    """A slot on the device with the events that are its own.

    The model's thread sets `was_used` when `last_use` is recorded, and `is_awaited` when the compute queue was made to
    wait for the `ready` of what lies there now.
    """

    buffer: Buffer
    ready: Event
    last_use: Event
    was_used: bool = False
    is_awaited: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    """One of the copies that follow each other: its event, and where its bytes are staged, unless they are not."""

    copied: Event
    chunk: Buffer | None
    is_recorded: bool = False


def staging_nbytes(chunk_nbytes: int = CHUNK_NBYTES) -> int:
    """Return how much host memory the staging chunks take."""
    return _N_CHUNKS * chunk_nbytes


def new_slots(device: Device, n_slots: int, nbytes: int) -> list[DeviceSlot]:
    """Return so many slots of that size on the device; raise OutOfMemory."""
    return [
        DeviceSlot(
            device.new_slot(f"slot {index}", nbytes),
            device.new_event(f"slot {index} ready"),
            device.new_event(f"slot {index} last use"),
        )
        for index in range(n_slots)
    ]


class CopyEngine:
    """Copies records into slots; started by `with` or `start`, ended by `close`, which drains the device.

    With `stepped_by` there is no thread: it is called with the engine whenever the model's thread has to wait, and runs
    `step`, in any one thread at a time. `is_direct`: records are copied from where they lie, the device can read there;
    else `n_stagers` threads fill the chunks.
    """

    def __init__(
        self,
        device: Device,
        slots: Sequence[DeviceSlot],
        table: SlotTable,
        tally: Tally,
        *,
        chunk_nbytes: int = CHUNK_NBYTES,
        is_direct: bool = False,
        n_stagers: int = 1,
        stepped_by: Callable[["CopyEngine"], bool] | None = None,
    ) -> None:
        lock = threading.Lock()
        self.condition = threading.Condition(lock)  # the model's thread waits for copies to be submitted
        self._asked_for = threading.Condition(lock)  # the engine's thread waits for something to submit
        self._device = device
        self._slots = slots
        self._table = table
        self._tally = tally
        self._is_direct = is_direct
        self._queue = CopyQueue(chunk_nbytes, whole_demands=is_direct)
        self._sources: dict[int, Tensor] = {}  # slot → the record that was last copied into it
        self._lanes = [
            _Lane(
                device.new_event(f"chunk {index} copied"),
                None if is_direct else device.new_chunk(f"chunk {index}", chunk_nbytes),
            )
            for index in range(_N_CHUNKS)
        ]
        self._stager = Stager(1 if is_direct else n_stagers)
        self._n_pieces = 0
        self._n_calls = 0  # how often the thread is still called where nothing is staged
        self._stepping: int | None = None  # the thread that is submitting a piece
        self._stepped_by = stepped_by
        self._asked: Clock | None = None  # what the model's thread knew when it asked for a copy
        self._error: BaseException | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start the thread, unless the engine is stepped."""
        if self._stepped_by is None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="copy engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Submit nothing more, end the thread and wait until both queues are empty."""
        with self.condition:
            self._is_closing = True
            self._queue.clear()
            self._asked_for.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._stager.close()
        self._device.drain()

    def check(self) -> None:
        """Raise what went wrong in the engine's thread, if something did; under the lock."""
        if self._is_closing:
            raise RunnerError("the expert cache is closed")
        if isinstance(self._error, RunnerError):
            raise self._error
        if self._error is not None:
            raise CopyFailed(f"copying experts to the device failed: {self._error!r}") from self._error

    def submit(self, slot: int, source: Tensor, *, is_demand: bool) -> None:
        """Ask for a copy of a record, uint8, into a slot that nobody uses any more; under the lock, then `go_on`."""
        self._slots[slot].is_awaited = False
        self._sources[slot] = source
        self._queue.add(slot, source.numel(), is_demand=is_demand)
        self._asked = self._device.publish()

    def come_by(self) -> None:
        """Note whether the copy queue ran dry before the model's thread came to ask for more; under the lock."""
        if self._is_direct and not self._queue.is_empty:
            newest = self._lanes[(self._n_pieces - 1) % _N_CHUNKS]
            if newest.is_recorded and self._device.has_happened(newest.copied):
                self._n_calls = _N_CALLS

    def go_on(self) -> None:
        """Submit what was asked for as far as that does not block, leave the rest to the thread; without the lock."""
        while self._is_direct and self.step(may_block=False):
            pass
        with self.condition:
            if not self._queue.is_empty and (not self._is_direct or self._n_calls > 0):
                self._n_calls -= 1
                self._asked_for.notify()

    def promote(self, slot: int) -> None:
        """Copy that slot's expert before all that are only prefetched; under the lock."""
        self._queue.promote(slot)

    def cancel(self, slots: Iterable[int]) -> None:
        """Give slots back to the table, each at once or after the piece that is being submitted; under the lock."""
        for slot in slots:
            if self._queue.cancel(slot):
                self._table.given_back(slot)

    def wait(self) -> None:
        """Block the model's thread until the engine submitted more, the lock given up meanwhile; raise its error."""
        if self._stepped_by is None:
            self._asked_for.notify()
            self.condition.wait()
        else:
            self.condition.release()
            try:
                did_something = self._stepped_by(self)
            finally:
                self.condition.acquire()
            if not did_something:
                raise CopyFailed("a call waits for an expert that nobody copies")
        self.check()

    def step(self, *, may_block: bool = True) -> bool:
        """Submit the next piece; return False if there is none, or it would block, or another thread is at it.

        Without the lock. A thread that left a step by an exception may begin it again: nothing was staged, or it ends.
        """
        with self.condition:
            if self._stepping not in (None, get_ident()):
                return False
            self._stepping = None
            piece = self._queue.next()
            if piece is None or not (may_block or self._has_room(piece)):
                return False
            self._stepping = get_ident()
            self._queue.begin(piece)
            if self._asked is not None:
                self._device.observe(self._asked)
        self._copy(piece)
        with self.condition:
            self._stepping = None
            self._finish(piece)
        return True

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
        except BaseException as error:  # noqa: BLE001  # the thread's one loop: raised again where the model waits
            with self.condition:
                self._error = error
                self.condition.notify_all()

    def _wait_for_work(self) -> bool:
        with self.condition:
            while (self._queue.is_empty or self._stepping is not None) and not self._is_closing:
                self._asked_for.wait()
            return not self._is_closing

    def _copy(self, piece: Piece) -> None:
        device, slot = self._device, self._slots[piece.slot]
        if piece.is_first:
            if slot.was_used:
                device.copies.wait(slot.last_use)
            device.poison_slot(slot.buffer)
        if self._is_direct and piece.is_demand:
            device.copy_in(self._bytes_of(piece), slot.buffer, piece.offset, piece.nbytes)
        else:
            self._copy_in_lane(piece, slot.buffer)
        if piece.is_last:
            device.copies.record(slot.ready)

    def _copy_in_lane(self, piece: Piece, target: Buffer) -> None:
        """Submit a piece of which no more than _N_QUEUED_MAX are to be queued."""
        lane = self._lanes[self._n_pieces % _N_CHUNKS]
        source = self._bytes_of(piece) if lane.chunk is None else self._staged(piece, lane.chunk)
        self._wait_for_room()
        self._device.copy_in(source, target, piece.offset, piece.nbytes)
        self._device.copies.record(lane.copied)
        lane.is_recorded = True
        self._n_pieces += 1

    def _bytes_of(self, piece: Piece) -> Tensor:
        """Return the piece where it lies in its record."""
        source = self._sources[piece.slot]
        return source if piece.nbytes == source.numel() else source[piece.offset : piece.offset + piece.nbytes]

    def _staged(self, piece: Piece, chunk: Buffer) -> Buffer:
        """Return the chunk, filled with the piece.

        The chunk's earlier copy is done: it was waited for before the piece before this one was submitted.
        """
        with self._device.host_write(chunk) as memory:
            self._stager.copy(memory, self._sources[piece.slot], piece.offset, piece.nbytes)
        return chunk

    def _has_room(self, piece: Piece) -> bool:
        """Return whether submitting the piece, which is not staged, would not block."""
        oldest = self._oldest()
        return piece.is_demand or not oldest.is_recorded or self._device.has_happened(oldest.copied)

    def _wait_for_room(self) -> None:
        """Block until less than _N_QUEUED_MAX copies are queued; the oldest one's chunk is free from then on."""
        oldest = self._oldest()
        if oldest.is_recorded:
            self._device.synchronize(oldest.copied)
            if oldest.chunk is not None:
                self._device.release_chunk(oldest.chunk)

    def _oldest(self) -> _Lane:
        """Return the lane of the oldest copy that is to be over before another one is queued."""
        return self._lanes[(self._n_pieces - _N_QUEUED_MAX) % _N_CHUNKS]

    def _finish(self, piece: Piece) -> None:
        self._tally.copied_nbytes += piece.nbytes
        outcome = self._queue.finish(piece)
        if outcome is Outcome.FILLED:
            self._table.filled(piece.slot)
        elif outcome is Outcome.CANCELLED:
            self._table.given_back(piece.slot)
        if outcome is not Outcome.MORE:
            self.condition.notify_all()
