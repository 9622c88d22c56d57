"""A real daemon's figures: at its socket, at a port, or nowhere; and a scraper that does not read holds up nobody."""

import itertools
import resource
import select
import socket
from pathlib import Path

import pytest

from protocol.manifest import Manifest
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import DaemonProcess, run_expertd, running_daemon, stop_background_daemon
from tests.support.waiting import wait_until

REQUEST = b"GET /metrics HTTP/1.0\r\n\r\n"


def config(folder: Path, metrics: str) -> str:
    path = folder / "expertd.toml"
    path.write_text(f'metrics = "{metrics}"\n')
    return str(path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def read_all(sock: socket.socket) -> str:
    sock.sendall(REQUEST)
    return read_to_end(sock)


def read_to_end(sock: socket.socket) -> str:
    sock.settimeout(10)
    return b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode()


def connected(daemon: DaemonProcess) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(daemon.directory.metrics_socket))
    return sock


def n_threads(daemon: DaemonProcess) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/task").iterdir()))


def test_the_socket_tells_what_happened(runtime: RuntimeDir, tmp_path: Path, store: Path, manifest: Manifest) -> None:
    with running_daemon(runtime, "--config", config(tmp_path, "unix")) as daemon:
        daemon.load(store, manifest.digest)
        with connected(daemon) as sock:
            text = read_all(sock)
        mode = daemon.directory.metrics_socket.stat().st_mode & 0o777
        code = daemon.terminate()

    nbytes = manifest.dense_nbytes + manifest.experts_nbytes
    assert text.startswith("HTTP/1.0 200 OK\r\n")
    assert 'expertd_requests_total{code="ok",op="load"} 1.0' in text
    assert f'expertd_store_bytes{{state="ready"}} {float(nbytes)}' in text
    assert f"expertd_load_bytes_total {float(nbytes)}" in text
    assert "expertd_load_duration_seconds_count 1.0" in text
    assert mode & 0o077 == 0
    assert code == 0
    assert not runtime.metrics_socket.exists()


def test_a_port_of_the_loopback_serves_them_too(runtime: RuntimeDir, tmp_path: Path) -> None:
    port = free_port()
    with running_daemon(runtime, "--config", config(tmp_path, f"127.0.0.1:{port}")) as daemon:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            text = read_all(sock)

        assert daemon.is_alive()
    assert "expertd_build_info{" in text


def test_a_port_in_use_is_one_line_and_no_daemon(runtime: RuntimeDir, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_expertd("start", "--config", config(tmp_path, f"127.0.0.1:{port}"))

    assert result.returncode == 1
    assert "cannot be listened at (Address already in use)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not runtime.control_socket.exists()


def test_off_means_no_socket_and_no_thread(runtime: RuntimeDir, tmp_path: Path) -> None:
    with running_daemon(runtime) as without:
        n_without = n_threads(without)
        has_socket = runtime.metrics_socket.exists()
        without.terminate()
    with running_daemon(runtime, "--config", config(tmp_path, "unix")) as with_metrics:
        n_with = n_threads(with_metrics)
        with_metrics.terminate()

    assert not has_socket
    assert n_with == n_without + 1


@pytest.mark.parametrize("says", [b"", REQUEST])
def test_scrapers_that_do_not_read_hold_up_neither_the_daemon_nor_its_end(
    runtime: RuntimeDir, tmp_path: Path, says: bytes
) -> None:
    with running_daemon(runtime, "--config", config(tmp_path, "unix")) as daemon:
        slow = [connected(daemon) for _ in range(4)]
        for sock in slow:
            sock.sendall(says)

        n_sessions = daemon.sessions()
        code = daemon.terminate()
        for sock in slow:
            sock.close()

    assert n_sessions == 0
    assert code == 0


def test_a_socket_that_a_killed_daemon_left_is_replaced(runtime: RuntimeDir, tmp_path: Path) -> None:
    settings = config(tmp_path, "unix")
    with running_daemon(runtime, "--config", settings) as first:
        first.kill()
    was_left = runtime.metrics_socket.exists()

    with running_daemon(runtime, "--config", settings) as second, connected(second) as sock:
        text = read_all(sock)

    assert was_left
    assert "expertd_sessions" in text


def lowest_free_fd(daemon: DaemonProcess) -> int:
    """Return the number of the next descriptor that the daemon will get, when all clients before have gone."""
    n_fds = daemon.n_fds()
    wait_until(lambda: len(daemon.fds()) == n_fds, "the last connection to be dropped")
    numbers = {int(fd.name) for fd in daemon.fds()}
    return next(number for number in itertools.count() if number not in numbers)


def test_a_scrape_that_finds_no_descriptor_free_is_answered_when_there_is_one(
    runtime: RuntimeDir, tmp_path: Path
) -> None:
    with running_daemon(runtime, "--config", config(tmp_path, "unix")) as daemon:
        limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (lowest_free_fd(daemon), limits[1]))
        with connected(daemon) as sock:
            sock.sendall(REQUEST)
            is_answered_without = bool(select.select([sock], [], [], 0.3)[0])
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
            text = read_to_end(sock)

        assert daemon.sessions() == 0
    assert not is_answered_without
    assert "expertd_open_fds" in text


def test_a_daemon_in_anothers_place_serves_the_same_port(runtime: RuntimeDir, tmp_path: Path, store: Path) -> None:
    port = free_port()
    settings = config(tmp_path, f"127.0.0.1:{port}")
    try:
        results = [run_expertd("start", "--config", settings, store), run_expertd("restart", "--config", settings)]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            text = read_all(sock)
    finally:
        stop_background_daemon(runtime)

    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert 'expertd_store_bytes{state="ready"} 0.0' not in text
    assert "expertd_load_bytes_total 0.0" in text  # it was taken over, not read
