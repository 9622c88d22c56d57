"""What is said of where a store lies, and how its reading is measured."""

import itertools
import os
from pathlib import Path

import pytest

from expertd.doctor.disk_speed import FilePart, measure
from expertd.doctor.findings import Level
from expertd.doctor.place import DiskSpeed, check_disk, check_file_system, file_system_of

MOUNTS = r"""
20 1 8:1 / / rw - ext4 /dev/vda rw
21 20 0:5 / /data rw - ext4 /dev/vdb rw
22 21 0:6 / /data rw shared:3 - nfs4 server:/x rw
23 20 0:7 / /with\040space rw - tmpfs tmpfs rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/me/store", "ext4"), ("/data/store", "nfs4"), ("/database", "ext4"), ("/with space/store", "tmpfs")],
)
def test_the_deepest_and_latest_mount_holds_a_path(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind


def test_a_path_under_no_mount_is_of_an_unknown_kind() -> None:
    assert file_system_of(Path("/home"), "") is None


@pytest.mark.parametrize(
    ("kind", "level"),
    [("ext4", Level.OK), (None, Level.OK), ("nfs4", Level.NOTE), ("fuse.sshfs", Level.NOTE), ("tmpfs", Level.NOTE)],
)
def test_a_store_far_away_or_in_memory_is_noted(kind: str | None, level: Level) -> None:
    assert check_file_system(kind).level is level


def test_a_disk_is_told_with_what_it_means_for_a_load_and_a_token() -> None:
    speed, direct = check_disk(DiskSpeed(1e9, 2e9, 8, is_direct=True), 20_000_000_000, 500_000_000)

    assert speed.level is direct.level is Level.OK
    assert "1.00 GB/s with one reader, 2.00 with 8" in speed.found
    assert "loading takes 10.0 s" in speed.found
    assert "0.25 s" in speed.found


def test_a_slow_disk_and_one_without_direct_reads_are_noted() -> None:
    speed, direct = check_disk(DiskSpeed(1e8, 2e8, 8, is_direct=False), 10**9, 10**6)

    assert speed.level is direct.level is Level.NOTE


def test_files_that_cannot_be_read_are_noted() -> None:
    (finding,) = check_disk(None, 10**9, 10**6)

    assert finding.level is Level.NOTE


def test_a_trial_ends_when_all_is_read_or_its_time_is_over(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(os.urandom(20 << 20))
    ticks = itertools.count()  # a second passes at each look at the clock: the time limit of a trial is soon over

    whole = measure([FilePart(path, 4096, (16 << 20) - 4096)])
    cut_short = measure([FilePart(path, 0, 16 << 20)], clock=lambda: float(next(ticks)))

    assert whole is not None
    assert whole.one_bytes_per_s > 0
    assert whole.many_bytes_per_s > 0
    assert cut_short is None


def test_what_is_missing_or_empty_is_not_measured(tmp_path: Path) -> None:
    missing = measure([FilePart(tmp_path / "missing", 0, 4096)])
    nothing = measure([])

    assert missing is None
    assert nothing is None
