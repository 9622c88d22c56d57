"""Code run in a child process, as this user or, which only root can have, as another one of the machine."""

import os
import sys
import traceback
from collections.abc import Callable

NOBODY = 65534


def run_as_nobody(attempt: Callable[[], object]) -> str:
    """Return the name of the exception that the attempt raised as user nobody, "" if it succeeded."""
    return _run(attempt, _become_nobody)


def run_elsewhere(attempt: Callable[[], object]) -> str:
    """Return the name of the exception that the attempt raised in another process, "" if it succeeded."""
    return _run(attempt, lambda: None)


def _run(attempt: Callable[[], object], prepare: Callable[[], None]) -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _in_child(writer, attempt, prepare)
    os.close(writer)
    with os.fdopen(reader) as file:
        outcome = file.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"the child ended with status {status}")
    return outcome


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _in_child(writer: int, attempt: Callable[[], object], prepare: Callable[[], None]) -> None:
    """Never return into the test: write the outcome and leave."""
    status = 1
    try:
        prepare()
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
