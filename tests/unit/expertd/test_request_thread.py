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

# Enough for a server that loses answers to lose one in one run of five.
N_REQUESTS = 20_000
N_ON_THEIR_WAY = 32
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


def test_a_client_with_the_name_of_whoever_wakes_the_thread_keeps_nobody_from_waking_it(short_tmp: Path) -> None:
    directory = RuntimeDir(short_tmp)
    server = running_server(directory)
    with zmq.Context() as context, context.socket(zmq.DEALER) as impostor, context.socket(zmq.DEALER) as client:
        for socket in (impostor, client):
            socket.setsockopt(zmq.LINGER, 0)
        impostor.setsockopt(zmq.ROUTING_ID, b"waker")
        for socket in (impostor, client):
            socket.connect(directory.request_endpoint)
            socket.send_multipart([TOKEN, encode(m.GetStats(1))])
        client.recv()

        server.stop()

    assert not server.is_alive()


def test_waking_a_thread_that_has_ended_is_no_error(short_tmp: Path) -> None:
    server = running_server(RuntimeDir(short_tmp))
    server.stop()

    server.wake()

    assert not server.is_alive()


def test_a_client_with_many_requests_on_their_way_gets_every_answer(short_tmp: Path) -> None:
    directory = RuntimeDir(short_tmp)
    server = running_server(directory)
    request = [TOKEN, encode(m.GetStats(1))]
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(zmq.RCVTIMEO, 5000)
        client.connect(directory.request_endpoint)
        for _ in range(N_ON_THEIR_WAY):
            client.send_multipart(request)

        for _ in range(N_REQUESTS):
            client.recv()
            client.send_multipart(request)
        for _ in range(N_ON_THEIR_WAY):
            client.recv()

    server.stop()


def running_server(directory: RuntimeDir) -> RequestServer:
    server = RequestServer(
        directory,
        service_with_a_session_of_this_process(),
        threading.Lock(),
        clock=lambda: 0.0,
        drop_session=lambda _: None,
        on_failure=lambda: None,
    )
    server.start()
    return server


def service_with_a_session_of_this_process() -> Service:
    service = Service(uid=os.geteuid(), pid=1, new_token=lambda _: TOKEN, memory=lambda: MemoryFigures(0, 0), now=0.0)
    session = service.open_session(Credentials(os.getpid(), os.geteuid()), 0.0)
    assert isinstance(session, Session)
    service.handle(session, m.Hello(2, 2, "0.1.0"), 0.0)
    return service
