"""Clocks that jump: what lasts is measured by the monotonic clock, so years forward and back change nothing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.store import read_manifest
from protocol import fdpass
from protocol.handles import ExpertKey
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import running_daemon
from tests.support.request_client import RequestClient
from tests.support.small_stores import make_small_store
from tests.support.tiers import load_tiered

ROOT = Path(__file__).parents[2]
N_SLOTS = 4
HELD = ExpertKey(0, 0)
# Each look at the wall clock is ten years away from the one before.
JUMPING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <sys/time.h>
#include <time.h>
static _Atomic int looks;
static time_t jumped(time_t now) { return atomic_fetch_add(&looks, 1) % 2 ? now + 315360000 : now - 315360000; }
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, at);
    if (!result && id == CLOCK_REALTIME) at->tv_sec = jumped(at->tv_sec);
    return result;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
    return result;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""
# Where the wall clock is what is wanted: what a person reads.
WALL_CLOCK = {"expertd/log_lines.py", "runner/tokenizer.py"}


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that, loaded before all others, has the wall clock jump."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("making the clock jump needs gcc")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "jumping.c").write_text(JUMPING)
    library = folder / "jumping.so"
    subprocess.run([gcc, "-shared", "-fPIC", "-O1", "-o", library, folder / "jumping.c", "-ldl"], check=True)
    return library


def texts_of(store: Path) -> bytes:
    command = [sys.executable, "-m", "tests.support.crowd", "alone", str(store)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout


def test_a_clock_that_jumps_by_decades_ends_no_session_no_lease_and_changes_no_token(
    runtime: RuntimeDir, jumping_clock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent for its time, a connection would be dropped; silent for its time, a lease would be taken back."""
    store = make_small_store(tmp_path, vocab=258, n_layers=4, n_experts=8).path
    manifest = read_manifest(store)
    with running_daemon(runtime) as daemon:
        load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
        expected = texts_of(store)
    monkeypatch.setenv("LD_PRELOAD", str(jumping_clock))
    looks = subprocess.run(
        [sys.executable, "-c", "import time; print(abs(time.time() - time.time()) > 1e8)"],
        capture_output=True,
        check=True,
    )
    with running_daemon(runtime, "--idle-timeout", "60") as daemon:
        load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
        texts = texts_of(store)
        with (
            RequestClient(runtime, manifest.digest) as holder,
            RequestClient(runtime, manifest.digest) as other,
            fdpass.connect(runtime.control_socket, 10.0) as silent,
        ):
            handle = holder.acquire(HELD).handles[0]
            for key in manifest.experts:  # through all slots but the one that is held
                other.acquire(key)
                other.release(key)
            status = daemon.status()
            is_kept = HELD in holder.table.present() and holder.acquire(HELD).handles == (handle,)
            silent.setblocking(False)  # noqa: FBT003 - the socket module's signature
            with pytest.raises(BlockingIOError):
                silent.recv(1)

    assert looks.stdout.strip() == b"True"
    assert texts == expected
    assert is_kept
    assert all(session.age_s < 60 for session in status.sessions)
    assert "no hello in time" not in daemon.log


def test_nothing_but_what_people_read_asks_for_the_wall_clock() -> None:
    wall = re.compile(
        r"time\.time\(|time\.time_ns\(|datetime\.(now|utcnow|today)\(|CLOCK_REALTIME|from time import .*\btime\b"
    )
    sources = [
        path for package in ("protocol", "expertd", "runner", "quant") for path in (ROOT / package).rglob("*.py")
    ]

    found = {str(path.relative_to(ROOT)) for path in sources if wall.search(path.read_text())}

    assert found <= WALL_CLOCK
