"""The process that fetches shards ends with its converter, however that ended."""

import select
import socket
import subprocess
import sys

from tests.support.waiting import WITHIN_S

# Tells the converter something, then listens to it.
FETCHER = """
import os
from queue import Queue
from expertd.convert.fetcher import _listen
os.write(0, b"told")
_listen(Queue())
"""


def test_the_fetcher_ends_when_the_converter_was_killed_before_it_had_read_what_it_was_told() -> None:
    ours, its = socket.socketpair()
    with subprocess.Popen([sys.executable, "-c", FETCHER], stdin=its.fileno()) as process:
        its.close()
        is_told = bool(select.select([ours], [], [], WITHIN_S)[0])

        ours.close()  # with something unread in it: the other end sees a reset, not an end

        assert process.wait(WITHIN_S) == 0
    assert is_told
