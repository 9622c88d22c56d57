"""A client of the request channel without a runner: sends requests, looks at slots. What a runner does, by hand."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import zmq

from protocol.catalogue import Catalogue, decode_catalogue
from protocol.codec import decode, encode
from protocol.control_client import ControlClient
from protocol.fdpass import close_all
from protocol.handles import ExpertHandle, ExpertKey
from protocol.messages import Acquire, GetStats, Granted, Message, Prefetch, Release, Stats
from protocol.runtime_dir import RuntimeDir
from protocol.schema import Channel, Sender
from protocol.segment import map_segment, segment_nbytes
from protocol.slot_table import SlotTable


class RequestClient:
    """One session that is attached to a store, with its request socket; a context manager."""

    def __init__(self, directory: RuntimeDir, digest: str, *, timeout_s: float = 20.0) -> None:
        self._timeout_ms = int(timeout_s * 1000)
        self._next_id = 0
        with ExitStack() as stack:
            self.control = stack.enter_context(ControlClient(directory, timeout_s=timeout_s))
            fds = self.control.attach(digest)
            try:
                self.catalogue = _catalogue(fds[0])
                sizes = enumerate(self.catalogue.segments_nbytes)
                self.views = [map_segment(fds[1 + i], nbytes, self.catalogue.kind(i)) for i, nbytes in sizes]
            finally:
                close_all(fds)
            context = stack.enter_context(zmq.Context())
            self.socket = stack.enter_context(context.socket(zmq.DEALER))
            self.socket.setsockopt(zmq.LINGER, 0)
            self.socket.connect(directory.request_endpoint)
            self._stack = stack.pop_all()

    def __enter__(self) -> "RequestClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session and let the memory go."""
        self.views.clear()
        self._stack.close()

    @property
    def table(self) -> SlotTable:
        """The slot table; the store must have one."""
        assert self.catalogue.slots is not None
        return SlotTable(self.views[self.catalogue.slots.table_segment], self.catalogue.slots.n_slots)

    def bytes_of(self, handle: ExpertHandle) -> bytes:
        """Return what lies at a handle just now."""
        return bytes(self.views[handle.segment][handle.offset : handle.offset + handle.nbytes])

    def send(self, message: Message) -> None:
        """Send a request."""
        self.socket.send_multipart([self.control.welcome.token, encode(message)])

    def receive(self) -> Message:
        """Return the next answer."""
        assert self.socket.poll(self._timeout_ms), "no answer came"
        return decode(self.socket.recv(), Channel.REQUEST, Sender.DAEMON)

    def ask(self, message: Message) -> Message:
        """Send a request and return the next answer."""
        self.send(message)
        return self.receive()

    def request_id(self) -> int:
        """Return a number that no request has had."""
        self._next_id += 1
        return self._next_id

    def send_acquire(self, *keys: ExpertKey) -> int:
        """Ask for experts and return the request's number."""
        request_id = self.request_id()
        self.send(Acquire(request_id, keys))
        return request_id

    def granted(self, request_id: int) -> Granted:
        """Return the next answer, which must belong to that request."""
        reply = self.receive()
        assert isinstance(reply, Granted), reply
        assert reply.request_id == request_id
        return reply

    def acquire(self, *keys: ExpertKey, after_each: Callable[[Granted], None] = lambda _: None) -> Granted:
        """Ask for experts and wait for all of them; return all answers as one."""
        request_id = self.send_acquire(*keys)
        answers = [self.granted(request_id)]
        after_each(answers[0])
        while answers[-1].n_awaited:
            answers.append(self.granted(request_id))
            after_each(answers[-1])
        handles = tuple(handle for answer in answers for handle in answer.handles)
        return Granted(request_id, handles, tuple(refusal for answer in answers for refusal in answer.refusals))

    def release(self, *keys: ExpertKey) -> None:
        """Give leases back."""
        self.send(Release(self.request_id(), keys))

    def prefetch(self, keys: Iterable[ExpertKey], *, deadline_ms: int = 60_000) -> None:
        """Send a hint."""
        self.send(Prefetch(self.request_id(), tuple(keys), deadline_ms))

    def stats(self) -> Stats:
        """Return this session's counters."""
        reply = self.ask(GetStats(self.request_id()))
        assert isinstance(reply, Stats), reply
        return reply


def file_bytes(store: Path, catalogue: Catalogue, key: ExpertKey) -> bytes:
    """Return the record of an expert as the store's file has it."""
    record = catalogue.manifest.experts[key]
    with (store / record.file).open("rb") as file:
        file.seek(record.offset)
        return file.read(record.nbytes)


def _catalogue(fd: int) -> Catalogue:
    return decode_catalogue(bytes(map_segment(fd, segment_nbytes(fd))))
