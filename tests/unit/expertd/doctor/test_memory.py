"""What is said of memory, for readings of machines this one need not be."""

from pathlib import Path

import pytest

from expertd.cgroup import GroupMemory
from expertd.doctor.findings import Level
from expertd.doctor.memory import (
    MachineMemory,
    StoreNeed,
    check_available,
    check_group,
    check_huge_pages,
    check_locked,
    check_oom,
    check_overcommit,
    check_swap,
    chosen_setting,
    parse_meminfo,
)

GB = 10**9
NEED = StoreNeed(nbytes=20 * GB, least_nbytes=3 * GB)


def machine(available_gb: float = 10, *, swap_gb: float = 0, left_gb: float = 5) -> MachineMemory:
    return MachineMemory(int(available_gb * GB), int(swap_gb * GB), int((7 + left_gb) * GB), 7 * GB)


def group(limit_gb: float, used_gb: float = 0) -> GroupMemory:
    return GroupMemory(Path("/sys/fs/cgroup/app"), int(limit_gb * GB), int(used_gb * GB), 0)


@pytest.mark.parametrize(
    ("available_gb", "groups", "level"),
    [
        (21, [], Level.OK),
        (20, [], Level.NOTE),  # it would fit exactly, with nothing to spare
        (4, [], Level.NOTE),
        (3, [], Level.PROBLEM),
        (21, [group(12, used_gb=2)], Level.NOTE),
        (21, [group(50), group(2.9)], Level.PROBLEM),
    ],
)
def test_a_store_fits_fits_in_part_or_does_not(available_gb: float, groups: list[GroupMemory], level: Level) -> None:
    finding = check_available(machine(available_gb), groups, NEED)

    assert finding.level is level
    assert "the store takes 20.00 GB" in finding.found


def test_without_a_store_memory_is_only_told() -> None:
    finding = check_available(machine(0.1), [group(0.05)], None)

    assert finding.level is Level.OK
    assert finding.found == "0.05 GB available"


@pytest.mark.parametrize(
    ("groups", "level"), [([], Level.OK), ([group(90)], Level.OK), ([group(90), group(4)], Level.NOTE)]
)
def test_a_control_group_is_noted_when_it_leaves_less_than_the_machine(groups: list[GroupMemory], level: Level) -> None:
    assert check_group(machine(10), groups).level is level


def test_the_tightest_control_group_is_named_with_what_it_leaves() -> None:
    finding = check_group(machine(10), [group(90), group(4, used_gb=1)])

    assert "/sys/fs/cgroup/app leaves 3.00 GB of 4.00 GB" in finding.found


def test_swap_is_noted_with_how_to_keep_a_store_out_of_it() -> None:
    with_swap, without = check_swap(machine(swap_gb=8)), check_swap(machine())

    assert (with_swap.level, without.level) == (Level.NOTE, Level.OK)
    assert "MemorySwapMax=0" in str(with_swap.remedy)


@pytest.mark.parametrize(
    ("limit_nbytes", "swap_gb", "level"),
    [(None, 8, Level.OK), (8_000_000, 0, Level.OK), (8_000_000, 8, Level.NOTE)],
)
def test_a_limit_of_locked_memory_matters_only_beside_swap(
    limit_nbytes: int | None, swap_gb: int, level: Level
) -> None:
    assert check_locked(limit_nbytes, machine(swap_gb=swap_gb)).level is level


@pytest.mark.parametrize(
    ("mode", "left_gb", "need", "level"),
    [
        (0, 1, NEED, Level.OK),
        (1, 1, NEED, Level.OK),
        (2, 1, None, Level.NOTE),
        (2, 5, NEED, Level.NOTE),
        (2, 2, NEED, Level.PROBLEM),
        (2, -3, NEED, Level.PROBLEM),
    ],
)
def test_a_kernel_that_promises_no_more_than_it_has_may_refuse_a_store(
    mode: int, left_gb: float, need: StoreNeed | None, level: Level
) -> None:
    assert check_overcommit(mode, machine(left_gb=left_gb), need).level is level


@pytest.mark.parametrize(("score", "level"), [(-500, Level.OK), (0, Level.OK), (200, Level.NOTE)])
def test_a_process_that_is_killed_early_is_noted(score: int, level: Level) -> None:
    assert check_oom(score).level is level


def test_huge_pages_are_judged_by_the_trial_not_by_the_setting() -> None:
    given, refused = check_huge_pages("never", 2 << 20), check_huge_pages("advise", 0)

    assert (given.level, refused.level) == (Level.OK, Level.NOTE)
    assert "shmem_enabled = advise" in refused.found


def test_the_setting_in_force_is_the_one_in_brackets() -> None:
    assert chosen_setting("always within_size advise [never] deny force\n") == "never"
    assert chosen_setting("") is None


def test_meminfo_is_read_in_bytes_and_a_line_that_is_missing_is_nothing() -> None:
    text = (
        "MemTotal:  24105 kB\nMemAvailable:    2048 kB\nCommitLimit:  10 kB\nCommitted_AS: 4 kB\nHugePages_Total:   0\n"
    )

    assert parse_meminfo(text) == MachineMemory(2048 * 1024, 0, 10 * 1024, 4 * 1024)
