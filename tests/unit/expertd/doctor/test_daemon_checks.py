"""What is said of the daemon's own needs, and of the one that runs."""

import os
from pathlib import Path

import pytest

from expertd.doctor.daemon import (
    NotRunning,
    NotUsable,
    Running,
    check_descriptors,
    check_libzmq,
    check_running,
    check_runtime_dir,
    check_seals,
    check_settings,
    is_locked,
)
from expertd.doctor.findings import Finding, Level, exit_code, findings_json, findings_text, note, ok, problem

PATH = Path("/run/user/1000/expertd")


@pytest.mark.parametrize(
    ("daemon", "level"),
    [
        (NotRunning(), Level.OK),
        (Running(7, "1.2.0", ("ab" * 32,)), Level.OK),
        (Running(7, "1.1.0", ()), Level.NOTE),
        (NotUsable("it speaks protocol versions 3 to 4"), Level.PROBLEM),
    ],
)
def test_a_daemon_of_another_version_is_noted_one_that_does_not_talk_prevents_use(
    daemon: Running | NotRunning | NotUsable, level: Level
) -> None:
    assert check_running(daemon, "1.2.0").level is level


@pytest.mark.parametrize(
    ("reason", "vanishes", "level"),
    [(None, False, Level.OK), (None, True, Level.NOTE), ("mode 0755, 0700 was expected", False, Level.PROBLEM)],
)
def test_a_runtime_directory_is_safe_and_stays(reason: str | None, level: Level, *, vanishes: bool) -> None:
    assert check_runtime_dir(PATH, reason, vanishes=vanishes).level is level


@pytest.mark.parametrize(
    ("reason", "is_there", "level"),
    [(None, True, Level.OK), (None, False, Level.OK), ("unknown key 'x'", True, Level.PROBLEM)],
)
def test_settings_that_cannot_be_read_prevent_use(reason: str | None, level: Level, *, is_there: bool) -> None:
    assert check_settings(Path("/c/expertd.toml"), reason, is_there=is_there).level is level


@pytest.mark.parametrize(
    ("limit", "level"), [(None, Level.OK), (4096, Level.OK), (256, Level.NOTE), (32, Level.PROBLEM)]
)
def test_few_descriptors_are_noted_too_few_prevent_use(limit: int | None, level: Level) -> None:
    assert check_descriptors(limit).level is level


def test_seals_that_do_not_hold_prevent_use() -> None:
    assert check_seals(None).level is Level.OK
    assert check_seals("this kernel lets cutting it through").level is Level.PROBLEM


@pytest.mark.parametrize(
    ("version", "level"), [((4, 3, 5), Level.OK), ((4, 10, 0), Level.OK), ((4, 3, 4), Level.PROBLEM)]
)
def test_an_old_zeromq_prevents_use(version: tuple[int, ...], level: Level) -> None:
    assert check_libzmq(version, (4, 3, 5)).level is level


def test_a_lock_is_found_by_device_and_inode() -> None:
    device = os.makedev(0xFD, 2)
    locks = "1: POSIX  ADVISORY  WRITE 12 fd:02:77 0 EOF\n2: FLOCK  ADVISORY  WRITE 12 fd:02:78 0 EOF\n2: -> FLOCK\n"

    assert is_locked(locks, device, 78)
    assert not is_locked(locks, device, 77)
    assert not is_locked(locks, os.makedev(0xFD, 3), 78)


@pytest.mark.parametrize(
    ("findings", "code"),
    [([ok("a", "x")], 0), ([ok("a", "x"), note("b", "y", "z")], 0), ([note("b", "y", "z"), problem("c", "y", "z")], 1)],
)
def test_only_what_prevents_use_is_an_error(findings: list[Finding], code: int) -> None:
    assert exit_code(findings) == code
    assert findings_json(findings)["usable"] == (code == 0)


def test_a_remedy_stands_beneath_its_finding() -> None:
    lines = findings_text([ok("memory", "much"), problem("seals", "broken", "another kernel")]).splitlines()

    assert lines[0] == "ok       memory  much"
    assert lines[1] == "problem  seals   broken"
    assert lines[2].strip() == "-> another kernel"
    assert lines[-1] == "1 of these prevent(s) use; 0 note(s)"
