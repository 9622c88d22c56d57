"""The log of a real daemon: one JSON object a line, with who was meant, and no more lines than a peer may cause."""

import json
import os
from pathlib import Path

import pytest

from expertd.log_limits import BURST
from protocol import fdpass
from protocol.errors import ProtocolError
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import DaemonProcess, running_daemon


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "expertd.toml"
    path.write_text('log_format = "json"\n')
    return path


def events(daemon: DaemonProcess) -> list[dict[str, object]]:
    return [json.loads(line) for line in daemon.log.splitlines()]


def send_junk(daemon: DaemonProcess) -> None:
    """Be a session that ends with three messages that are none."""
    with fdpass.connect(daemon.directory.control_socket, 10.0) as sock:
        for _ in range(3):
            fdpass.send_packet(sock, b"junk")
            fdpass.receive_packet_with_fds(sock, 1 << 16)


def test_every_line_is_an_object_and_names_the_peer(runtime: RuntimeDir, config: Path) -> None:
    with running_daemon(runtime, "--config", str(config)) as daemon:
        send_junk(daemon)
        daemon.terminate()

        lines = events(daemon)

    by_event = {line["event"]: line for line in lines}
    assert {"serving", "bad_message", "ended"} <= set(by_event)
    assert all({"ts", "level", "event", "daemon", "logger"} <= set(line) for line in lines)
    bad = by_event["bad_message"]
    assert (bad["pid"], bad["uid"], bad["daemon"]) == (os.getpid(), os.geteuid(), daemon.pid)
    assert bad["session"] == 1


def test_a_peer_in_a_loop_writes_few_lines_and_is_counted(runtime: RuntimeDir, config: Path) -> None:
    with running_daemon(runtime, "--config", str(config)) as daemon:
        for _ in range(40):
            send_junk(daemon)
        counted = daemon.status().n_bad_messages

        lines = [line for line in events(daemon) if line["event"] == "bad_message"]

    assert counted == 120
    assert BURST <= len(lines) <= BURST + 20  # a line more for each second that this took


def test_no_refusal_tells_a_path(daemon: DaemonProcess) -> None:
    with daemon.client() as client, pytest.raises(ProtocolError) as caught:
        client.attach("ab" * 32)

    assert "/" not in str(caught.value)
