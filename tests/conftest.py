"""What holds for every test: markers by folder, a place of its own, nothing left behind, repeatable examples."""

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from protocol.manifest import Manifest
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.leaks import holdings, leaks_since, stop_left_daemon
from tests.support.stores import write_random_store

_TESTS = Path(__file__).parent
_MARKER_OF_FOLDER = {"integration": "integration", "faults": "fault", "gpu": "gpu"}
_counter = itertools.count()

# Two cores may be shared by anybody: a deadline would test the machine. The same examples every time: a failure that
# cannot be repeated is no failure report.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


# What a shell starts in the background ignores Ctrl-C, and so do its children, which are to be interrupted here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too: minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0] if item.path.is_relative_to(_TESTS) else ""
        if folder in _MARKER_OF_FOLDER:
            item.add_marker(_MARKER_OF_FOLDER[folder])
    if config.getoption("--run-slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name: sun_path holds 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="expertd-test-", dir="/tmp"))
    path.chmod(0o755)  # another user is to be kept out by the daemon's own directory, not by this one
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def runtime(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeDir:
    """Where this test's daemon is met, in this process and its children; the user's own stays out of it."""
    place = short_tmp / str(next(_counter))
    place.mkdir()
    monkeypatch.setenv("EXPERTD_RUNTIME_DIR", str(place / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))
    return RuntimeDir(place / "run")


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest, runtime: RuntimeDir) -> Iterator[None]:
    """Fail a test with processes that leaves a descriptor, a segment, a child or a daemon."""
    if not any(request.node.get_closest_marker(name) for name in ("integration", "fault")):
        yield
        return
    before = holdings()
    yield
    had_daemon = stop_left_daemon(runtime)
    found = leaks_since(before)
    if had_daemon:
        found.append(f"a daemon in {runtime.path}")
    if found:
        pytest.fail("left behind: " + "; ".join(found))


@pytest.fixture
def daemon(runtime: RuntimeDir, _leaves_nothing_behind: None) -> Iterator[DaemonProcess]:
    """A daemon that holds nothing yet."""
    with running_daemon(runtime) as process:
        yield process


@pytest.fixture
def store(runtime: RuntimeDir) -> Path:
    """The path of a small store of random bytes."""
    path = runtime.path.parent / "store"
    write_random_store(path)
    return path


@pytest.fixture
def manifest(store: Path) -> Manifest:
    """The manifest of `store`."""
    from expertd.store import read_manifest

    return read_manifest(store)


@pytest.fixture
def loaded(daemon: DaemonProcess, store: Path, manifest: Manifest) -> DaemonProcess:
    """A daemon that holds `store`."""
    daemon.load(store, manifest.digest)
    return daemon


@pytest.fixture
def as_root() -> None:
    """Skip the test for an ordinary user."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
