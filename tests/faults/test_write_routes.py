"""Nobody but the daemon changes a segment: not its clients, not another user, by no route; slots and table neither."""

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.segment import SegmentKind, map_segment
from tests.support.as_user import run_as_nobody, run_elsewhere
from tests.support.daemon import DaemonProcess
from tests.support.foreign_memory import process_vm_writev
from tests.support.request_client import RequestClient, file_bytes
from tests.support.tiers import load_tiered
from tests.support.write_routes import WRITE_ROUTES

N_SLOTS = 4
KINDS = ("catalogue", "sealed", "slots", "slot_table")


@dataclass(frozen=True)
class Given:
    """A segment as a client gets it: its descriptor, and where this process maps it."""

    fd: int
    address: int

    def content(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)


@pytest.fixture(params=KINDS)
def given(request: pytest.FixtureRequest, daemon: DaemonProcess, store: Path, manifest: Manifest) -> Iterator[Given]:
    """One segment of each kind that a store with slots has."""
    load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
    with RequestClient(daemon.directory, manifest.digest) as client:
        client.acquire(ExpertKey(0, 0))
        area = client.catalogue.slots
        assert area is not None
        place, kind = {
            "catalogue": (0, SegmentKind.SEALED),
            "sealed": (1, SegmentKind.SEALED),
            "slots": (1 + area.first_segment, SegmentKind.SLOTS),
            "slot_table": (1 + area.table_segment, SegmentKind.SLOT_TABLE),
        }[request.param]
        with daemon.client() as another:
            fds = another.attach(manifest.digest)
        view = map_segment(fds[place], os.fstat(fds[place]).st_size, kind)
        yield Given(fds[place], ctypes.addressof(ctypes.c_ubyte.from_buffer(view)))
        del view
        for fd in fds:
            os.close(fd)


def test_a_client_cannot_change_a_segment_by_any_route(given: Given) -> None:
    before = given.content()

    closed = [name for name, route in WRITE_ROUTES.items() if run_elsewhere(partial(route, given.fd))]

    assert closed == list(WRITE_ROUTES)
    assert given.content() == before


@pytest.mark.usefixtures("as_root")
def test_another_user_who_got_a_descriptor_cannot_change_a_segment_either(given: Given) -> None:
    before = given.content()

    closed = [name for name, route in WRITE_ROUTES.items() if run_as_nobody(partial(route, given.fd))]

    assert closed == list(WRITE_ROUTES)
    assert given.content() == before


def write_mem(pid: int, address: int) -> None:
    """Write one byte through /proc/PID/mem."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as mem:  # noqa: PTH123 - unbuffered, at an address
        mem.seek(address)
        mem.write(b"x")


@pytest.mark.parametrize("route", [process_vm_writev, write_mem])
def test_no_other_process_can_write_through_a_mapping(given: Given, route: Callable[[int, int], None]) -> None:
    before = given.content()

    outcomes = [run_elsewhere(partial(route, os.getpid(), given.address))]
    if os.geteuid() == 0:
        outcomes.append(run_as_nobody(partial(route, os.getpid(), given.address)))

    assert all(outcome in {"OSError", "PermissionError"} for outcome in outcomes)
    assert given.content() == before


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("route", [process_vm_writev, write_mem])
def test_another_user_cannot_write_where_the_daemon_can(
    daemon: DaemonProcess, store: Path, manifest: Manifest, route: Callable[[int, int], None]
) -> None:
    """The daemon maps slots writable: the one such mapping there is."""
    load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
    maps = Path(f"/proc/{daemon.pid}/maps").read_text().splitlines()
    addresses = [int(line.split("-")[0], 16) for line in maps if "memfd:expertd-slots" in line and " rw-s " in line]

    outcomes = {run_as_nobody(partial(route, daemon.pid, address)) for address in addresses}

    assert len(addresses) == 2  # slots and table
    assert outcomes == {"PermissionError"}
    with RequestClient(daemon.directory, manifest.digest) as client:
        handle = client.acquire(ExpertKey(0, 0)).handles[0]
        assert client.bytes_of(handle) == file_bytes(store, client.catalogue, ExpertKey(0, 0))


def test_nobody_maps_anything_writable_but_the_daemon_its_slots(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
    with RequestClient(daemon.directory, manifest.digest):
        mine = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:expertd" in line]

    assert mine
    assert all(" r--s " in line for line in mine)
