"""What the command line does with a running daemon: start it, have it load, ask it, stop it. Blocks its caller.

Starting is safe to do from many processes at once: each may spawn a daemon, the lock lets one live, the others' end
says BUSY, and everybody meets the one that lives.
"""

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Event

from expertd.budget import MemoryWish
from expertd.errors import ExpertdError, LoadFailed, StartFailed
from expertd.store import path_problem, read_manifest
from protocol import messages as m
from protocol.control_client import ControlClient
from protocol.errors import DaemonSilent, DaemonUnavailable, RequestRefused
from protocol.fault_points import FaultPoint, reached
from protocol.messages import StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir, create_runtime_dir

READY_WITHIN_S = 20.0
_TAKEN_OVER_WITHIN_S = 300.0  # every byte is proven first
_MEET_WITHIN_S = 10.0
_SPAWN_AGAIN_S = 0.5
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class StartedDaemon:
    """A session with the daemon, and whether this process started it."""

    client: ControlClient
    was_started: bool


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """A store that is in memory, and whether it was before it was asked for."""

    status: StoreStatus
    was_held: bool


def start_in_background(directory: RuntimeDir, arguments: list[str]) -> StartedDaemon:
    """Return a session with this user's daemon, started with those arguments if none ran; raise StartFailed."""
    try:
        return StartedDaemon(ControlClient(directory), was_started=False)
    except DaemonSilent:
        raise  # it holds the lock: another one cannot be started
    except DaemonUnavailable:
        was_started = _spawn(directory, arguments)
    deadline = time.monotonic() + _MEET_WITHIN_S
    spawn_again_at = time.monotonic() + _SPAWN_AGAIN_S
    while True:
        try:
            return StartedDaemon(ControlClient(directory), was_started=was_started)
        except DaemonUnavailable as error:
            if time.monotonic() > deadline:
                raise StartFailed(f"expertd did not come up: {error}; its log is {directory.log}") from None
        # The one that holds the lock may be on its way to its socket, or on its way out.
        Event().wait(_POLL_S)
        if time.monotonic() > spawn_again_at:
            was_started = _spawn(directory, arguments)
            spawn_again_at = time.monotonic() + _SPAWN_AGAIN_S


def restart_daemon(directory: RuntimeDir, arguments: list[str], old_pid: int) -> ControlClient:
    """Return a session with a new daemon that has the stores of the old one, and its place; raise StartFailed.

    Where the old daemon does not let itself be taken over, it goes on.
    """
    unit = service_unit(old_pid)
    if unit is not None:
        raise StartFailed(
            f"systemd runs this expertd (pid {old_pid}): `systemctl restart {unit}` keeps its stores, "
            "with --user if the unit is your own"
        )
    if not _spawn(directory, ["--take-over", *arguments], within_s=_TAKEN_OVER_WITHIN_S):
        raise StartFailed("another expertd was started meanwhile; see `expertd status`")
    return ControlClient(directory)


def service_unit(pid: int) -> str | None:
    """Return the unit of the service manager that a process is the main process of; None if there is none."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    names = {line.rsplit("/", 1)[-1] for line in groups}
    return next((name for name in sorted(names) if name.startswith("expertd") and name.endswith(".service")), None)


def load_store(
    client: ControlClient, path: Path, wish: MemoryWish, on_progress: Callable[[int, int], None]
) -> LoadOutcome:
    """Have the daemon load the store in that directory and wait; raise StoreInvalid, LoadFailed or RequestRefused.

    `on_progress` is called with the bytes loaded and the bytes there are.
    """
    manifest = read_manifest(path)
    nbytes = manifest.dense_nbytes + manifest.experts_nbytes
    digest = manifest.digest
    problem = path_problem(str(path.absolute()))
    if problem:
        raise LoadFailed(f"{path}: {problem}")
    status = client.ask(m.Load(str(path.absolute()), digest, wish.memory_nbytes, wish.pinned), StoreStatus)
    reached(FaultPoint.CLIENT_LOAD_ASKED)
    was_held = status.state is StoreState.READY
    while status.state is StoreState.LOADING:
        on_progress(status.loaded_nbytes, nbytes)
        Event().wait(_POLL_S)
        status = find_store(client, digest)
    if status.error is not None:
        raise LoadFailed(f"{path}: {status.error.detail} ({status.error.code})")
    if status.state is not StoreState.READY:
        raise LoadFailed(f"{path}: unloaded by somebody else meanwhile")
    on_progress(nbytes, nbytes)
    return LoadOutcome(status, was_held)


def find_store(client: ControlClient, digest: str) -> StoreStatus:
    """Return what the daemon says of a store; raise LoadFailed if it no longer knows it."""
    for status in client.ask(m.GetStatus(), m.Status).stores:
        if status.digest == digest:
            return status
    raise LoadFailed(f"store {digest[:12]} was unloaded by somebody else meanwhile")


def resolve_store(client: ControlClient, word: str) -> StoreStatus:
    """Return the held store that a path or the beginning of a digest means; raise ExpertdError."""
    stores = client.ask(m.GetStatus(), m.Status).stores
    path = os.path.realpath(word)
    found = [s for s in stores if os.path.realpath(s.path) == path or (len(word) >= 4 and s.digest.startswith(word))]
    if len(found) != 1:
        held = ", ".join(f"{s.path} ({s.digest[:12]})" for s in stores) or "none"
        raise ExpertdError(f"{word}: the path or digest of one held store was expected; held: {held}")
    return found[0]


def stop_daemon(client: ControlClient, *, within_s: float) -> bool:
    """Have the daemon end; return whether it was gone in time."""
    pid = client.welcome.pid
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        with suppress(DaemonUnavailable, RequestRefused):  # it may be on its way out already
            client.ask(m.Stop(), m.Stopping)
        return bool(select.select([pidfd], [], [], within_s)[0])
    finally:
        os.close(pidfd)


def _spawn(directory: RuntimeDir, arguments: list[str], within_s: float = READY_WITHIN_S) -> bool:
    """Start a daemon and wait for its word; return whether it is the one that serves. Raise StartFailed."""
    create_runtime_dir(directory)
    try:
        log = os.open(directory.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartFailed(f"{directory.log}: cannot be opened ({error.strerror})") from None
    reader, writer = os.pipe2(os.O_CLOEXEC)
    log_start = os.fstat(log).st_size
    # With -P: nothing of the folder that the user happens to stand in is imported.
    command = [sys.executable, "-P", "-m", "expertd", "start", "--foreground", "--ready-fd", str(writer), *arguments]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            pass_fds=(writer,),
        )
    finally:
        os.close(writer)
        os.close(log)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        try:
            word = _word_from(pipe, directory, within_s)
        except BaseException:  # the user's Ctrl-C too: what is not ready yet must not be left behind
            process.terminate()
            process.wait()
            raise
    if not word:
        process.wait()
        raise StartFailed(f"expertd ended at once: {_last_line(directory.log, log_start)}")
    if word != b"R":  # BUSY: another one holds the lock
        process.wait()
        return False
    process.returncode = 0  # it is nobody's child from here on: nothing waits for it, nothing warns
    return True


def _word_from(pipe: FileIO, directory: RuntimeDir, within_s: float) -> bytes:
    if not select.select([pipe], [], [], within_s)[0]:
        raise StartFailed(f"expertd was not ready within {within_s:.0f} s; its log is {directory.log}")
    return pipe.read(1)


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read(1 << 16).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it left no word in its log"
