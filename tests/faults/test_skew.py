"""Versions that differ by one, in either direction, and a daemon that lies: said in a line, nothing kept."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from protocol import fdpass
from protocol import messages as m
from protocol.catalogue import encode_catalogue, plan_catalogue
from protocol.codec import decode, encode, pack
from protocol.control_client import ControlClient
from protocol.errors import DaemonSilent, VersionMismatch
from protocol.fdpass import close_all, receive_packet, send_packet
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, Message, Refused
from protocol.runtime_dir import RuntimeDir, create_runtime_dir
from protocol.schema import MESSAGE_NBYTES_MAX, Channel, Sender
from protocol.segment import make_segment
from protocol.version import HIGHEST_PROTOCOL_VERSION, LOWEST_PROTOCOL_VERSION
from runner.client import attach
from runner.config import RunnerConfig
from runner.errors import RunnerError, StoreUnavailable
from tests.support.daemon import DaemonProcess

NO_AUTOSTART = RunnerConfig(autostart=False)
OLDER, NEWER = LOWEST_PROTOCOL_VERSION - 1, HIGHEST_PROTOCOL_VERSION + 1
WELCOME = m.Welcome(HIGHEST_PROTOCOL_VERSION, "9.9.9", os.getpid(), bytes(16))


def hello(daemon: DaemonProcess, lowest: int, highest: int) -> Message:
    """Return what a client of those versions is answered."""
    with fdpass.connect(daemon.directory.control_socket, 10.0) as sock:
        send_packet(sock, encode(m.Hello(lowest, highest, "0.0.1")))
        return decode(sock.recv(MESSAGE_NBYTES_MAX), Channel.CONTROL, Sender.DAEMON)


@pytest.mark.parametrize(("lowest", "highest"), [(OLDER, OLDER), (NEWER, NEWER)])
def test_a_client_of_another_version_is_told_which_ones_there_are(
    daemon: DaemonProcess, lowest: int, highest: int
) -> None:
    answer = hello(daemon, lowest, highest)

    assert isinstance(answer, Refused)
    assert answer.code is Code.VERSION_MISMATCH
    assert f"{LOWEST_PROTOCOL_VERSION} to {HIGHEST_PROTOCOL_VERSION}" in answer.detail
    assert daemon.sessions() == 0


@pytest.mark.parametrize(("lowest", "highest"), [(OLDER, HIGHEST_PROTOCOL_VERSION), (LOWEST_PROTOCOL_VERSION, NEWER)])
def test_a_client_that_speaks_our_version_too_is_welcome(daemon: DaemonProcess, lowest: int, highest: int) -> None:
    answer = hello(daemon, lowest, highest)

    assert isinstance(answer, m.Welcome)
    assert answer.version == HIGHEST_PROTOCOL_VERSION


@pytest.mark.parametrize(
    "frame",
    [
        pack([3, "/models/demo", "ab" * 32]),  # Load, as version 1 had it
        pack([3, "/models/demo", "ab" * 32, None, [], "one field more"]),
        pack([99]),  # a message that only a newer version knows
    ],
    ids=["older", "newer", "unknown"],
)
def test_a_frame_of_another_version_is_a_bad_message_and_the_session_goes_on(
    daemon: DaemonProcess, frame: bytes
) -> None:
    with daemon.client() as client:
        send_packet(client._sock, frame)
        answer = decode(client._sock.recv(MESSAGE_NBYTES_MAX), Channel.CONTROL, Sender.DAEMON)
        status = client.ask(m.GetStatus(), m.Status)

    assert isinstance(answer, Refused)
    assert answer.code is Code.BAD_MESSAGE
    assert status.n_bad_messages == 1


# --- a daemon that is not ours ----------------------------------------------------------------------------------

Reply = tuple[bytes, list[int]]


@contextmanager
def lying_daemon(directory: RuntimeDir, replies: Iterator[Reply], *, stays: bool = False) -> Iterator[None]:
    """Answer the one client that comes with those packets and descriptors, one a message; then hang up, or stay."""
    create_runtime_dir(directory)
    listener = fdpass.listen(directory.control_socket, backlog=1)
    listener.setblocking(True)  # noqa: FBT003 - the socket module's signature

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            for data, fds in replies:
                receive_packet(sock, MESSAGE_NBYTES_MAX)
                send_packet(sock, data, fds)
                close_all(fds)
            if stays:
                receive_packet(sock, MESSAGE_NBYTES_MAX)  # returns when the client has gone

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=20)
        listener.close()


def welcome() -> Reply:
    return encode(WELCOME), []


def unsealed(nbytes: int) -> int:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    return fd


def attached(manifest: Manifest, *fds: int, n_fds: int | None = None) -> Reply:
    return encode(m.Attached(manifest.digest, len(fds) if n_fds is None else n_fds)), list(fds)


def honest_catalogue(manifest: Manifest) -> int:
    return make_segment("expertd-catalogue", encode_catalogue(plan_catalogue(manifest)))


def displaced_catalogue(manifest: Manifest) -> int:
    """A catalogue with one expert a page behind the end of its segment."""
    planned = plan_catalogue(manifest)
    key, handle = next(reversed(planned.experts.items()))
    moved = handle._replace(offset=planned.segments_nbytes[handle.segment] - handle.nbytes + 4096)
    return make_segment("expertd-catalogue", encode_catalogue(replace(planned, experts=planned.experts | {key: moved})))


def pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def sizes(manifest: Manifest) -> tuple[int, ...]:
    return plan_catalogue(manifest).segments_nbytes


LIES: dict[str, tuple[Callable[[Manifest], Reply], str]] = {
    "unsealed segments": (
        lambda man: attached(man, honest_catalogue(man), *map(unsealed, sizes(man))),
        "its content could change",
    ),
    "short segments": (
        lambda man: attached(man, honest_catalogue(man), *(make_segment("s", bytes(4096)) for _ in sizes(man))),
        "a segment has 4096 bytes",
    ),
    "too few segments": (lambda man: attached(man, honest_catalogue(man)), "segments were promised, 0 came"),
    "fewer descriptors than announced": (
        lambda man: attached(man, honest_catalogue(man), n_fds=5),
        "5 descriptors were announced",
    ),
    "a pipe for a catalogue": (lambda man: attached(man, pipe_end()), "no sealable memory"),
    "an unsealed catalogue": (lambda man: attached(man, unsealed(4096)), "its content could change"),
    "junk for a catalogue": (lambda man: attached(man, make_segment("j", b"\xc1" * 99)), "not msgpack"),
    "an offset behind the end": (
        lambda man: attached(man, displaced_catalogue(man), *(make_segment("s", bytes(n)) for n in sizes(man))),
        "lie outside segment",
    ),
    "no answer of the schema": (lambda _: (b"\xc1\xc1", []), "not msgpack"),
    "another message": (lambda _: (encode(m.Stopping()), []), "Attached was expected from expertd, Stopping came"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_daemon_that_lies_is_not_believed(runtime: RuntimeDir, store: Path, manifest: Manifest, lie: str) -> None:
    """The fixture around every test here sees that no descriptor and no mapping of it is kept."""
    make, message = LIES[lie]

    with (
        lying_daemon(runtime, iter([welcome(), make(manifest)])),
        pytest.raises(RunnerError, match=message),
    ):
        attach(store, NO_AUTOSTART)


def test_a_daemon_that_falls_silent_between_descriptors_is_not_waited_for(
    runtime: RuntimeDir, manifest: Manifest
) -> None:
    announced = attached(manifest, honest_catalogue(manifest), n_fds=5)

    with lying_daemon(runtime, iter([welcome(), announced]), stays=True), pytest.raises(DaemonSilent):  # noqa: SIM117
        with ControlClient(runtime, timeout_s=0.3) as client:
            client.attach(manifest.digest)


def test_a_daemon_that_chooses_a_version_that_was_not_offered_is_not_spoken_to(runtime: RuntimeDir) -> None:
    newer: Reply = (encode(replace(WELCOME, version=NEWER)), [])

    with lying_daemon(runtime, iter([newer])), pytest.raises(VersionMismatch, match=f"chose protocol version {NEWER}"):
        ControlClient(runtime)


def test_a_newer_daemon_s_refusal_names_the_way_out(runtime: RuntimeDir, store: Path) -> None:
    refusal = encode(Refused(Code.VERSION_MISMATCH, f"expertd 9.9.9 speaks protocol versions {NEWER} to {NEWER}"))

    with (
        lying_daemon(runtime, iter([(refusal, [])])),
        pytest.raises(
            StoreUnavailable, match=rf"versions {NEWER} to {NEWER}; this client speaks .*`kill {os.getpid()}`"
        ),
    ):
        attach(store, NO_AUTOSTART)


def test_keys_outside_of_the_store_are_refused(loaded: DaemonProcess, manifest: Manifest) -> None:
    """A client that lies about experts: nothing but its own request suffers."""
    from tests.support.request_client import RequestClient

    with RequestClient(loaded.directory, manifest.digest) as client:
        answer = client.ask(m.Acquire(5, (ExpertKey(65535, 65535),)))
        stats = client.stats()

    assert isinstance(answer, m.RequestRefusal)
    assert stats.n_refused == 1
