"""A client that does all a client can do, one step after the other, and says what went wrong first."""

import os
from pathlib import Path

import zmq

from protocol import messages as m
from protocol.codec import decode, encode
from protocol.control_client import ControlClient
from protocol.errors import DaemonUnavailable, ProtocolError
from protocol.messages import StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir
from protocol.schema import Channel, Sender
from tests.support.waiting import wait_until

NOTHING = "nothing went wrong"


def visit(directory: RuntimeDir, store: Path, digest: str, *, timeout_s: float = 20.0, stops: bool = False) -> str:
    """Load, attach, ask a request, unload, and stop the daemon if so told; return the first error's message."""
    try:
        with ControlClient(directory, timeout_s=timeout_s) as client:
            _load(client, store, digest)
            for fd in client.attach(digest):
                os.close(fd)
            _request(client, directory, timeout_s)
            client.ask(m.Unload(digest), m.Unloaded)
            if stops:
                client.ask(m.Stop(), m.Stopping)
    except ProtocolError as error:
        return str(error)
    return NOTHING


def _load(client: ControlClient, store: Path, digest: str) -> None:
    client.ask(m.Load(str(store), digest), StoreStatus)
    wait_until(lambda: _is_loaded(client), "the store to be loaded")


def _is_loaded(client: ControlClient) -> bool:
    (status,) = client.ask(m.GetStatus(), m.Status).stores
    return status.state is StoreState.READY


def _request(client: ControlClient, directory: RuntimeDir, timeout_s: float) -> None:
    """Ask for the session's counters; raise DaemonUnavailable."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(directory.request_endpoint)
        dealer.send_multipart([client.welcome.token, encode(m.GetStats(7))])
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(client._sock, zmq.POLLIN)
        ready = dict(poller.poll(int(timeout_s * 1000)))
        if dealer in ready:
            answer = decode(dealer.recv(), Channel.REQUEST, Sender.DAEMON)
            assert isinstance(answer, m.Stats)
            assert answer.request_id == 7
        elif ready:
            raise DaemonUnavailable("expertd closed the connection")
        else:
            raise DaemonUnavailable("expertd did not answer in time")
