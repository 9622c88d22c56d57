import os
import signal
import threading

import pytest

from expertd.convert.errors import Terminated
from expertd.convert.interruption import interruption


def test_without_a_signal_nothing_is_raised() -> None:
    with interruption() as asked:
        asked.check()


def test_ctrl_c_is_raised_where_it_is_asked_for() -> None:
    with interruption() as asked:
        os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            asked.check()


def test_a_second_ctrl_c_does_not_wait() -> None:
    with interruption():
        os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_is_an_error_with_its_line() -> None:
    with interruption() as asked:
        os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Terminated) as ended:
            asked.check()

    assert str(ended.value) == "ended by SIGTERM before the store was complete"


def test_the_handlers_of_before_are_back_afterwards() -> None:
    before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

    with interruption():
        os.kill(os.getpid(), signal.SIGTERM)

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption() as asked:
            os.kill(os.getpid(), signal.SIGINT)

            asked.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_no_handler_is_set() -> None:
    handlers = []

    def run() -> None:
        with interruption():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert handlers == [signal.getsignal(signal.SIGTERM)]
