"""Real runners in the middle of their text while their daemon is killed, started again and replaced: same tokens."""

import json
import os
import signal
from pathlib import Path

import pytest

from expertd.budget import least_nbytes
from expertd.store import read_manifest
from protocol import messages as m
from protocol.control_client import ControlClient
from protocol.errors import DaemonUnavailable
from protocol.handles import ExpertKey
from protocol.messages import Status, StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import (
    background_pid,
    launched_daemon,
    run_expertd,
    running_daemon,
    stop_background_daemon,
)
from tests.support.paced_runner import PacedRunner, paced_runner
from tests.support.segments import SEALED, segments_of
from tests.support.small_stores import make_small_store
from tests.support.stores import dense_damaged
from tests.support.tokenizers import byte_level, tokenizer_files
from tests.support.waiting import wait_for_exit, wait_until

LENGTH = ("--max-new-tokens", "1200")
SHORT = ("--max-new-tokens", "400")
N_KILLS = 10
TOP_K = 2
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose model never ends a text early: its end of sequence is a token that it does not have."""
    files = tokenizer_files(byte_level()) | {"generation_config.json": json.dumps({"eos_token_id": 99999}).encode()}
    return make_small_store(tmp_path_factory.mktemp("text"), files=files, vocab=258).path


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store like that, of so many experts that a small budget holds few of them."""
    files = tokenizer_files(byte_level()) | {"generation_config.json": json.dumps({"eos_token_id": 99999}).encode()}
    folder = tmp_path_factory.mktemp("wide")
    return make_small_store(folder, files=files, vocab=258, n_experts=8, n_layers=3).path


def undisturbed_text(folder: Path, store: Path, *options: str) -> bytes:
    """Return what a runner writes over a store in memory that nobody disturbs, with a daemon of its own."""
    directory = RuntimeDir(folder / "run")
    with running_daemon(directory, str(store)), pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTD_RUNTIME_DIR", str(directory.path))
        with paced_runner(store, *options) as runner:
            return runner.finish()


@pytest.fixture(scope="module")
def long_text(text_store: Path, short_tmp: Path) -> bytes:
    """What is written of LENGTH over `text_store`."""
    return undisturbed_text(short_tmp / "long-text", text_store, *LENGTH)


@pytest.fixture(scope="module")
def short_text(wide_store: Path, short_tmp: Path) -> bytes:
    """What is written of SHORT over `wide_store`."""
    return undisturbed_text(short_tmp / "short-text", wide_store, *SHORT)


def status_after_a_little(runtime: RuntimeDir, runners: list[PacedRunner]) -> Status | None:
    """Let every runner go on a little; return what the daemon says then, None if none answers."""
    for runner in runners:
        assert runner.go_on(), f"a text has ended too early: {runner.complaint()}"
    try:
        with ControlClient(runtime) as client:
            return client.ask(m.GetStatus(), Status)
    except DaemonUnavailable:
        return None


def are_attached(runtime: RuntimeDir, runners: list[PacedRunner], digest: str) -> bool:
    """Let every runner go on a little; return whether the daemon, if one answers, counts them all."""
    status = status_after_a_little(runtime, runners)
    stores = status.stores if status is not None else ()
    return [store.n_sessions for store in stores if store.digest == digest] == [len(runners)]


def has_computed(runtime: RuntimeDir, runner: PacedRunner) -> bool:
    """Let a runner go on a little; return whether it has computed a layer with what the daemon, if one answers, read.

    Where no daemon lived for as long, a layer would never come to its end, and the runner gives up at some time.
    """
    status = status_after_a_little(runtime, [runner])
    sessions = status.sessions if status is not None else ()
    # More experts than one layer has for a token: it has come to the next one.
    return any(session.pid == runner.process.pid and session.n_hits + session.n_misses > TOP_K for session in sessions)


def test_ten_daemons_die_in_one_text_and_it_is_the_same(
    runtime: RuntimeDir, text_store: Path, long_text: bytes
) -> None:
    """Every other daemon is told to load the store, and waits for who has it; the others know nothing of it."""
    digest = read_manifest(text_store).digest
    n_attached = 0
    with (
        running_daemon(runtime, str(text_store)) as daemon,
        paced_runner(text_store, *LENGTH, autostart=False) as runner,
    ):
        runner.begin()
        segments = segments_of(runner.process.pid)
        daemon.kill()
        for number in range(N_KILLS):
            stores = [] if number % 2 else [str(text_store)]
            with launched_daemon(runtime, *stores) as (next_daemon, _):
                wait_until(lambda: are_attached(runtime, [runner], digest), "the runner to be attached again", WITHIN_S)
                n_attached += 1
                next_daemon.kill()
        held = segments_of(runner.process.pid)
        disturbed = runner.finish()

    assert n_attached == N_KILLS
    assert disturbed == long_text
    assert held == segments
    assert "store loaded" not in daemon.log.split("serving", 2)[2]


def test_a_restart_under_load_costs_no_token(runtime: RuntimeDir, text_store: Path, long_text: bytes) -> None:
    digest = read_manifest(text_store).digest
    run_expertd("start", text_store)
    with paced_runner(text_store, *LENGTH) as one, paced_runner(text_store, *LENGTH) as two:
        one.begin()
        two.begin()
        before = segments_of(one.process.pid, two.process.pid)

        results = [run_expertd("restart") for _ in range(2)]
        wait_until(lambda: are_attached(runtime, [one, two], digest), "both runners to be attached again", WITHIN_S)
        after = segments_of(one.process.pid, two.process.pid, background_pid(runtime) or 0)
        texts = [one.finish(), two.finish()]
    stop_background_daemon(runtime)

    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    assert texts == [long_text, long_text]
    assert after == before


def test_over_slots_the_runner_starts_the_daemon_that_it_needs_ten_times_and_the_text_is_the_same(
    runtime: RuntimeDir, wide_store: Path, short_text: bytes
) -> None:
    """Every one takes the dense weights from it: on disk there are none any more, and in memory they are there once."""
    manifest = read_manifest(wide_store)
    budget_nbytes = least_nbytes(manifest) + manifest.experts_nbytes // 8
    pids = []
    run_expertd("start", wide_store, "--memory", str(budget_nbytes))
    with paced_runner(wide_store, *SHORT) as runner, dense_damaged(wide_store, manifest):
        runner.begin()
        sealed = segments_of(runner.process.pid, named=SEALED)
        for _ in range(N_KILLS):
            pid = background_pid(runtime)
            assert pid is not None
            pids.append(pid)
            os.kill(pid, signal.SIGKILL)
            wait_for_exit(pid)
            wait_until(lambda: has_computed(runtime, runner), "the runner to compute with slots again", WITHIN_S)
        held_at_last = segments_of(runner.process.pid, background_pid(runtime) or 0, named=SEALED)
        text = runner.finish()
        with ControlClient(runtime) as client:
            (held,) = client.ask(m.GetStatus(), Status).stores
    stop_background_daemon(runtime)

    assert text == short_text
    assert held_at_last == sealed
    assert len(set(pids)) == N_KILLS
    assert (held.memory_nbytes, held.n_slots > 0) == (budget_nbytes, True)


@pytest.mark.slow  # it waits ten seconds for somebody else to start one
def test_over_slots_without_autostart_the_runner_says_what_it_lacks(runtime: RuntimeDir, wide_store: Path) -> None:
    manifest = read_manifest(wide_store)
    with (
        running_daemon(runtime, str(wide_store), "--memory", str(least_nbytes(manifest))) as daemon,
        paced_runner(wide_store, *SHORT, autostart=False) as runner,
    ):
        runner.begin()
        daemon.kill()

        said = runner.fail()

    assert "no expertd runs, and what is not in memory cannot be read without it" in said


def test_a_restart_keeps_all_of_a_store_with_slots_but_what_lies_in_them(
    runtime: RuntimeDir, wide_store: Path, short_text: bytes
) -> None:
    """Budget, pinned experts, and the memory of these and of the dense weights."""
    manifest = read_manifest(wide_store)
    budget_nbytes = least_nbytes(manifest) + manifest.experts_nbytes // 4
    pinned = (ExpertKey(0, 1), ExpertKey(2, 5))
    run_expertd("start")
    with ControlClient(runtime) as client:
        client.ask(m.Load(str(wide_store), manifest.digest, budget_nbytes, pinned), StoreStatus)
        wait_until(lambda: the_store(runtime).state is StoreState.READY, "the store")
    before = the_store(runtime)
    with paced_runner(wide_store, *SHORT) as runner, dense_damaged(wide_store, manifest):
        runner.begin()
        sealed = segments_of(runner.process.pid, named=SEALED)
        result = run_expertd("restart")
        wait_until(lambda: are_attached(runtime, [runner], manifest.digest), "the runner to have slots again", WITHIN_S)
        after = the_store(runtime)
        sealed_after = segments_of(runner.process.pid, background_pid(runtime) or 0, named=SEALED)
        text = runner.finish()
    stop_background_daemon(runtime)

    assert result.returncode == 0, result.stderr
    assert text == short_text
    assert (before.n_pinned, before.n_slots, before.memory_nbytes) == (2, after.n_slots, budget_nbytes)
    assert (after.n_pinned, after.memory_nbytes) == (2, budget_nbytes)
    assert sealed_after == sealed


def the_store(runtime: RuntimeDir) -> StoreStatus:
    """Return the one store of the daemon in the background."""
    with ControlClient(runtime) as client:
        (store,) = client.ask(m.GetStatus(), Status).stores
    return store
