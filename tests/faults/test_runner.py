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
from tests.support.daemon import DaemonProcess, background_pid, running_daemon, stop_background_daemon
from tests.support.small_stores import make_small_store
from tests.support.tokenizers import byte_level, tokenizer_files
from tests.support.waiting import wait_readable, wait_until

N_TOKENS = 400
TIMEOUT_S = 120
N_RUNNERS = 12


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose model never ends a text early: its end of sequence is a token that it does not have."""
    files = tokenizer_files(byte_level()) | {"generation_config.json": json.dumps({"eos_token_id": 99999}).encode()}
    return make_small_store(tmp_path_factory.mktemp("text"), files=files, vocab=258).path


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
    runtime: RuntimeDir, text_store: Path
) -> None:
    length = ("--max-new-tokens", str(N_TOKENS))
    with running_daemon(runtime, str(text_store)) as daemon:
        with runner(text_store, *length) as process:
            undisturbed = text_of(process)
        with runner(text_store, *length) as process:
            begun = begin(process)
            daemon.kill()
            was_running = process.poll() is None
            disturbed = text_of(process, begun)

    with runner(text_store, *length) as process:
        afterwards = text_of(process)
    new_pid = background_pid(runtime)
    stop_background_daemon(runtime)

    assert was_running
    assert disturbed == undisturbed
    assert afterwards == undisturbed
    assert new_pid not in (None, daemon.pid)


def test_a_runner_killed_in_its_text_leaves_nothing_and_costs_the_others_nothing(
    daemon: DaemonProcess, text_store: Path
) -> None:
    digest = read_manifest(text_store).digest
    daemon.load(text_store, digest)
    length = ("--max-new-tokens", str(N_TOKENS))
    with runner(text_store, *length) as process:
        undisturbed = text_of(process)
    wait_until(lambda: daemon.sessions() == 0, "the session to end")
    private_nbytes = daemon.private_nbytes()

    with runner(text_store, *length) as survivor:
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


def test_many_runners_at_once_start_one_daemon_and_say_the_same(runtime: RuntimeDir, text_store: Path) -> None:
    commands = [runner(text_store, "--max-new-tokens", "8") for _ in range(N_RUNNERS)]
    processes = [command.__enter__() for command in commands]

    texts = {text_of(process) for process in processes}

    pid = background_pid(runtime)
    stop_background_daemon(runtime)
    for command in commands:
        command.__exit__(None, None, None)
    assert len(texts) == 1
    assert pid is not None
    # Every other daemon that was begun found the lock taken and ended.
    log = runtime.log.read_text()
    assert log.count("serving pid=") == 1
    assert log.count("store loaded") == 1
