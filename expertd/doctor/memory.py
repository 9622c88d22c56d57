"""Memory: what there is for a store, what may be taken away again, how it is paged. Pure checks."""

from collections.abc import Sequence
from dataclasses import dataclass

from expertd.budget import RESERVE_NBYTES
from expertd.cgroup import GroupMemory
from expertd.doctor.findings import Finding, note, ok, problem

_OVERCOMMIT_NEVER = 2


@dataclass(frozen=True, slots=True)
class StoreNeed:
    """What a store takes of memory: all of it, or at least, with most experts read when they are needed."""

    nbytes: int
    least_nbytes: int


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """The lines of /proc/meminfo that matter, in bytes."""

    available_nbytes: int
    swap_nbytes: int
    commit_limit_nbytes: int
    committed_nbytes: int


def check_available(memory: MachineMemory, groups: Sequence[GroupMemory], need: StoreNeed | None) -> Finding:
    """Compare what is available, here and in the control groups, with what the store needs."""
    available = min([memory.available_nbytes, *(group.available_nbytes for group in groups)])
    found = f"{_gb(available)} available"
    if need is None:
        return ok("memory", found)
    spare = available - RESERVE_NBYTES
    if need.nbytes <= spare:
        return ok("memory", f"{found}, the store takes {_gb(need.nbytes)}")
    found += f"; the store takes {_gb(need.nbytes)}, at least {_gb(need.least_nbytes)}, beside {_gb(RESERVE_NBYTES)}"
    if need.least_nbytes <= spare:
        return note("memory", found, "experts are read when they are needed: free memory, or use fewer bits an expert")
    return problem("memory", found, "free memory, give the control group more, or use a store of fewer bits")


def check_group(memory: MachineMemory, groups: Sequence[GroupMemory]) -> Finding:
    """Say whether a control group leaves less than the machine has."""
    name = "control group"
    if not groups:
        return ok(name, "no memory limit")
    tightest = min(groups, key=lambda group: group.available_nbytes)
    found = f"{tightest.folder} leaves {_gb(tightest.available_nbytes)} of {_gb(tightest.limit_nbytes)}"
    if tightest.available_nbytes >= memory.available_nbytes:
        return ok(name, found)
    return note(name, found, f"stores are charged to it, and the machine has {_gb(memory.available_nbytes)}: raise it")


def check_swap(memory: MachineMemory) -> Finding:
    """Say whether a store could be swapped out."""
    if memory.swap_nbytes == 0:
        return ok("swap", "none: what is in memory stays there")
    found = f"{_gb(memory.swap_nbytes)}: shared memory can be swapped out, and a token then waits for the disk"
    return note("swap", found, "run expertd as a unit with MemorySwapMax=0, or `swapoff -a`")


def check_locked(limit_nbytes: int | None, memory: MachineMemory) -> Finding:
    """Say how much may be locked; None is no limit."""
    name = "locked memory"
    if limit_nbytes is None:
        return ok(name, "no limit")
    found = f"{limit_nbytes / 1e6:.1f} MB may be locked"
    if memory.swap_nbytes == 0:
        return ok(name, f"{found}; without swap nothing needs to be")
    return note(name, f"{found}: no store can be kept out of swap that way", "LimitMEMLOCK=infinity, `ulimit -l`")


def check_overcommit(mode: int, memory: MachineMemory, need: StoreNeed | None) -> Finding:
    """Say whether the kernel promises no more memory than it has; shared memory counts as promised."""
    name = "overcommit"
    if mode != _OVERCOMMIT_NEVER:
        return ok(name, f"vm.overcommit_memory = {mode}")
    left = max(0, memory.commit_limit_nbytes - memory.committed_nbytes)
    found = f"vm.overcommit_memory = 2: {_gb(left)} more may be promised"
    remedy = "raise vm.overcommit_ratio, or set vm.overcommit_memory = 0"
    if need is not None and need.least_nbytes > left:
        return problem(name, f"{found}, the store takes at least {_gb(need.least_nbytes)}", remedy)
    return note(name, found, remedy)


def check_oom(score_adjustment: int) -> Finding:
    """Say whether the kernel takes this user's daemon first when memory runs out."""
    name = "OOM killer"
    found = f"oom_score_adj = {score_adjustment}"
    if score_adjustment <= 0:
        return ok(name, found)
    return note(name, f"{found}: a daemon started here goes early", "run expertd as a unit with OOMScoreAdjust=-500")


def check_huge_pages(setting: str | None, collapsed_nbytes: int) -> Finding:
    """Say whether shared memory gets huge pages; `collapsed_nbytes` is what a trial on 2 MiB of it gave."""
    name = "huge pages"
    shown = f"shmem_enabled = {setting}" if setting else "the kernel has none"
    if collapsed_nbytes:
        return ok(name, f"{shown}; given when asked for")
    remedy = "Linux 6.1 or later gives them when asked for; before, set shmem_enabled to advise"
    return note(name, f"{shown}; not given when asked for: attaching and reading is slower", remedy)


def chosen_setting(text: str) -> str | None:
    """Return the word in brackets of a kernel setting like `always [never]`."""
    return next((word[1:-1] for word in text.split() if word.startswith("[")), None)


def parse_meminfo(text: str) -> MachineMemory:
    """Return the figures of /proc/meminfo; a line that is missing counts as 0."""
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def nbytes(name: str) -> int:
        return int(rows.get(name, "0").split()[0]) * 1024

    return MachineMemory(nbytes("MemAvailable"), nbytes("SwapTotal"), nbytes("CommitLimit"), nbytes("Committed_AS"))


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
