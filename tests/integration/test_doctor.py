"""`expertd doctor` on this machine: what it says with a store, without one, and with what prevents use."""

import json
import signal
from pathlib import Path

import pytest

from protocol.manifest import Manifest
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import DaemonProcess, run_expertd


def findings(*arguments: str | Path) -> dict[str, dict[str, str]]:
    """Return what `expertd doctor --json` finds, by name."""
    result = run_expertd("doctor", "--json", *arguments)
    document = json.loads(result.stdout)
    assert result.returncode == int(not document["usable"]), result.stderr
    return {finding["name"]: finding for finding in document["findings"]}


def test_a_machine_is_told_without_a_daemon_or_a_store(runtime: RuntimeDir) -> None:
    found = findings()

    assert {"seals", "memory", "swap", "locked memory", "huge pages", "processor", "GPU", "NUMA"} <= set(found)
    assert found["seals"]["level"] == found["libzmq"]["level"] == "ok"
    assert "disk" not in found
    assert not runtime.path.exists()


def test_a_store_is_read_for_a_moment(store: Path) -> None:
    found = findings(store)

    assert "the store takes" in found["memory"]["found"]
    assert "GB/s with one reader" in found["disk"]["found"]
    assert found["file system"]["found"] != "unknown"


def test_a_store_that_is_in_memory_needs_no_more(loaded: DaemonProcess, store: Path, manifest: Manifest) -> None:
    found = findings(store)

    assert f"pid {loaded.pid}" in found["daemon"]["found"]
    assert found["store"]["found"].endswith(f"digest {manifest.digest[:12]}, in memory already")
    assert "the store takes" not in found["memory"]["found"]


def test_what_is_no_store_prevents_its_use(tmp_path: Path) -> None:
    assert findings(tmp_path / "nothing")["store"]["level"] == "problem"


def test_a_daemon_that_does_not_answer_prevents_use(daemon: DaemonProcess) -> None:
    daemon.process.send_signal(signal.SIGSTOP)  # it would end soon without its socket
    daemon.directory.control_socket.unlink()

    assert findings()["daemon"]["level"] == "problem"


def test_settings_with_a_mistake_prevent_use(runtime: RuntimeDir) -> None:
    folder = runtime.path.parent / "config" / "expertd"
    folder.mkdir(parents=True)
    (folder / "expertd.toml").write_text("log_level = 3\n")

    found = findings()["settings"]

    assert found["level"] == "problem"
    assert "log_level" in found["found"]


def test_an_open_runtime_directory_prevents_use_and_says_how(runtime: RuntimeDir) -> None:
    runtime.path.mkdir(mode=0o755)
    runtime.path.chmod(0o755)

    result = run_expertd("doctor")

    assert result.returncode == 1
    assert "0700 was expected" in result.stdout
    assert "-> remove it, or set EXPERTD_RUNTIME_DIR" in result.stdout


@pytest.mark.parametrize("arguments", [["--nonsense"], ["one", "two"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert run_expertd("doctor", *arguments).returncode == 2
