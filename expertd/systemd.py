"""What a service manager is told, and the descriptors it keeps for the next daemon: sd_notify by the standard library.

    READY=1, STATUS=…, STOPPING=1, WATCHDOG=1     datagrams to $NOTIFY_SOCKET
    FDSTORE=1, FDNAME=…  with a descriptor        kept by the manager, however this process ends
    FDSTOREREMOVE=1, FDNAME=…                     let go
    LISTEN_FDS, LISTEN_FDNAMES                    what it kept, handed to the process it starts next

A store is kept as a descriptor of its label, a small segment that holds its path and the memory it was allowed, and
those of its sealed segments, catalogue first. Each has a name of its own: the manager promises no order. Without a
manager everything here does nothing.
"""

import logging
import os
import re
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import SegmentError
from protocol.fdpass import close_all
from protocol.segment import make_segment, map_segment, segment_nbytes

logger = logging.getLogger(__name__)

MANAGER_VARIABLES = (
    "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"
)  # fmt: skip
FIRST_KEPT_FD = 3  # SD_LISTEN_FDS_START

_SEND_WITHIN_S = 1.0
_STATUS_LENGTH_MAX = 256
_LABEL_NBYTES_MAX = 1024 + 20
_LABEL = "label"
_NAME = re.compile(r"expertd-([0-9a-f]{64})-(label|\d{1,4})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ManagerEnvironment:
    """What the manager told this process when it started it."""

    notify_socket: str | None = None
    watchdog_s: float | None = None  # how long it may be silent
    kept: tuple[tuple[str, int], ...] = ()  # names and descriptors, which the reader of this owns


@dataclass(frozen=True, slots=True)
class KeptStore:
    """A store whose descriptors the manager kept, catalogue first; whoever takes it owns them."""

    path: Path
    digest: str
    memory_nbytes: int | None
    fds: list[int]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the manager keeps of a store."""

    fds: Sequence[int]
    n_fds: int


class ServiceManager:
    """The manager's ear; used from the main thread. A manager that does not listen is logged and holds nobody up."""

    def __init__(self, environment: ManagerEnvironment) -> None:
        self._address = environment.notify_socket
        self.watchdog_s = environment.watchdog_s
        self._handed_over = environment.kept
        self._kept: dict[str, _Kept] = {}
        self._said_status = ""

    @property
    def is_there(self) -> bool:
        """Whether this process was started by a manager that listens."""
        return self._address is not None

    def tell_ready(self) -> None:
        """Say that the service is up."""
        self._send("READY=1")

    def tell_stopping(self) -> None:
        """Say that the service is on its way out."""
        self._send("STOPPING=1")

    def tell_alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def tell_status(self, text: str) -> None:
        """Say in a line what `systemctl status` is to show; the same line is said once."""
        line = " ".join(text.split())[:_STATUS_LENGTH_MAX]
        if line != self._said_status:
            self._said_status = line
            self._send(f"STATUS={line}")

    def take_kept(self) -> list[KeptStore]:
        """Return the stores it kept for this process; what is no whole store is closed and let go."""
        whole = []
        for digest, parts in _by_digest(self._handed_over).items():
            n_fds = 1 + max(parts.segments, default=-1)
            store = _whole_store(digest, parts)
            self._kept[digest] = _Kept(store.fds if store else (), n_fds)
            if store is None:
                logger.warning("a store was kept in part, it is let go digest=%s", digest[:12])
                self.let_go(digest)
            else:
                whole.append(store)
        self._handed_over = ()
        return whole

    def keep_only(self, stores: Sequence[KeptStore], loading: Collection[str] = ()) -> None:
        """Have the descriptors of those stores kept and no others; they stay the caller's.

        A store is known by its very list of descriptors: another one is another copy. What is kept of one that is
        loading, by its digest, stays until it is ready.
        """
        by_digest = {store.digest: store for store in stores}
        for digest, kept in list(self._kept.items()):
            store = by_digest.get(digest)
            if digest not in loading and (store is None or store.fds is not kept.fds):
                self.let_go(digest)
        if not self.is_there:
            return
        for digest in by_digest.keys() - self._kept.keys():
            self._keep(by_digest[digest])

    def let_go(self, digest: str) -> None:
        """Have what is kept of a store kept no longer."""
        for index in (_LABEL, *range(self._kept.pop(digest).n_fds)):
            self._send(f"FDSTOREREMOVE=1\nFDNAME={_name(digest, index)}")

    def _keep(self, store: KeptStore) -> None:
        digest = store.digest
        self._kept[digest] = _Kept(store.fds, len(store.fds))
        label = make_segment("expertd-label", _label(store))
        try:
            # At the first one that is not taken the rest is not tried: each try may wait.
            named: list[tuple[int | str, int]] = [(_LABEL, label), *enumerate(store.fds)]
            if not all(self._send(f"FDSTORE=1\nFDNAME={_name(digest, index)}", fd) for index, fd in named):
                logger.error("store not kept by the service manager digest=%s", digest[:12])
        finally:
            os.close(label)

    def _send(self, text: str, fd: int | None = None) -> bool:
        """Return whether the manager took it."""
        if self._address is None:
            return True
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_SEND_WITHIN_S)
            try:
                sock.connect(address)  # send_fds takes an address and forgets it
                socket.send_fds(sock, [text.encode()], [] if fd is None else [fd])
            except OSError as error:
                logger.warning("the service manager does not listen error=%s", error)
                return False
        return True


@dataclass(slots=True)
class _Parts:
    """The descriptors of one store, by index, as far as they came."""

    label: int | None = None
    segments: dict[int, int] = field(default_factory=dict)


def manager_environment(environment: Mapping[str, str], pid: int) -> ManagerEnvironment:
    """Return what the manager's variables say, as far as they are meant for the process of that pid."""
    notify_socket = environment.get("NOTIFY_SOCKET")
    if notify_socket is not None and notify_socket[:1] not in ("/", "@"):
        notify_socket = None
    return ManagerEnvironment(notify_socket, _watchdog_s(environment, pid), _kept(environment, pid))


def _name(digest: str, index: int | str) -> str:
    return f"expertd-{digest}-{index}"


def _watchdog_s(environment: Mapping[str, str], pid: int) -> float | None:
    microseconds = environment.get("WATCHDOG_USEC", "")
    if not _is_number(microseconds) or int(microseconds) == 0:
        return None
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(microseconds) / 1e6


def _kept(environment: Mapping[str, str], pid: int) -> tuple[tuple[str, int], ...]:
    n_fds = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(pid) or not _is_number(n_fds):
        return ()
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    fds = range(FIRST_KEPT_FD, FIRST_KEPT_FD + int(n_fds))
    return tuple(zip(names, fds, strict=True)) if len(names) == len(fds) else ()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def _by_digest(kept: Sequence[tuple[str, int]]) -> dict[str, _Parts]:
    """Return the descriptors by store; those of other names are closed."""
    parts: dict[str, _Parts] = {}
    for name, fd in kept:
        match = _NAME.fullmatch(name)
        try:
            os.set_inheritable(fd, False)  # noqa: FBT003 - it takes no keyword
            if match is None:
                os.close(fd)
        except OSError:  # the variables promised one that is not there
            continue
        if match is not None:
            _put(parts.setdefault(match[1], _Parts()), match[2], fd)
    return parts


def _put(parts: _Parts, index: str, fd: int) -> None:
    """Note a descriptor; a second one of the same name is closed."""
    if index == _LABEL:
        if parts.label is None:
            parts.label = fd
            return
    elif int(index) not in parts.segments:
        parts.segments[int(index)] = fd
        return
    os.close(fd)


def _whole_store(digest: str, parts: _Parts) -> KeptStore | None:
    """Return the store if none of its descriptors is missing; close what there is if one is."""
    fds = [parts.segments[index] for index in sorted(parts.segments)]
    said = None
    if parts.label is not None:
        said = _read_label(parts.label)
        os.close(parts.label)
    if said is None or not fds or sorted(parts.segments) != list(range(len(fds))):
        close_all(fds)
        return None
    return KeptStore(said.path, digest, said.memory_nbytes, fds)


@dataclass(frozen=True, slots=True)
class _Label:
    """What a label says of a store."""

    path: Path
    memory_nbytes: int | None


def _label(store: KeptStore) -> bytes:
    """Return a label's bytes: the path and, behind a zero byte, the memory the store may take if that is bounded."""
    memory = b"" if store.memory_nbytes is None else b"\0%d" % store.memory_nbytes
    return os.fsencode(store.path) + memory


def _read_label(fd: int) -> _Label | None:
    """Return what a label says; None if it is none."""
    try:
        nbytes = segment_nbytes(fd)
        if not 0 < nbytes <= _LABEL_NBYTES_MAX:
            return None
        path, has_bound, bound = bytes(map_segment(fd, nbytes)).partition(b"\0")
    except SegmentError:
        return None
    said = os.fsdecode(path)
    if not Path(said).is_absolute() or (has_bound and not _is_number(os.fsdecode(bound))):
        return None
    return _Label(Path(said), int(bound) if has_bound else None)
