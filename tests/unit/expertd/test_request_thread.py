import logging
import os
import threading
from pathlib import Path

import pytest
import zmq

from expertd.server import RequestServer
from expertd.service import MemoryFigures, Service
from expertd.sessions import Session
from protocol import messages as m
from protocol.codec import encode
from protocol.fdpass import Credentials
from protocol.runtime_dir import RuntimeDir

TOKEN = b"t" * 16


def test_a_fault_of_ours_in_the_request_thread_ends_the_daemon_with_its_story(
    short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failed = threading.Event()
    directory = RuntimeDir(short_tmp)
    server = RequestServer(
        directory,
        service_with_a_session_of_this_process(),
        threading.Lock(),
        clock=lambda: 1 / 0,  # our bug
        drop_session=lambda _: None,
        on_failure=failed.set,
    )
    server.start()

    with zmq.Context() as context, context.socket(zmq.DEALER) as client, caplog.at_level(logging.ERROR):
        client.setsockopt(zmq.LINGER, 0)
        client.connect(directory.request_endpoint)
        client.send_multipart([TOKEN, encode(m.GetStats(1))])
        assert failed.wait(10)
    server.stop()

    assert "ZeroDivisionError" in caplog.text


def service_with_a_session_of_this_process() -> Service:
    service = Service(uid=os.geteuid(), pid=1, new_token=lambda _: TOKEN, memory=lambda: MemoryFigures(0, 0), now=0.0)
    session = service.open_session(Credentials(os.getpid(), os.geteuid()), 0.0)
    assert isinstance(session, Session)
    service.handle(session, m.Hello(2, 2, "0.1.0"), 0.0)
    return service
