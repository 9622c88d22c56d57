"""Code run as another user of the machine, in a child process; only root can."""

import os
import sys
import traceback
from collections.abc import Callable

NOBODY = 65534


def run_as_nobody(attempt: Callable[[], object]) -> str:
    """Return the name of the exception that the attempt raised as user nobody, "" if it succeeded."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _in_child(writer, attempt)
    os.close(writer)
    with os.fdopen(reader) as file:
        outcome = file.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the child ended with status {status}")
    return outcome


def _in_child(writer: int, attempt: Callable[[], object]) -> None:
    """Never return into the test: write the outcome and leave."""
    status = 1
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        os.write(writer, _outcome(attempt).encode())
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise
    finally:
        os._exit(status)


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Exception as error:  # noqa: BLE001 - what it raises is what is asked for
        return type(error).__name__
    return ""
