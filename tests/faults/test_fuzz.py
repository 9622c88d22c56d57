"""Nonsense on both sockets, 20,000 frames or a million: the daemon lives, its memory is bounded, others are served."""

import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

from protocol import fdpass
from protocol import messages as m
from protocol.codec import decode, encode, pack
from protocol.control_client import ControlClient
from protocol.handles import ExpertHandle, ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, Message, Refused, StoreState, StoreStatus
from protocol.schema import MESSAGE_NBYTES_MAX, Channel, Sender
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.daemon import DaemonProcess
from tests.support.request_client import RequestClient, file_bytes
from tests.support.stores import EXPERTS_FILE
from tests.support.tiers import load_tiered
from tests.support.waiting import wait_until

N_RAW = 100
N_SLOTS = 4
N_FRAMES = [10_000, pytest.param(500_000, marks=pytest.mark.slow)]  # on each socket
GROWTH_NBYTES_MAX = 40e6
KEY = ExpertKey(1, 2)
DIGEST = "ab" * 32
STORE = StoreStatus(DIGEST, "/s", StoreState.READY, 1, 1, 0.5, 1, 0, (), 0, None)
# One of each, of both sides: a daemon's message from a client is a mutation too. No Stop: it would be obeyed.
MESSAGES: tuple[Message, ...] = (
    m.Hello(2, 2, "0.1.0"),
    m.Attach(DIGEST),
    m.Load("/nowhere", DIGEST),
    m.Offer("/nowhere", DIGEST, None, 2),
    m.Unload(DIGEST),
    m.GetStatus(),
    m.Welcome(1, "0.1.0", 1, b"t" * 16),
    m.Attached(DIGEST, 1),
    STORE,
    m.Unloaded(DIGEST),
    m.Status(1, "0.1.0", 0.5, 1, 1, 1, 0, (STORE,), (m.SessionStatus(1, "0.1.0", 0.5, None),)),
    m.Stopping(),
    m.Draining(),
    Refused(Code.CORRUPT, "x"),
    m.Prefetch(1, (KEY,), 5),
    m.Acquire(1, (KEY,)),
    m.Release(1, (KEY,)),
    m.GetStats(1),
    m.Granted(1, (ExpertHandle(KEY, 0, 0, 1, 0),), (m.KeyRefusal(KEY, Refused(Code.CORRUPT, "x")),), 2),
    m.Stats(1, 0.5, 1, 0, 0),
    m.RequestRefusal(1, Refused(Code.CORRUPT, "x")),
)
STOP = encode(m.Stop())
VALUES: tuple[object, ...] = (None, -1, 2**63, "x" * 500, [[]], b"", 0.5, True)
# Headers that promise four billion items, and the one byte that starts nothing.
BOMBS = (b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc1")


def frames(rng: random.Random, n_frames: int) -> Iterator[bytes]:
    """Yield valid, mutated, random, deep and overlong frames."""
    valid = [encode(message) for message in MESSAGES]
    for _ in range(n_frames):
        frame = one_frame(rng, valid)
        yield frame if frame != STOP else b"\x00"


def one_frame(rng: random.Random, valid: list[bytes]) -> bytes:
    """Return one frame; most are valid ones with something wrong."""
    data = rng.choice(valid)
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: data,
        lambda: rng.randbytes(rng.randrange(1, 300)),
        lambda: rng.randbytes(MESSAGE_NBYTES_MAX + rng.randrange(1, 4096)),
        lambda: b"\x91" * rng.randrange(1, 5000) + b"\xc0",
        lambda: data[: rng.randrange(1, len(data) + 1)],
        lambda: data + rng.randbytes(rng.randrange(1, 20)),
        lambda: pack([rng.randrange(64), *rng.choices(VALUES, k=3)]),
        lambda: rng.choice(BOMBS),
    )
    return rng.choice(kinds)() if rng.random() < 0.65 else mutated(rng, data)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return a frame with up to three bytes changed."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


class ControlFuzzer:
    """Sends frames on the control socket and reads what comes; connects anew whenever it is dropped."""

    def __init__(self, daemon: DaemonProcess, rng: random.Random) -> None:
        self._daemon = daemon
        self._rng = rng
        self._fd = os.memfd_create("junk", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        self._sock = self._connect()
        self.n_answers = 0
        self.n_drops = 0

    def send(self, frame: bytes) -> None:
        """Send a frame, now and then with descriptors that are no store, and take the answer."""
        fds = [self._fd] * self._rng.choice((1, 2, 100)) if self._rng.random() < 0.03 else []
        try:
            fdpass.send_packet(self._sock, frame, fds)
            self._read()
        except OSError:
            self._again()

    def close(self) -> None:
        self._sock.close()
        os.close(self._fd)

    def _read(self) -> None:
        """Take the answer; every packet is answered or ends the connection."""
        data, fds = fdpass.receive_packet_with_fds(self._sock, MESSAGE_NBYTES_MAX)
        fdpass.close_all(fds)
        if not data:
            self._again()
            return
        decode(data, Channel.CONTROL, Sender.DAEMON)
        self.n_answers += 1

    def _again(self) -> None:
        self.n_drops += 1
        self._sock.close()
        self._sock = self._connect()

    def _connect(self) -> socket.socket:
        sock = fdpass.connect(self._daemon.directory.control_socket, 10.0)
        if self._rng.random() < 0.8:  # the others fuzz a session without hello
            fdpass.send_packet(sock, encode(m.Hello(2, 2, "0.1.0")))
            sock.recv(MESSAGE_NBYTES_MAX)
        return sock


def attached_client(daemon: DaemonProcess, digest: str) -> ControlClient:
    """Return a session with a store: its requests go as far as requests can."""
    client = daemon.client()
    fdpass.close_all(client.attach(digest))
    return client


def fuzz_requests(
    daemon: DaemonProcess, context: zmq.Context[zmq.Socket[bytes]], rng: random.Random, digest: str, n_frames: int
) -> None:
    """Send frames on the request socket: with a good token, a bad one and none; one, two, four and 500 at once."""
    with context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.reconnect_ivl = 1  # a frame that is too long costs the connection
        dealer.connect(daemon.directory.request_endpoint)
        client = attached_client(daemon, digest)
        for number, frame in enumerate(frames(rng, n_frames)):
            if number % 50 == 0:  # three bad messages end a session: a new token now and then
                client.close()
                client = attached_client(daemon, digest)
            dealer.send_multipart(request(rng, client.welcome.token, frame))
            with suppress(zmq.Again):
                while True:
                    decode(dealer.recv(zmq.NOBLOCK), Channel.REQUEST, Sender.DAEMON)
        client.close()


def request(rng: random.Random, token: bytes, frame: bytes) -> list[bytes]:
    """Return the frames of one request, most of them as many as there should be."""
    match rng.randrange(12):
        case 0:
            return [frame]
        case 1:
            return [rng.randbytes(16), frame]
        case 2:
            return [token, frame, frame, b""]
        case 3:
            return [token, b"", frame]
        case 4:
            return [frame, token]
    if rng.random() < 0.005:
        return [token] * 500
    return [token, frame]


def fuzz_raw(daemon: DaemonProcess, rng: random.Random) -> None:
    """Send bytes that are no ZeroMQ to the request socket."""
    greeting = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48)
    for _ in range(N_RAW):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10.0)
            sock.connect(str(daemon.directory.request_socket))
            junk = rng.randbytes(rng.randrange(1, 2000))
            with suppress(OSError):
                sock.sendall(junk if rng.random() < 0.5 else greeting + junk)


def read_through(store: Path, manifest: Manifest) -> bool:
    """Whether a well-behaved runner gets what the files hold."""
    data = (store / EXPERTS_FILE).read_bytes()
    with attach(store, RunnerConfig(autostart=False)) as attached:
        return all(
            attached.expert_record(key) == data[record.offset : record.offset + record.nbytes]
            for key, record in manifest.experts.items()
        )


def stats(daemon: DaemonProcess, context: zmq.Context[zmq.Socket[bytes]]) -> Message:
    """Return the answer to a well-behaved request."""
    with context.socket(zmq.DEALER) as dealer, daemon.client() as client:
        dealer.linger = 0
        dealer.connect(daemon.directory.request_endpoint)
        dealer.send_multipart([client.welcome.token, encode(m.GetStats(5))])
        assert dealer.poll(10_000)
        return decode(dealer.recv(), Channel.REQUEST, Sender.DAEMON)


@pytest.mark.parametrize("n_frames", N_FRAMES)
def test_nonsense_on_the_control_socket(daemon: DaemonProcess, store: Path, manifest: Manifest, n_frames: int) -> None:
    rng = random.Random(20)
    daemon.load(store, manifest.digest)
    n_fds = daemon.n_fds() if os.geteuid() == 0 else 0
    fuzzer = ControlFuzzer(daemon, rng)
    with daemon.client() as polite:
        before = daemon.private_nbytes()
        for number, frame in enumerate(frames(rng, n_frames)):
            fuzzer.send(frame)
            if number % 2000 == 500:
                assert read_through(store, manifest)
        during = polite.ask(m.GetStatus(), m.Status)
        grown = daemon.private_nbytes() - before
    fuzzer.close()

    wait_until(lambda: daemon.sessions() == 0, "all sessions to end")

    assert daemon.is_alive()
    assert not n_fds or daemon.n_fds() == n_fds
    assert grown < GROWTH_NBYTES_MAX
    assert fuzzer.n_answers + fuzzer.n_drops >= n_frames
    assert fuzzer.n_drops > 100
    assert during.n_bad_messages > n_frames / 3
    assert read_through(store, manifest)
    assert "Traceback" not in daemon.log


@pytest.mark.parametrize("n_frames", N_FRAMES)
def test_nonsense_on_the_request_socket(daemon: DaemonProcess, store: Path, manifest: Manifest, n_frames: int) -> None:
    rng = random.Random(21)
    load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
    with zmq.Context() as context:
        first = stats(daemon, context)
        before = daemon.private_nbytes()

        fuzz_requests(daemon, context, rng, manifest.digest, n_frames)
        fuzz_raw(daemon, rng)

        last = stats(daemon, context)
        grown = daemon.private_nbytes() - before
    wait_until(lambda: daemon.sessions() == 0, "all sessions to end")

    assert daemon.is_alive()
    assert isinstance(first, m.Stats)
    assert isinstance(last, m.Stats)
    assert grown < GROWTH_NBYTES_MAX
    assert daemon.status().n_bad_messages > n_frames / 4
    with RequestClient(daemon.directory, manifest.digest) as client:
        for key in manifest.experts:
            assert client.bytes_of(client.acquire(key).handles[0]) == file_bytes(store, client.catalogue, key)
            client.release(key)
    assert "Traceback" not in daemon.log


def test_a_peer_that_speaks_an_old_zmtp_is_not_listened_to(daemon: DaemonProcess) -> None:
    """libzmq takes its frames without a word of who sent them."""
    with zmq.Context() as context, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.directory.request_socket))

        # ZMTP 1.0: an anonymous peer, then a message of two frames.
        sock.sendall(b"\x01\x00" + b"\x11\x01" + b"t" * 16 + b"\x02\x00x")
        wait_until(lambda: daemon.status().n_bad_messages == 1, "the stray frame")

        assert isinstance(stats(daemon, context), m.Stats)


def test_every_message_a_client_may_send_is_among_the_fuzzed() -> None:
    from protocol.schema import SCHEMA

    fuzzed = {type(message) for message in MESSAGES}

    assert {spec.struct.cls for spec in SCHEMA} - fuzzed == {m.Stop}
