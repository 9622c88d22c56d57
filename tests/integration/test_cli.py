"""The `expertd` command: what it says, on which stream, with which exit code; never a traceback."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.store import read_manifest
from protocol.control_client import ControlClient
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.runtime_dir import RuntimeDir
from runner.traces.json_lines import TraceWriter
from runner.traces.record import DECODE, TokenRouting, TraceShape
from tests.support.daemon import DaemonProcess, background_pid, run_expertd, stop_background_daemon
from tests.support.stores import EXPERTS_FILE, flip_byte, write_random_store
from tests.support.tiers import memory_for


@pytest.fixture
def background(runtime: RuntimeDir, _leaves_nothing_behind: None) -> Iterator[RuntimeDir]:
    """Whatever `expertd start` leaves running is ended afterwards."""
    yield runtime
    stop_background_daemon(runtime)


def one_line(text: str) -> str:
    """Return the only line of a text."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_a_store_from_start_to_stop(background: RuntimeDir, store: Path, manifest: Manifest) -> None:
    start = run_expertd("start", store)
    pid = background_pid(background)
    again = run_expertd("start", store)
    status = run_expertd("status")
    as_json = run_expertd("status", "--json")
    link = store.parent / "link"
    link.symlink_to(store)
    unload = run_expertd("unload", link)
    load = run_expertd("load", store)
    unload_by_digest = run_expertd("unload", manifest.digest[:8])
    stop = run_expertd("stop")
    after = run_expertd("status")

    results = (start, again, status, as_json, unload, load, unload_by_digest, stop)
    assert [result.returncode for result in results] == [0] * 8, [result.stderr for result in results]
    assert f"expertd: started, pid {pid}" in start.stderr
    assert f"{store} is in memory" in start.stderr
    assert "it stays until `expertd stop`" in start.stderr
    assert f"expertd: already running, pid {pid}" in again.stderr
    assert re.search(rf"^{store} +ready ", status.stdout, re.MULTILINE)
    document = json.loads(as_json.stdout)
    assert (document["running"], document["pid"]) == (True, pid)
    assert [(s["digest"], s["state"]) for s in document["stores"]] == [(manifest.digest, "ready")]
    assert one_line(unload.stderr) == f"expertd: unloaded {store}"
    assert "is in memory" in load.stderr
    assert one_line(stop.stderr) == f"expertd: stopped, pid {pid}"
    assert after.returncode == 1


def test_several_stores_are_loaded_by_one_start(background: RuntimeDir, store: Path, tmp_path: Path) -> None:
    other = write_random_store(tmp_path / "other", seed=1)

    result = run_expertd("start", store, tmp_path / "other")

    with ControlClient(background) as client:
        from protocol import messages as m

        digests = {held.digest for held in client.ask(m.GetStatus(), m.Status).stores}
    assert result.returncode == 0
    assert digests == {read_manifest(store).digest, other.digest}


def test_a_runner_of_an_unloaded_store_is_mentioned(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    daemon.load(store, manifest.digest)
    with daemon.client() as runner:
        fds = runner.attach(manifest.digest)
        result = run_expertd("unload", store)
        for fd in fds:
            os.close(fd)

    assert result.returncode == 0
    assert "1 runner(s) still map it" in result.stderr


@pytest.mark.parametrize("command", [["status"], ["stop"], ["load", "STORE"], ["unload", "STORE"]])
def test_without_a_daemon_one_line_says_so(store: Path, command: list[str]) -> None:
    result = run_expertd(*(str(store) if word == "STORE" else word for word in command))

    assert result.returncode == 1
    assert one_line(result.stderr) == "expertd: no expertd runs; start it with `expertd start STORE`"


def test_without_a_daemon_a_program_is_told_too() -> None:
    result = run_expertd("status", "--json")

    assert result.returncode == 1
    assert json.loads(result.stdout) == {"running": False}
    assert result.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["start", "--nonsense"], ["start", "--idle-timeout", "-1"], ["verify"], ["inspect", "--json"]],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = run_expertd(*arguments)

    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["start", "verify", "inspect"])
def test_what_is_no_store_is_one_line_and_starts_nothing(runtime: RuntimeDir, tmp_path: Path, command: str) -> None:
    result = run_expertd(command, tmp_path / "nothing")

    assert result.returncode == 1
    assert one_line(result.stderr) == f"expertd: {tmp_path / 'nothing'}: no such store"
    assert not runtime.path.exists()


def test_verify_finds_a_whole_store_whole(store: Path) -> None:
    result = run_expertd("verify", store)

    assert result.returncode == 0
    assert "11 records and files are whole" in one_line(result.stdout)


def test_verify_names_a_damaged_expert(store: Path, manifest: Manifest) -> None:
    flip_byte(store / EXPERTS_FILE, manifest.experts[ExpertKey(1, 2)].offset)

    result = run_expertd("verify", store)

    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "layers.1.experts.2: its checksum is wrong",
        f"expertd: {store}: 1 of 11 are damaged; make the store again",
    ]


def test_inspect_needs_no_daemon(store: Path, manifest: Manifest) -> None:
    text = run_expertd("inspect", store)
    as_json = run_expertd("inspect", store, "--json")

    assert (text.returncode, as_json.returncode) == (0, 0)
    assert "2 layers of 4 experts" in text.stdout
    assert json.loads(as_json.stdout)["digest"] == manifest.digest


def test_an_unknown_setting_is_said_before_anything_starts(runtime: RuntimeDir, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("loader_thread = 2\n")

    result = run_expertd("start", "--config", tmp_path / "my.toml")

    assert result.returncode == 1
    assert one_line(result.stderr).endswith("unknown key 'loader_thread'; did you mean 'loader_threads'?")
    assert not runtime.path.exists()


def test_settings_of_a_running_daemon_stay_and_that_is_said(daemon: DaemonProcess) -> None:
    result = run_expertd("start", "--idle-timeout", "1")

    assert result.returncode == 0
    assert "its settings stay as they are" in result.stderr
    assert daemon.is_alive()


@pytest.mark.parametrize("command", ["status", "start", "stop"])
@pytest.mark.parametrize("problem", ["mode", "link", "file"])
def test_a_runtime_directory_that_is_not_safe_is_refused(
    runtime: RuntimeDir, tmp_path: Path, problem: str, command: str
) -> None:
    if problem == "mode":
        runtime.path.mkdir()
        runtime.path.chmod(0o750)
    elif problem == "link":
        runtime.path.symlink_to(tmp_path)
    else:
        runtime.path.touch()

    result = run_expertd(command)

    assert result.returncode == 1
    line = one_line(result.stderr)
    assert line.startswith(f"expertd: {runtime.path}: ")
    assert "expected" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "start"])
def test_a_runtime_directory_with_too_long_a_name_is_refused(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    name = runtime.path.parent / ("x" * 120)
    name.mkdir(mode=0o700)
    monkeypatch.setenv("EXPERTD_RUNTIME_DIR", str(name))

    result = run_expertd(command)

    assert result.returncode == 1
    assert "too long for a socket's path" in one_line(result.stderr)


@pytest.mark.parametrize("name", ["lock", "log"])
def test_a_file_of_the_daemon_that_is_a_link_is_not_written_through(
    runtime: RuntimeDir, tmp_path: Path, name: str
) -> None:
    runtime.path.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (runtime.path / name).symlink_to(victim)

    result = run_expertd("start")

    assert result.returncode == 1
    assert f"{name}: cannot be opened" in one_line(result.stderr)
    assert victim.read_text() == "precious"


def test_a_store_whose_path_no_message_can_carry_is_refused(background: RuntimeDir, tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 1100:
        folder /= "x" * 200
    write_random_store(folder)

    in_background = run_expertd("start", folder)
    in_foreground = run_expertd("start", "--foreground", folder)

    assert (in_background.returncode, in_foreground.returncode) == (1, 1)
    for result in (in_background, in_foreground):
        assert "longer than 1024 bytes" in result.stderr.splitlines()[-1]
    assert background_pid(background) is not None


def test_unloading_what_is_not_held_says_what_is(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    daemon.load(store, manifest.digest)

    result = run_expertd("unload", "/other")

    assert result.returncode == 1
    assert f"held: {store} ({manifest.digest[:12]})" in one_line(result.stderr)


@pytest.mark.usefixtures("background")
def test_a_store_larger_than_its_memory_is_said_in_one_clear_line(store: Path, manifest: Manifest) -> None:
    memory = memory_for(manifest, n_slots=5)
    trace = store.parent / "trace.jsonl"
    with trace.open("w") as file:
        writer = TraceWriter(file, TraceShape(2, 4, 2))
        writer.write(TokenRouting(DECODE, ((1, 2), (0, 3))))

    started = run_expertd("start", store, "--memory", str(memory), "--pin", trace)
    too_little = run_expertd("start", store, "--memory", "lots")

    assert started.returncode == 0, started.stderr
    (line,) = [line for line in started.stderr.splitlines() if str(store) in line]
    assert "dense weights and 1 pinned experts stay there, 4 slots of 0.0 MB are for the other 7 experts" in line
    assert (too_little.returncode, "a number and one of" in too_little.stderr) == (2, True)


def test_what_is_set_for_a_store_in_the_users_file_holds_when_it_is_started(
    background: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    config = background.path.parent / "config" / "expertd" / "expertd.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'[stores."{store}"]\nmemory = "{memory_for(manifest, n_slots=6)}"\n')

    started = run_expertd("start", store)

    assert "6 slots" in started.stderr


def test_less_memory_than_the_least_is_refused_with_the_least(
    background: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    started = run_expertd("start", store, "--memory", str(manifest.dense_nbytes))

    assert started.returncode == 1
    assert "needs at least 0.00 GB" in started.stderr
    stop_background_daemon(background)
