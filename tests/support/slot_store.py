"""A store larger than memory in this process: slots that really are read into, evicted and overwritten, and what
answers a runner's messages as expertd does. Nothing happens by itself: a seed decides what does, and when.

Every message goes through the codec. Time passes only while the runner waits, and by as much as it waits.
"""

import random
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from protocol.bell import Bell
from protocol.codec import decode, encode
from protocol.handles import ExpertHandle, ExpertKey
from protocol.manifest import Manifest
from protocol.messages import (
    Acquire,
    Code,
    GetStats,
    Granted,
    KeyRefusal,
    Message,
    Prefetch,
    Refused,
    Release,
    Stats,
)
from protocol.schema import Channel, Sender
from protocol.slot_area import slot_table_nbytes
from protocol.slot_table import SlotTable, SlotTableWriter, plan_slot_area
from runner.errors import SessionGone, StoreUnavailable
from runner.store_view import StoreView


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how often: probabilities for each message, read or computation; and single experts."""

    loses: float = 0.0
    evicts: float = 0.0  # any slot that is not leased, while the runner computes
    reclaims: float = 0.0  # any slot, leased or not
    corrupt: Collection[ExpertKey] = ()
    unreadable: Mapping[ExpertKey, int] | None = None  # how many reads of it fail
    session_ends_after: int | None = None  # so many messages
    is_gone_for_good: bool = False
    is_silent: bool = False  # no answers at all, and nothing is read


class SlotStore:
    """A StoreView with HostSlots over another StoreView, which stands for the files on disk."""

    def __init__(
        self,
        disk: StoreView,
        n_slots: int,
        *,
        resident: Collection[ExpertKey] = (),
        faults: Faults = Faults(),
        seed: int = 0,
    ) -> None:
        self._disk = disk
        self._resident = frozenset(resident)
        self.faults = faults
        self.random = random.Random(seed)
        self.n_slots = n_slots
        self.keys = frozenset(disk.manifest.experts) - self._resident
        self.now_s = 1000.0
        self.received: list[Message] = []
        self.n_sessions = 0
        self.n_reads = 0
        self._failures_left = dict(faults.unreadable or {})
        self._n_until_end = 0
        self._prefetches: list[ExpertKey] = []
        self._begin_session()

    # --- StoreView

    @property
    def manifest(self) -> Manifest:
        return self._disk.manifest

    @property
    def host_slots(self) -> "SlotStore":
        return self

    def expert_record(self, key: ExpertKey) -> memoryview:
        assert key in self._resident
        return self._disk.expert_record(key)

    def dense_record(self, name: str) -> memoryview:
        return self._disk.dense_record(name)

    def side_file(self, name: str) -> bytes | None:
        return self._disk.side_file(name)

    # --- HostSlots

    @property
    def requests(self) -> "SlotStore":
        return self

    def slot(self, slot: int) -> memoryview:
        return memoryview(self._slots[slot])

    def slot_of(self, handle: ExpertHandle) -> int:
        return self._area.slot_of(handle)

    def renewed(self) -> "SlotStore":
        if self.faults.is_gone_for_good:
            raise StoreUnavailable("no expertd runs")
        self._begin_session()
        return self

    # --- RequestChannel

    def send(self, message: Message) -> None:
        message = decode(encode(message), Channel.REQUEST, Sender.CLIENT)
        self.received.append(message)
        self._n_until_end -= 1
        if self._n_until_end < 0 or self._is_lost():
            return
        if isinstance(message, Acquire):
            self._acquire(message)
        elif isinstance(message, Release):
            self._release(message)
        elif isinstance(message, Prefetch):
            self._prefetches = [key for key in message.keys if key not in self._where]
        elif isinstance(message, GetStats):
            self._replies.append(Stats(message.request_id, 0.0, len(self.received), 0, len(self.leases)))

    def receive(self) -> Message | None:
        if self._n_until_end < 0:
            raise SessionGone("the session with expertd has ended")
        if self.random.random() < 0.5:
            self.work()
        while self._replies:
            reply = self._replies.popleft()
            if not self._is_lost() and not self.faults.is_silent:
                return decode(encode(reply), Channel.REQUEST, Sender.DAEMON)
        return None

    def wait(self, bell: Bell, n_rings: int, timeout_s: float) -> bool:
        if self._n_until_end < 0:
            raise SessionGone("the session with expertd has ended")
        self.work()
        if self._replies or bell.n_rings != n_rings:
            return True
        self.now_s += timeout_s
        if self._demands and not self._free and self.leases.issuperset(self._where):
            self.evict(next(iter(self._where)))  # nothing moves: the oldest lease is taken back
        return False

    # --- what the daemon does

    def work(self) -> None:
        """Read what is demanded as far as there are slots, else one expert that is hinted at."""
        if self.faults.is_silent:
            return
        demanded = list(self._demands)
        self.random.shuffle(demanded)
        for key in demanded[: self.random.randint(1, 2)]:
            self._serve(key)
        if not demanded and self._prefetches:
            self._read(self._prefetches.pop(0))

    def while_computing(self) -> None:
        """Do to the slots what may happen while a runner computes from them."""
        if self.random.random() < 0.5:
            self.work()
        if self.random.random() < self.faults.evicts:
            self._evict_any([key for key in self._where if key not in self.leases])
        if self.random.random() < self.faults.reclaims:
            self._evict_any(list(self._where))

    def evict(self, key: ExpertKey) -> None:
        """Give the slot of that expert to nobody: its bytes are others now."""
        slot = self._where.pop(key)
        self.leases.discard(key)
        self._table.begin(slot)
        self._slots[slot][:] = self.random.randbytes(len(self._slots[slot]))
        self._free.append(slot)

    @property
    def present(self) -> set[ExpertKey]:
        return set(self._where)

    @property
    def on_their_way(self) -> set[ExpertKey]:
        """The experts of answers that the runner has not got yet."""
        return {handle.key for reply in self._replies if isinstance(reply, Granted) for handle in reply.handles}

    def read(self, key: ExpertKey) -> None:
        """Read an expert into a slot as if another runner had asked for it."""
        assert self._read(key)

    def _begin_session(self) -> None:
        nbytes = max(self.manifest.experts[key].nbytes for key in self.keys)
        self._area = plan_slot_area(nbytes, self.n_slots, 1)
        self._slots = [bytearray(nbytes) for _ in range(self.n_slots)]
        table = memoryview(bytearray(slot_table_nbytes(self.n_slots)))
        self._table, self.table = SlotTableWriter(table, self.n_slots), SlotTable(table, self.n_slots)
        self._free = list(range(self.n_slots))
        self._where: dict[ExpertKey, int] = {}  # the least recently used first
        self.leases: set[ExpertKey] = set()
        self._demands: dict[ExpertKey, int] = {}  # with the request
        self._prefetches = []
        self._replies: deque[Message] = deque()
        limit = self.faults.session_ends_after
        self._n_until_end = 1 << 60 if limit is None else limit
        self.n_sessions += 1

    def _is_lost(self) -> bool:
        return self.random.random() < self.faults.loses

    def _acquire(self, message: Acquire) -> None:
        for key in message.keys:
            assert key in self.keys
            self._demands[key] = message.request_id
        for key in [key for key in message.keys if key in self._where]:
            self._serve(key)

    def _release(self, message: Release) -> None:
        for key in message.keys:
            self.leases.discard(key)
            if key in self._where:
                self._where[key] = self._where.pop(key)

    def _serve(self, key: ExpertKey) -> None:
        if key in self.faults.corrupt:
            self._refuse(key, Code.CORRUPT, "its bytes do not match their checksum")
        elif self._failures_left.get(key, 0) > 0:
            self._failures_left[key] -= 1
            self._refuse(key, Code.READ_FAILED, "Input/output error")
        elif self._read(key):
            self.leases.add(key)
            request_id = self._demands.pop(key)
            self._replies.append(Granted(request_id, (self._handle(key),), (), self._n_awaited(request_id)))

    def _refuse(self, key: ExpertKey, code: Code, detail: str) -> None:
        request_id = self._demands.pop(key)
        refusal = KeyRefusal(key, Refused(code, detail))
        self._replies.append(Granted(request_id, (), (refusal,), self._n_awaited(request_id)))

    def _n_awaited(self, request_id: int) -> int:
        return sum(request == request_id for request in self._demands.values())

    def _read(self, key: ExpertKey) -> bool:
        """Have an expert in a slot; return whether there was one for it."""
        if key not in self._where:
            if not self._free:
                evictable = [other for other in self._where if other not in self.leases]
                if not evictable:
                    return False
                self.evict(evictable[0])
            slot = self._free.pop()
            record = self._disk.expert_record(key)
            self._table.begin(slot)
            self._slots[slot][: len(record)] = record
            self._table.publish(slot, key)
            self._where[key] = slot
            self.n_reads += 1
        return True

    def _handle(self, key: ExpertKey) -> ExpertHandle:
        slot = self._where[key]
        nbytes = self.manifest.experts[key].nbytes
        return ExpertHandle(key, *self._area.place(slot), nbytes, self._table.generation(slot))

    def _evict_any(self, keys: list[ExpertKey]) -> None:
        if keys:
            self.evict(self.random.choice(keys))
