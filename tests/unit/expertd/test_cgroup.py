"""What control groups leave of memory is read from their files, in whichever version and place they are mounted."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from expertd.cgroup import GroupMeter, memory_groups

MB = 1_000_000
V1_NO_LIMIT = 9223372036854771712


def v2_mount(at: Path, root: str = "/") -> str:
    return f"30 20 0:27 {root} {at} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


def v1_mount(at: Path, root: str = "/") -> str:
    return f"35 31 0:32 {root} {at} rw,relatime - cgroup cgroup rw,memory\n"


def proc(folder: Path, group: str, mounts: str) -> Path:
    """Return a /proc/self of a process in that group."""
    folder.mkdir(exist_ok=True)
    (folder / "cgroup").write_text(group)
    (folder / "mountinfo").write_text("20 1 8:1 / / rw - ext4 /dev/vda rw\n" + mounts)
    return folder


def v2_group(folder: Path, limit: int | str, used: int, *, high: int | str = "max", cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile {cache + 7}\nshmem 7\ninactive_file {cache}\nactive_file 0\n")


def v1_group(folder: Path, limit: int, used: int, *, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    # What stands without `total_` leaves out the groups below, which the usage counts.
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file 0\ntotal_active_file {cache}\n")


def available_nbytes(at: Path) -> int | None:
    meter = GroupMeter(at)
    try:
        return meter.available_nbytes()
    finally:
        meter.close()


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    v2_group(tmp_path / "cg/app", "max", 5 * MB)
    v1_group(tmp_path / "v1/app", V1_NO_LIMIT, 5 * MB)
    v2 = proc(tmp_path / "proc2", "0::/app\n", v2_mount(tmp_path / "cg"))
    v1 = proc(tmp_path / "proc1", "4:memory:/app\n0::/\n", v1_mount(tmp_path / "v1"))

    assert available_nbytes(v2) is None
    assert available_nbytes(v1) is None


def test_version_2_counts_what_the_page_cache_would_give_back(tmp_path: Path) -> None:
    v2_group(tmp_path / "cg/app", 100 * MB, 70 * MB, cache=20 * MB)
    at = proc(tmp_path / "proc", "0::/app\n", v2_mount(tmp_path / "cg"))

    assert available_nbytes(at) == 50 * MB


def test_version_1_counts_the_groups_below_too(tmp_path: Path) -> None:
    v1_group(tmp_path / "cg/app", 100 * MB, 70 * MB, cache=20 * MB)
    at = proc(tmp_path / "proc", "5:devices:/x\n4:memory:/app\n0::/\n", v1_mount(tmp_path / "cg"))

    assert available_nbytes(at) == 50 * MB


def test_the_least_of_all_levels_counts(tmp_path: Path) -> None:
    v2_group(tmp_path / "cg/slice/app", 100 * MB, 10 * MB)
    v2_group(tmp_path / "cg/slice", 60 * MB, 20 * MB)
    at = proc(tmp_path / "proc", "0::/slice/app\n", v2_mount(tmp_path / "cg"))

    groups = memory_groups(at)

    assert [group.folder for group in groups] == [tmp_path / "cg/slice/app", tmp_path / "cg/slice"]
    assert available_nbytes(at) == 40 * MB


def test_the_line_above_which_a_group_is_slowed_down_is_a_limit(tmp_path: Path) -> None:
    v2_group(tmp_path / "cg/app", "max", 10 * MB, high=50 * MB)
    at = proc(tmp_path / "proc", "0::/app\n", v2_mount(tmp_path / "cg"))

    assert available_nbytes(at) == 40 * MB


@pytest.mark.parametrize(
    ("group", "root"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../elsewhere", "/"), ("/a/b", "/docker/abc")]
)
def test_in_a_container_its_own_group_is_the_root_of_what_is_mounted(tmp_path: Path, group: str, root: str) -> None:
    v2_group(tmp_path / "cg", 100 * MB, 40 * MB)
    at = proc(tmp_path / "proc", f"0::{group}\n", v2_mount(tmp_path / "cg", root))

    assert available_nbytes(at) == 60 * MB


def test_a_mount_point_with_a_space_is_found(tmp_path: Path) -> None:
    v1_group(tmp_path / "c g/app", 100 * MB, 40 * MB)
    escaped = Path(str(tmp_path / "c g").replace(" ", r"\040"))
    at = proc(tmp_path / "proc", "4:memory:/app\n", v1_mount(escaped))

    assert available_nbytes(at) == 60 * MB


def test_a_group_that_holds_more_than_it_may_has_nothing_left(tmp_path: Path) -> None:
    v2_group(tmp_path / "cg/app", 10 * MB, 40 * MB)
    at = proc(tmp_path / "proc", "0::/app\n", v2_mount(tmp_path / "cg"))

    assert available_nbytes(at) == 0


def test_a_limit_that_is_changed_later_is_seen(tmp_path: Path) -> None:
    v2_group(tmp_path / "cg/app", "max", 40 * MB)
    meter = GroupMeter(proc(tmp_path / "proc", "0::/app\n", v2_mount(tmp_path / "cg")))
    before = meter.available_nbytes()

    v2_group(tmp_path / "cg/app", 100 * MB, 40 * MB)
    after = meter.available_nbytes()
    meter.close()

    assert (before, after) == (None, 60 * MB)


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert available_nbytes(tmp_path) is None
    assert available_nbytes(proc(tmp_path / "proc", "", "")) is None


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A group of this machine with a limit of 64 MiB; skips where none can be made."""
    for parent, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        folder = Path("/sys/fs/cgroup", parent, f"expertd-test-{os.getpid()}")
        with suppress(OSError):
            folder.mkdir()
            try:
                if (folder / limit).exists():  # else it is an ordinary folder, or another controller's
                    (folder / limit).write_text(str(64 << 20))
                    yield folder
                    return
            finally:
                folder.rmdir()
    pytest.skip("no control group with a memory limit can be made here")


def test_what_a_process_in_a_real_group_may_take_is_at_most_its_limit(real_group: Path) -> None:
    program = "from expertd.lifecycle import available_nbytes; print(available_nbytes())"
    enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'

    result = subprocess.run(
        ["/bin/sh", "-c", enter, str(real_group), sys.executable, "-c", program],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip

    assert 16 << 20 < int(result.stdout) <= 64 << 20
