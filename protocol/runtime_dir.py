"""The directory where expertd and its clients meet: where it is, what lies in it, and whether it is safely ours.

    control.sock   SEQPACKET: sessions, descriptors, administration
    request.sock   ZeroMQ ROUTER
    metrics.sock   figures for Prometheus, where they are wanted
    lock           held with flock by the one daemon; whoever holds it may unlink stale sockets
    log            what the daemon wrote when it was started in the background

A socket's own mode protects nothing on the way to its bind, so the directory does: 0700, ours, and no link.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import RuntimeDirError

_SOCKET_PATH_LENGTH_MAX = 107  # sun_path, with its closing zero


@dataclass(frozen=True, slots=True)
class RuntimeDir:
    """The meeting place and its files."""

    path: Path

    @property
    def control_socket(self) -> Path:
        """The SEQPACKET socket of sessions."""
        return self.path / "control.sock"

    @property
    def request_socket(self) -> Path:
        """The ZeroMQ socket of requests."""
        return self.path / "request.sock"

    @property
    def request_endpoint(self) -> str:
        """The ZeroMQ name of the request socket."""
        return f"ipc://{self.request_socket}"

    @property
    def metrics_socket(self) -> Path:
        """The socket of figures for Prometheus."""
        return self.path / "metrics.sock"

    @property
    def lock(self) -> Path:
        """The file whose flock is the right to be the daemon."""
        return self.path / "lock"

    @property
    def log(self) -> Path:
        """The log of a daemon in the background."""
        return self.path / "log"


def runtime_dir(environment: Mapping[str, str], uid: int) -> RuntimeDir:
    """Return where the daemon of that user is met; the directory may not exist yet."""
    chosen = environment.get("EXPERTD_RUNTIME_DIR")
    if chosen:
        return RuntimeDir(Path(chosen).absolute())
    base = environment.get("XDG_RUNTIME_DIR")
    if base:
        return RuntimeDir(Path(base) / "expertd")
    if Path(f"/run/user/{uid}").is_dir():
        return RuntimeDir(Path(f"/run/user/{uid}/expertd"))
    return RuntimeDir(Path(f"/tmp/expertd-{uid}"))  # noqa: S108 - 0700 and verified before use


def create_runtime_dir(directory: RuntimeDir) -> None:
    """Make the directory if it is missing, 0700; raise RuntimeDirError if what is there is not safely ours."""
    try:
        directory.path.parent.mkdir(parents=True, exist_ok=True)
        directory.path.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        raise RuntimeDirError(f"{directory.path}: a directory was expected") from None
    except OSError as error:
        raise RuntimeDirError(f"{directory.path}: cannot be made ({error.strerror})") from None
    check_runtime_dir(directory)


def check_runtime_dir(directory: RuntimeDir) -> None:
    """Raise RuntimeDirError unless the directory is a real one, ours, and closed to everybody else."""
    try:
        found = os.lstat(directory.path)
    except OSError as error:
        raise RuntimeDirError(f"{directory.path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeDirError(f"{directory.path}: a directory was expected, a link or file is there")
    if found.st_uid != os.geteuid():
        raise RuntimeDirError(f"{directory.path}: belongs to user {found.st_uid}, user {os.geteuid()} was expected")
    if found.st_mode & 0o077:
        raise RuntimeDirError(f"{directory.path}: mode {found.st_mode & 0o777:04o}, 0700 was expected")
    if len(os.fsencode(directory.request_socket)) > _SOCKET_PATH_LENGTH_MAX:
        raise RuntimeDirError(
            f"{directory.path}: too long for a socket's path; set EXPERTD_RUNTIME_DIR to a shorter one"
        )
