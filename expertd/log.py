"""Where the daemon's lines go: standard error, and where that is its own log file, so much of it and no more.

A daemon in the background has its standard error in the runtime directory's log. When that has grown to its limit it
becomes `log.1`, in place of an older one, and a new one begins; likewise when somebody else has moved it away and says
so (SIGHUP). Tracebacks and whatever libraries write go to the same descriptor, and so to the same file.
"""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from expertd.log_limits import LineLimit
from expertd.log_lines import JsonLines, TextLines
from protocol.runtime_dir import RuntimeDir

logger = logging.getLogger(__name__)

_STDOUT, _STDERR = 1, 2


class DaemonLog(logging.Handler):
    """Writes lines to standard error. `nbytes_max` bounds its own file and the older one each; 0: nothing does.

    Any thread may log; `reopen` may be called from a signal handler too.
    """

    def __init__(self, path: Path, nbytes_max: int) -> None:
        super().__init__()
        self._path = path
        self._nbytes_max = nbytes_max
        self.is_ours = _is_same_file(_STDERR, path)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line. What cannot be written is lost: a full disk must not end the daemon."""
        try:
            line = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
            with suppress(OSError):
                self._make_room(len(line))
            with suppress(OSError):
                os.write(_STDERR, line)
        except Exception:  # noqa: BLE001 - a wrong logging call of ours is told, as every handler does, and is no more
            self.handleError(record)

    def reopen(self) -> None:
        """Go on in a file of that name made anew: the other one was moved away. It stays if none can be made."""
        self.acquire()
        try:
            self._open()
        except OSError as error:
            logger.error("log cannot be made anew error=%s", error.strerror)  # noqa: TRY400 - the cause is said
        finally:
            self.release()

    def _make_room(self, nbytes: int) -> None:
        if not self.is_ours or not 0 < self._nbytes_max < os.fstat(_STDERR).st_size + nbytes:
            return
        if _is_same_file(_STDERR, self._path):  # else somebody has moved it, or put a file of theirs there
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        self._open()

    def _open(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.dup2(fd, _STDOUT)
        os.dup2(fd, _STDERR)
        os.close(fd)


def begin_log(directory: RuntimeDir, *, level: str, is_json: bool, nbytes_max: int) -> DaemonLog:
    """Have every line of this process go to its standard error; return what reopens it."""
    log = DaemonLog(directory.log, nbytes_max)
    log.setFormatter(JsonLines() if is_json else TextLines())
    log.addFilter(LineLimit(time.monotonic))
    logging.basicConfig(level=level.upper(), handlers=[log])
    return log


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except OSError:
        return False
