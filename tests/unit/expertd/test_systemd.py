"""What a service manager's variables mean, and what is done with descriptors that make no store."""

import os
from pathlib import Path

import pytest

from expertd.systemd import ManagerEnvironment, ServiceManager, manager_environment
from protocol.fdpass import close_all
from protocol.segment import make_segment

PID = 4242
DIGEST = "0123456789abcdef" * 4


def test_without_variables_there_is_no_manager() -> None:
    said = manager_environment({}, PID)

    assert said == ManagerEnvironment()
    assert not ServiceManager(said).is_there


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "4242"}, 0.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "9" * 40}, None),
    ],
)
def test_the_watchdog_is_fed_only_by_who_is_watched(variables: dict[str, str], watchdog_s: float | None) -> None:
    assert manager_environment(variables, PID).watchdog_s == watchdog_s


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234"])
def test_an_address_that_is_no_unix_socket_is_no_manager(address: str) -> None:
    assert manager_environment({"NOTIFY_SOCKET": address}, PID).notify_socket is None


@pytest.mark.parametrize(
    "variables",
    [
        {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": "4242", "LISTEN_FDS": "many", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": "4242", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": "4242", "LISTEN_FDS": "999999999999999999", "LISTEN_FDNAMES": "a"},
    ],
)
def test_descriptors_meant_for_others_or_without_names_are_not_touched(variables: dict[str, str]) -> None:
    assert manager_environment(variables, PID).kept == ()


def test_descriptors_have_their_names_from_the_third_on() -> None:
    variables = {"LISTEN_PID": "4242", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}

    assert manager_environment(variables, PID).kept == (("a", 3), ("b", 4))


def test_a_store_is_whole_whatever_the_order_of_its_descriptors() -> None:
    label, catalogue, segment = (make_segment("expertd-test", data) for data in (b"/models/demo", b"c", b"s"))
    kept = ((_name("1"), segment), (_name("label"), label), (_name("0"), catalogue))

    (store,) = ServiceManager(ManagerEnvironment(kept=kept)).take_kept()

    assert (store.path, store.digest, store.fds) == (Path("/models/demo"), DIGEST, [catalogue, segment])
    assert not _is_open(label)
    close_all(store.fds)


def test_a_label_may_say_how_much_memory_the_store_may_take() -> None:
    label, catalogue = (make_segment("expertd-test", data) for data in (b"/models/demo\x00123456", b"c"))
    kept = ((_name("label"), label), (_name("0"), catalogue))

    (store,) = ServiceManager(ManagerEnvironment(kept=kept)).take_kept()

    assert (store.path, store.memory_nbytes) == (Path("/models/demo"), 123456)
    close_all(store.fds)


@pytest.mark.parametrize(
    "names", [("label",), ("0", "1"), ("label", "1"), ("label", "0", "2"), ("other", "0"), ("label", "label", "1")]
)
def test_what_is_no_whole_store_is_closed(names: tuple[str, ...]) -> None:
    kept = tuple((_name(name), make_segment("expertd-test", b"/models/demo")) for name in names)

    stores = ServiceManager(ManagerEnvironment(kept=kept)).take_kept()

    assert stores == []
    assert not any(_is_open(fd) for _, fd in kept)


@pytest.mark.parametrize("label", [b"relative", b"x" * 2000, b"/models/demo\0", b"/models/demo\0-5", b"\0" + b"5"])
def test_a_label_that_is_no_path_makes_no_store(label: bytes) -> None:
    kept = ((_name("label"), make_segment("expertd-test", label)), (_name("0"), make_segment("expertd-test", b"c")))

    assert ServiceManager(ManagerEnvironment(kept=kept)).take_kept() == []


def test_promised_descriptors_that_are_not_there_are_no_error() -> None:
    assert ServiceManager(ManagerEnvironment(kept=((_name("label"), 987654),))).take_kept() == []


def _name(index: str) -> str:
    return f"expertd-{DIGEST}-{index}"


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
