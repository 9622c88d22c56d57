"""Clients killed and frozen at every step of theirs: others are served meanwhile, and nothing of the dead is kept."""

import subprocess
import sys
from pathlib import Path

import pytest

from protocol.fault_points import FaultPoint
from protocol.manifest import Manifest
from protocol.messages import StoreState
from runner.client import attach
from runner.config import RunnerConfig
from tests.faults.test_slot_steps import RUNNER_STEPS
from tests.support.client_process import launched_client, wait_for_step
from tests.support.daemon import EXPERTD, DaemonProcess, with_fault
from tests.support.frozen import settled_fds, thaw, wait_until_frozen
from tests.support.lease import held_file
from tests.support.stores import EXPERTS_FILE
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)
GROWTH_NBYTES_MAX = 1 << 20
STEPS = (
    FaultPoint.CLIENT_CONNECTED,
    FaultPoint.CLIENT_HELLO_SENT,
    FaultPoint.CLIENT_WELCOMED,
    FaultPoint.CLIENT_ATTACH_SENT,
    FaultPoint.CLIENT_FDS_RECEIVED,
    FaultPoint.RUNNER_CATALOGUE_MAPPED,
    FaultPoint.RUNNER_ATTACHED,
)


def read_through(store: Path, manifest: Manifest) -> bool:
    """Whether a well-behaved runner gets what the files hold."""
    data = (store / EXPERTS_FILE).read_bytes()
    with attach(store, NO_AUTOSTART) as attached:
        return all(
            attached.expert_record(key) == data[record.offset : record.offset + record.nbytes]
            for key, record in manifest.experts.items()
        )


@pytest.mark.parametrize("point", STEPS)
def test_a_client_frozen_at_a_step_holds_nobody_up_and_killed_there_leaves_nothing(
    loaded: DaemonProcess, store: Path, manifest: Manifest, point: FaultPoint
) -> None:
    assert read_through(store, manifest)  # the first one may grow buffers that stay
    fds, private_nbytes = settled_fds(loaded), loaded.private_nbytes()

    with launched_client("attached", store, fault=f"{point}=stop") as client:
        wait_until_frozen(client.pid)
        wait_until(lambda: loaded.sessions() == 1, "its connection to be taken")
        is_served_meanwhile = read_through(store, manifest)
        client.kill()
        client.wait(timeout=20)
    wait_until(lambda: loaded.sessions() == 0, "its session to end")

    assert is_served_meanwhile
    assert settled_fds(loaded) == fds
    assert loaded.private_nbytes() - private_nbytes < GROWTH_NBYTES_MAX
    assert loaded.store(manifest.digest).n_sessions == 0
    assert read_through(store, manifest)


@pytest.mark.parametrize("point", STEPS)
def test_a_client_frozen_at_a_step_goes_on_where_it_was(
    loaded: DaemonProcess, store: Path, manifest: Manifest, point: FaultPoint
) -> None:
    with launched_client("attached", store, fault=f"{point}=stop") as client:
        wait_until_frozen(client.pid)
        thaw(client.pid)
        wait_for_step(client)
        n_sessions = loaded.store(manifest.digest).n_sessions
        client.communicate(timeout=20)

    wait_until(lambda: loaded.sessions() == 0, "its session to end")
    assert client.returncode == 0
    assert n_sessions == 1


def test_a_load_goes_on_without_the_command_that_asked_for_it(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    with held_file(store / EXPERTS_FILE) as file:
        result = subprocess.run(
            [*EXPERTD, "load", str(store)], env=with_fault(f"{FaultPoint.CLIENT_LOAD_ASKED}=kill"), check=False
        )
        file.wait_for_opener()
        state = daemon.store(manifest.digest).state
        file.release()
    wait_until(lambda: daemon.store(manifest.digest).state is StoreState.READY, "the store to be loaded")

    assert result.returncode == -9
    assert state is StoreState.LOADING
    assert daemon.sessions() == 0
    assert read_through(store, manifest)


@pytest.mark.parametrize("program", ["expertd", "runner"])
def test_an_order_that_names_no_point_is_refused_in_one_line(program: str) -> None:
    order = "daemon-lcoked=kill"
    command = [sys.executable, "-m", program, "status" if program == "expertd" else "bench"]

    result = subprocess.run(command, env=with_fault(order), capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"POINT=ACTION or POINT=ACTION@N was expected, {order!r} came" in result.stderr


def test_every_point_of_a_client_is_among_the_steps() -> None:
    elsewhere = {FaultPoint.CLIENT_LOAD_ASKED, FaultPoint.CLIENT_OFFER_SENT, *RUNNER_STEPS}

    assert {*STEPS, *elsewhere} == {point for point in FaultPoint if not point.startswith("daemon-")}
