"""The runner's session with expertd: attach to a store, start the daemon if none runs. Blocks its caller.

The open control connection is the session, so it is kept for as long as the store is (`reattach.py`). Everything else
is mapped memory: once attached, a resident store costs no message, and it stays readable if the daemon dies.
"""

import hashlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from protocol.catalogue import CATALOGUE_NBYTES_MAX, Catalogue, decode_catalogue
from protocol.control_client import ControlClient
from protocol.errors import DaemonSilent, DaemonUnavailable, ManifestError, ProtocolError, RequestRefused
from protocol.fault_points import FaultPoint, reached
from protocol.fdpass import close_all
from protocol.handles import ExpertKey
from protocol.manifest import MANIFEST_FILE, MANIFEST_NBYTES_MAX, Manifest, manifest_digest
from protocol.messages import Code, GetStatus, Load, Status
from protocol.segment import map_segment, segment_nbytes
from protocol.slot_table import SlotArea
from runner.config import RunnerConfig, my_runtime_dir
from runner.errors import CorruptExpert, StoreChanged, StoreInvalid, StoreUnavailable
from runner.host_slots import AttachedSlots
from runner.reattach import Identity, Session
from runner.recovery import Recovery

_ATTEMPTS_MAX = 3
# What `expertd start STORE` mends, or says anew: what failed to load earlier may load now.
_MENDABLE = (
    Code.UNKNOWN_STORE,
    Code.STORE_LOADING,
    Code.DRAINING,
    Code.OUT_OF_MEMORY,
    Code.STORE_INVALID,
)


class AttachedStore:
    """A store mapped into this process: a StoreView, and the session it came from. A context manager.

    Views and tensors made from them stay valid after closing; the memory goes when the last of them does.
    """

    def __init__(
        self,
        path: Path,
        client: ControlClient,
        digest: str,
        *,
        started_daemon: bool = False,
        start_daemon: Callable[[], None] | None = None,
    ) -> None:
        """Attach over a fresh session; raise ProtocolError or StoreChanged. The client is owned from here on.

        `start_daemon` starts one when this one is gone and the store cannot do without; None: that is not allowed.
        """
        start = time.perf_counter()
        self.path = path
        self.started_daemon = started_daemon
        fds = client.attach(digest)
        try:
            if not fds:
                raise StoreChanged(f"{path}: expertd sent no segments")
            self._catalogue = _map_catalogue(fds[0], digest)
            reached(FaultPoint.RUNNER_CATALOGUE_MAPPED)
            sizes = self._catalogue.segments_nbytes
            if len(fds) != 1 + len(sizes):
                raise StoreChanged(f"{path}: {len(sizes)} segments were promised, {len(fds) - 1} came")
            self._views = [
                map_segment(fd, nbytes, self._catalogue.kind(segment))
                for segment, (fd, nbytes) in enumerate(zip(fds[1:], sizes, strict=True))
            ]
            n_sealed = self._catalogue.n_sealed
            identity = Identity(my_runtime_dir(), path, digest)
            self._session = Session(identity, client, fds[: 1 + n_sealed], self._views[:n_sealed])
        finally:
            close_all(fds)
        reached(FaultPoint.RUNNER_ATTACHED)
        self._slots: AttachedSlots | None = None
        if self._catalogue.slots is not None:
            try:
                self._recovery = Recovery(my_runtime_dir(), self._load_again(client), self._session, start_daemon)
                self._slots = self._open_slots(client, self._catalogue.slots)
            except BaseException:
                self._session.close()
                raise
        self.shared_nbytes = sum(sizes)
        self.attach_s = time.perf_counter() - start

    def __enter__(self) -> "AttachedStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        """The content of the store."""
        return self._catalogue.manifest

    @property
    def host_slots(self) -> AttachedSlots | None:
        """The slots of a store that is larger than its memory; None for one that is all there."""
        return self._slots

    def expert_record(self, key: ExpertKey) -> memoryview:
        """Return the bytes of one expert that lies in the shared mapping for good; raise CorruptExpert."""
        handle = self._catalogue.experts.get(key)
        if handle is None:
            raise CorruptExpert(f"{self.path}: {key} is corrupt; see `expertd verify {self.path}`, then make it again")
        return self._views[handle.segment][handle.offset : handle.offset + handle.nbytes]

    def dense_record(self, name: str) -> memoryview:
        """Return the bytes of one dense tensor's record; raise StoreInvalid if the store has none of that name."""
        handle = self._catalogue.dense.get(name)
        if handle is None:
            raise StoreInvalid(f"{self.path}: the store has no tensor {name}")
        return self._views[handle.segment][handle.offset : handle.offset + handle.nbytes]

    def side_file(self, name: str) -> bytes | None:
        """Return a side file of the store, None if it has none of that name; raise StoreChanged."""
        for side_file in self.manifest.files:
            if side_file.name == name:
                data = _read_bounded(self.path / name, side_file.nbytes)
                if hashlib.sha256(data).hexdigest() != side_file.sha256:
                    raise StoreChanged(f"{self.path / name}: not the file this store was made with")
                return data
        return None

    def tend(self, now: float) -> None:
        """Look after the session, between steps: attach again where the daemon was replaced. Raise StoreChanged."""
        if self._slots is None:
            self._session.tend(now)

    def close(self) -> None:
        """End the session; calling it again does nothing."""
        if self._slots is not None:
            self._slots.close()
        self._session.close()
        self._views = []

    def _open_slots(self, client: ControlClient, area: SlotArea) -> AttachedSlots:
        keys = self.manifest.experts.keys() - self._catalogue.experts.keys()
        from runner.requests import Requests  # ZeroMQ takes a moment to import, which a resident store does not need

        return AttachedSlots(area, self._views, keys, Requests(my_runtime_dir(), client), renew=self._renew_slots)

    def _load_again(self, client: ControlClient) -> Load:
        """Return what makes another daemon hold the store as this one does."""
        digest = self.manifest.digest
        stores = client.ask(GetStatus(), Status).stores
        memory_nbytes = next((store.memory_nbytes for store in stores if store.digest == digest), None)
        return Load(str(self.path.absolute()), digest, memory_nbytes, tuple(self._catalogue.experts))

    def _renew_slots(self) -> AttachedSlots:
        """Return the slots of whoever serves the store now; raise StoreUnavailable or StoreChanged."""
        self._views = self._views[: self._catalogue.n_sealed]
        had = self._recovery.attach()
        try:
            area = self._map_new_slots(had.fds)
            self._session.go_over(had.client, had.fds[: 1 + area.first_segment])
        except BaseException:
            had.client.close()
            raise
        finally:
            close_all(had.fds)
        self._slots = self._open_slots(had.client, area)
        return self._slots

    def _map_new_slots(self, fds: list[int]) -> SlotArea:
        """Map the slots of another daemon behind the sealed segments that are mapped already."""
        try:
            catalogue = _map_catalogue(fds[0], self.manifest.digest)
            area = catalogue.slots
            is_held_alike = (catalogue.experts, catalogue.dense) == (self._catalogue.experts, self._catalogue.dense)
            if area is None or not is_held_alike or len(fds) != 1 + len(catalogue.segments_nbytes):
                raise StoreUnavailable(f"{self.path}: another expertd holds it with another budget now; start again")
            for segment in range(area.first_segment, len(catalogue.segments_nbytes)):
                nbytes, kind = catalogue.segments_nbytes[segment], catalogue.kind(segment)
                self._views.append(map_segment(fds[1 + segment], nbytes, kind))
        except ProtocolError as error:
            raise StoreUnavailable(f"{self.path}: {error}") from None
        return area


def attach(path: Path, config: RunnerConfig) -> AttachedStore:
    """Return the store in that directory, attached; start expertd and load the store first if that is needed.

    Raises StoreInvalid, StoreChanged or StoreUnavailable.
    """
    digest = _digest_of(path)
    started_daemon = False
    for _ in range(_ATTEMPTS_MAX):
        try:
            return _attach_once(path, digest, config, started_daemon=started_daemon)
        except (DaemonSilent, OSError) as error:  # OSError: no descriptors
            raise StoreUnavailable(f"{path}: {error}") from None
        except DaemonUnavailable as error:
            reason = str(error)
        except RequestRefused as refusal:
            if refusal.code not in _MENDABLE:
                raise StoreUnavailable(f"{path}: {refusal.detail} ({refusal.code})") from None
            reason = refusal.detail
        except ProtocolError as error:
            raise StoreUnavailable(f"{path}: {error}") from None
        if not config.autostart:
            raise StoreUnavailable(f"{path}: {reason}; `expertd start {path}` serves it")
        # It says on standard error what stays in memory and how to end it.
        _run_expertd(path, "start", str(path.absolute()))
        started_daemon = True
    raise StoreUnavailable(f"{path}: {reason}, though expertd was started {_ATTEMPTS_MAX} times")


def _attach_once(path: Path, digest: str, config: RunnerConfig, *, started_daemon: bool) -> AttachedStore:
    client = ControlClient(my_runtime_dir())
    start_daemon = partial(_run_expertd, path, "start") if config.autostart else None
    try:
        return AttachedStore(path, client, digest, started_daemon=started_daemon, start_daemon=start_daemon)
    except BaseException:
        client.close()
        raise


def _run_expertd(path: Path, *arguments: str) -> None:
    """Run `expertd`, for the store in that directory; raise StoreUnavailable."""
    # With -P: nothing of the folder that the user happens to stand in is imported.
    command = [sys.executable, "-P", "-m", "expertd", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
    if result.returncode:
        raise StoreUnavailable(f"{path}: `expertd start` failed with exit code {result.returncode}, see above")


def _digest_of(path: Path) -> str:
    data = _read_bounded(path / MANIFEST_FILE, MANIFEST_NBYTES_MAX)
    try:
        return manifest_digest(data)
    except ManifestError as error:
        raise StoreInvalid(f"{path}: {error}") from None


def _map_catalogue(fd: int, digest: str) -> Catalogue:
    nbytes = min(segment_nbytes(fd), CATALOGUE_NBYTES_MAX)
    catalogue = decode_catalogue(bytes(map_segment(fd, nbytes)))
    if catalogue.manifest.digest != digest:
        raise StoreChanged("expertd served another store than the one that was asked for")
    return catalogue


def _read_bounded(path: Path, nbytes_max: int) -> bytes:
    try:
        # Looked at before it is opened: opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StoreInvalid(f"{path}: a regular file was expected; links are not followed")
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StoreInvalid(f"{path}: missing; this is no store, or an incomplete one") from None
    except OSError as error:
        raise StoreInvalid(f"{path}: cannot be opened ({error.strerror})") from None
    with os.fdopen(fd, "rb") as file:
        return file.read(nbytes_max + 1)
