"""Real runners on a real daemon: whoever is killed in the middle of a text, the others' tokens stay the same."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.store import read_manifest
from protocol.runtime_dir import RuntimeDir
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.crowd import crowd
from tests.support.daemon import DaemonProcess, background_pid, running_daemon, stop_background_daemon
from tests.support.small_stores import make_small_store
from tests.support.tokenizers import byte_level, tokenizer_files
from tests.support.waiting import wait_readable, wait_until

LENGTH = ("--max-new-tokens", "400")
TIMEOUT_S = 120
N_RUNNERS = 12


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose model never ends a text early: its end of sequence is a token that it does not have."""
    files = tokenizer_files(byte_level()) | {"generation_config.json": json.dumps({"eos_token_id": 99999}).encode()}
    return make_small_store(tmp_path_factory.mktemp("text"), files=files, vocab=258).path


@pytest.fixture(scope="module")
def undisturbed(text_store: Path, short_tmp: Path) -> bytes:
    """The text that nobody disturbs."""
    directory = RuntimeDir(short_tmp / "undisturbed-text" / "run")
    with running_daemon(directory, str(text_store)), pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTD_RUNTIME_DIR", str(directory.path))
        with runner(text_store, *LENGTH) as process:
            return text_of(process)


@contextmanager
def runner(store: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "runner", "generate", "--store", str(store), "--raw", "--prompt", "Once", *options]
    # Unbuffered: what begin() leaves must still be there for text_of().
    with subprocess.Popen(
        command, bufsize=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def text_of(process: "subprocess.Popen[bytes]", begun: bytes = b"") -> bytes:
    """Return all that a runner says, after what was read of it already."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err.decode()
    return begun + out


def begin(process: "subprocess.Popen[bytes]") -> bytes:
    """Return the first byte of a runner's text: it is in the middle of it now."""
    assert process.stdout is not None
    wait_readable(process.stdout.fileno(), "the first token", within_s=TIMEOUT_S)
    return process.stdout.read(1)


def test_a_text_goes_on_without_the_daemon_and_the_next_runner_starts_a_new_one(
    runtime: RuntimeDir, text_store: Path, undisturbed: bytes
) -> None:
    with running_daemon(runtime, str(text_store)) as daemon, runner(text_store, *LENGTH) as process:
        begun = begin(process)
        daemon.kill()
        was_running = process.poll() is None
        disturbed = text_of(process, begun)

    with runner(text_store, *LENGTH) as process:
        afterwards = text_of(process)
    new_pid = background_pid(runtime)
    stop_background_daemon(runtime)

    assert was_running
    assert disturbed == undisturbed
    assert afterwards == undisturbed
    assert new_pid not in (None, daemon.pid)


def test_a_runner_killed_in_its_text_leaves_nothing_and_costs_the_others_nothing(
    daemon: DaemonProcess, text_store: Path, undisturbed: bytes
) -> None:
    digest = read_manifest(text_store).digest
    daemon.load(text_store, digest)
    with attach(text_store, RunnerConfig(autostart=False)):
        pass  # so that the daemon has served somebody
    wait_until(lambda: daemon.sessions() == 0, "the session to end")
    private_nbytes = daemon.private_nbytes()

    with runner(text_store, *LENGTH) as survivor:
        begun = begin(survivor)
        with runner(text_store, "--max-new-tokens", "100000", "--context", "200000") as victim:
            begin(victim)
            n_sessions = daemon.sessions()
            victim.send_signal(signal.SIGKILL)
            victim.wait(TIMEOUT_S)
        survived = text_of(survivor, begun)

    wait_until(lambda: daemon.sessions() == 0, "both sessions to end")
    assert n_sessions >= 1
    assert survived == undisturbed
    assert daemon.store(digest).n_sessions == 0
    assert daemon.private_nbytes() - private_nbytes < 1 << 20


def test_many_runners_at_once_start_one_daemon_and_say_the_same(
    runtime: RuntimeDir, text_store: Path, tmp_path: Path
) -> None:
    """All are there at once: they are forks of a process that has imported everything."""
    with crowd(text_store, tmp_path / "crowd", seed=1) as gathered:
        gathered.begin(N_RUNNERS)
        pid = background_pid(runtime)
        complaints = gathered.end()
        texts = gathered.texts()
    stop_background_daemon(runtime)

    assert complaints == []
    assert len(texts) >= N_RUNNERS
    assert len(set(texts)) == len({number for number, _ in texts})
    assert pid is not None
    # Every other daemon that was begun found the lock taken and ended.
    log = runtime.log.read_text()
    assert log.count("serving pid=") == 1
    assert log.count("store loaded") == 1
