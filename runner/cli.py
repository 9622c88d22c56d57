"""The entry of the command `runner`: its standard streams, its interruptions and its exit status. Knows no command.

Exit status: 0, 1 for an error, 2 for a wrong command line, 130 for an interruption. Errors are one line on stderr. A
reader that closes stdout ends the command quietly. Imports next to nothing, so that an interruption during the
imports is met here.
"""

import os
import signal
import sys

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

_STDOUT, _STDERR = 1, 2


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        status = _with_standard_streams(sys.argv[1:])
    except KeyboardInterrupt:
        status = _fail("interrupted", EXIT_INTERRUPTED)
    # All is said: an interruption while Python cleans up ends the process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run the command line; return its exit status. Errors are one line on stderr."""
    try:
        from runner.commands import execute

        status, complaint = execute(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}", EXIT_ERROR)
    except MemoryError:
        return _fail("out of memory", EXIT_ERROR)
    return status if complaint is None else _fail(complaint, status)


def _with_standard_streams(arguments: list[str]) -> int:
    """Run the command line with none of the descriptors 0, 1 and 2 left free for a file that is opened later."""
    missing = [fd for fd in range(3) if not _is_open(fd)]
    for fd in missing:
        # The lowest free descriptor is taken: this one.
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003  # it takes no keyword
        if fd == 0:
            sys.stdin = open(fd)  # noqa: SIM115, PTH123  # lives as long as the process
        elif fd == _STDERR:
            sys.stderr = open(fd, "w")  # noqa: SIM115, PTH123
    if _STDOUT in missing:
        return _fail("stdout is closed", EXIT_ERROR)
    # A terminal that cannot show a character gets its number.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    return run(arguments)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _drop_output() -> None:
    """Let what Python would still flush at exit go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> int:
    # One line, whatever came: a message may quote what a file or a user wrote.
    line = "runner: " + " ".join(message.split()) + "\n"
    if sys.stderr is not None:
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except OSError:
            # There is nobody left to tell; the status tells.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return status
