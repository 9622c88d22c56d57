"""A daemon in another's place: the same memory, nothing read, and no way back needed where it cannot be."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.store import read_manifest
from protocol import fdpass
from protocol import messages as m
from protocol.codec import encode
from protocol.control_client import ControlClient
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, Status, StoreState
from protocol.runtime_dir import RuntimeDir, create_runtime_dir
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.daemon import EXPERTD, background_pid, run_expertd, running_daemon, stop_background_daemon
from tests.support.segments import segments_of
from tests.support.stores import EXPERTS_FILE, flip_byte, write_random_store
from tests.support.waiting import wait_readable, wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)


@pytest.fixture
def big(runtime: RuntimeDir) -> Iterator[Path]:
    """The path of a store of 39 MB, more than a daemon reads to start."""
    path = runtime.path.parent / "big"
    write_random_store(path, hidden=512, intermediate=1024, n_layers=4, n_experts=12)
    yield path
    stop_background_daemon(runtime)


def started(runtime: RuntimeDir, *stores: Path) -> int:
    """Start a daemon in the background with those stores; return its pid."""
    result = run_expertd("start", *stores)
    pid = background_pid(runtime)
    assert pid is not None, result.stderr
    return pid


def status(runtime: RuntimeDir) -> Status:
    with ControlClient(runtime) as client:
        return client.ask(m.GetStatus(), Status)


def read_nbytes(pid: int) -> int:
    """Return how many bytes a process has read, from wherever; skip where that is hidden."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except PermissionError:
        pytest.skip("only root sees what a process that forbids inspection has read")
    return int(lines[0].split()[1])


def test_a_restarted_daemon_serves_the_same_memory_and_reads_nothing(runtime: RuntimeDir, big: Path) -> None:
    """The experts' file is taken away: what could be read of it is not there any more."""
    manifest, data = read_manifest(big), (big / EXPERTS_FILE).read_bytes()
    old_pid = started(runtime, big)
    before = segments_of(old_pid)
    (big / EXPERTS_FILE).rename(big / "elsewhere")

    result = run_expertd("restart")

    new_pid = background_pid(runtime)
    assert result.returncode == 0, result.stderr
    assert f"pid {new_pid} in place of {old_pid}" in result.stderr
    assert new_pid not in (None, old_pid)
    with attach(big, NO_AUTOSTART) as attached:
        records = {key: bytes(attached.expert_record(key)) for key in manifest.experts}
    assert records == {key: data[r.offset : r.offset + r.nbytes] for key, r in manifest.experts.items()}
    assert [s.state for s in status(runtime).stores] == [StoreState.READY]
    if os.geteuid() == 0:
        assert new_pid is not None
        assert before == segments_of(new_pid)
        assert read_nbytes(new_pid) < manifest.experts_nbytes


def test_a_restart_takes_every_store_and_begins_unfinished_loads_anew(
    runtime: RuntimeDir, big: Path, store: Path, manifest: Manifest
) -> None:
    started(runtime, big, store)

    result = run_expertd("restart")

    stores = {held.digest: held.state for held in status(runtime).stores}
    assert result.returncode == 0, result.stderr
    assert stores == {read_manifest(big).digest: StoreState.READY, manifest.digest: StoreState.READY}


def test_a_restarted_daemon_can_be_restarted_and_unloading_frees_the_memory(runtime: RuntimeDir, big: Path) -> None:
    started(runtime, big)
    before = segments_of(background_pid(runtime) or 0)

    results = [run_expertd("restart") for _ in range(3)]
    unloaded = run_expertd("unload", big)

    assert [result.returncode for result in [*results, unloaded]] == [0] * 4
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    wait_until(lambda: not any(segments_of(pid).keys() & before.keys() for pid in pids), "the memory to be free")


def test_a_restart_without_a_daemon_says_what_to_do(runtime: RuntimeDir) -> None:
    result = run_expertd("restart")

    assert result.returncode == 1
    assert result.stderr == "expertd: no expertd runs; start it with `expertd start STORE`\n"
    assert not runtime.control_socket.exists()


@pytest.mark.slow
def test_a_restart_of_a_frozen_daemon_changes_nothing(runtime: RuntimeDir, store: Path, manifest: Manifest) -> None:
    with running_daemon(runtime, str(store)) as daemon:
        daemon.process.send_signal(signal.SIGSTOP)
        result = run_expertd("restart")
        daemon.process.send_signal(signal.SIGCONT)

        state = daemon.store(manifest.digest).state

    assert result.returncode == 1
    assert "expertd did not answer in time" in result.stderr
    assert state is StoreState.READY


def test_corrupt_experts_stay_known_as_such(runtime: RuntimeDir, big: Path) -> None:
    key = ExpertKey(2, 3)
    flip_byte(big / EXPERTS_FILE, read_manifest(big).experts[key].offset + 100)
    started(runtime, big)

    run_expertd("restart")

    (held,) = status(runtime).stores
    assert (held.n_corrupt, held.corrupt) == (1, (key,))


def test_a_daemon_of_another_protocol_is_not_taken_over_and_the_message_says_how_to_end_it(runtime: RuntimeDir) -> None:
    create_runtime_dir(runtime)
    refusal = encode(m.Refused(Code.VERSION_MISMATCH, "expertd 9.9 speaks protocol versions 9 to 9"))
    with (
        fdpass.listen(runtime.control_socket, 4) as listener,
        subprocess.Popen([*EXPERTD, "restart"], stderr=subprocess.PIPE, text=True) as restart,
    ):
        wait_readable(listener.fileno(), "the question")
        with listener.accept()[0] as sock:
            fdpass.send_packet(sock, refusal)
            _, said = restart.communicate(timeout=20)

    assert restart.returncode == 1
    assert "expertd 9.9 speaks protocol versions 9 to 9" in said
    assert f"`kill {os.getpid()}`" in said


def test_a_log_that_was_moved_away_is_made_anew(runtime: RuntimeDir, big: Path) -> None:
    pid = started(runtime)
    moved = runtime.log.with_name("log.1")
    runtime.log.rename(moved)

    os.kill(pid, signal.SIGHUP)

    wait_until(runtime.log.exists, "the log to be made anew")
    assert run_expertd("load", big).returncode == 0
    assert "store loaded" in runtime.log.read_text()
    assert "store loaded" not in moved.read_text()


def test_a_daemon_that_lost_its_terminal_drains(runtime: RuntimeDir) -> None:
    with running_daemon(runtime) as daemon:
        daemon.process.send_signal(signal.SIGHUP)
        code = daemon.process.wait(20)

    assert code == 0
    assert not runtime.control_socket.exists()
