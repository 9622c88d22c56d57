"""The daemon's own log file: bounded, made anew when it was moved away, and never the end of the daemon."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.log import DaemonLog


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """The log's path in a folder of its own."""
    return tmp_path / "log"


@contextmanager
def as_background(path: Path) -> Iterator[None]:
    """Have standard output and error go to that file, as those of a daemon in the background do."""
    saved = os.dup(1), os.dup(2)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        yield
    finally:
        for number, former in zip((1, 2), saved, strict=True):
            os.dup2(former, number)
            os.close(former)
        os.close(fd)


def write(log: DaemonLog, text: str) -> None:
    log.emit(logging.LogRecord("expertd", logging.INFO, "", 0, text, (), None))


def test_a_full_log_becomes_the_older_one_and_two_files_are_all_there_is(log_file: Path) -> None:
    with as_background(log_file):
        log = DaemonLog(log_file, nbytes_max=1000)

        for number in range(1000):
            write(log, f"line {number:010}")

    names = sorted(path.name for path in log_file.parent.iterdir())
    older, newer = (log_file.with_name(name).read_text() for name in ("log.1", "log"))
    assert names == ["log", "log.1"]
    assert 900 < len(older) <= 1000
    assert len(newer) <= 1000
    assert (older + newer).endswith("line 0000000998\nline 0000000999\n")
    assert log_file.stat().st_mode & 0o777 == 0o600


def test_what_others_write_to_standard_error_goes_on_in_the_new_file(log_file: Path) -> None:
    with as_background(log_file):
        log = DaemonLog(log_file, nbytes_max=1000)
        for _ in range(100):
            write(log, "x" * 20)

        os.write(2, b"a library's last words\n")

    assert log_file.read_text().endswith("a library's last words\n")


def test_without_a_bound_nothing_is_moved(log_file: Path) -> None:
    with as_background(log_file):
        log = DaemonLog(log_file, nbytes_max=0)

        for _ in range(100):
            write(log, "x" * 2000)

    assert [path.name for path in log_file.parent.iterdir()] == ["log"]


def test_standard_error_that_goes_elsewhere_is_not_bounded(log_file: Path) -> None:
    with as_background(log_file):
        log = DaemonLog(log_file.with_name("other"), nbytes_max=1000)

        for _ in range(100):
            write(log, "x" * 20)

    assert not log.is_ours
    assert [path.name for path in log_file.parent.iterdir()] == ["log"]
    assert log_file.stat().st_size == 100 * 21


def test_a_file_that_somebody_put_in_the_logs_place_is_not_moved(log_file: Path) -> None:
    with as_background(log_file):
        log = DaemonLog(log_file, nbytes_max=1000)
        log_file.rename(log_file.with_name("moved"))
        log_file.write_text("of somebody else\n")

        for _ in range(100):
            write(log, "x" * 20)

    assert log_file.with_name("moved").stat().st_size <= 1000
    everything = "".join(path.read_text() for path in log_file.parent.iterdir() if path.name != "moved")
    assert "of somebody else" in everything


def test_a_log_that_was_moved_away_goes_on_in_a_new_file(log_file: Path) -> None:
    with as_background(log_file):
        log = DaemonLog(log_file, nbytes_max=0)
        write(log, "before")
        log_file.rename(log_file.with_name("moved"))

        log.reopen()
        write(log, "after")

    assert log_file.read_text() == "after\n"
    assert log_file.with_name("moved").read_text() == "before\n"


def test_a_link_in_the_logs_place_is_not_followed(log_file: Path) -> None:
    with as_background(log_file):
        log = DaemonLog(log_file, nbytes_max=0)
        log_file.rename(log_file.with_name("moved"))
        log_file.symlink_to(log_file.with_name("victim"))

        log.reopen()
        write(log, "after")

    assert not log_file.with_name("victim").exists()
    assert log_file.with_name("moved").read_text().endswith("after\n")


def test_a_log_whose_folder_is_gone_costs_lines_and_nothing_else(log_file: Path) -> None:
    with as_background(log_file):
        log = DaemonLog(log_file, nbytes_max=1000)
        log_file.rename(log_file.parent.parent / "moved")
        log_file.parent.rmdir()

        for _ in range(100):
            write(log, "x" * 20)

    assert not log_file.exists()
