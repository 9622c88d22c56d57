"""How many threads compute on the CPU. Knows no model; torch's thread count is the process's, and is set here only.

All that is large is computed by the C library with the workspace's threads; torch gets one. It computes what is small,
and its own threads would spin while they wait for each other: with another process on the cores that made prefill and
decode five times slower (docs/LOG.md).

By default a thread a physical core: of those that the process may run on, and no more than the CPU time that its cgroup
and all above it are given. Two threads of one core share what the kernels need, so the second one adds nothing; threads
beyond the quota would have all of them stopped for the rest of each period.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CPU_DIR = Path("/sys/devices/system/cpu")
_CGROUP_DIR = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def set_threads(threads: int | None) -> int:
    """Return how many threads compute, by default as many as there are cores to use; leave torch with one."""
    import torch

    torch.set_num_threads(1)
    return threads or n_usable_cores(os.sched_getaffinity(0), _CPU_DIR, _OWN_CGROUPS, _CGROUP_DIR)


def n_usable_cores(cpus: set[int], cpu_dir: Path, own_cgroups: Path, cgroup_dir: Path) -> int:
    """Return how many physical cores those logical CPUs are, or what the cgroup's quota leaves of them."""
    n_cores = n_physical_cores(cpus, cpu_dir)
    n_allowed = n_cores_of_quota(own_cgroups, cgroup_dir)
    return n_cores if n_allowed is None else min(n_cores, n_allowed)


def n_physical_cores(cpus: set[int], cpu_dir: Path) -> int:
    """Return how many physical cores those logical CPUs are; each counts by itself where the system does not say."""
    return len({_siblings(cpu, cpu_dir) for cpu in cpus})


def n_cores_of_quota(own_cgroups: Path, cgroup_dir: Path) -> int | None:
    """Return how many cores' time the process may use, rounded up, by the tightest quota on it; None if there is none.

    `own_cgroups` is what /proc/self/cgroup says, `cgroup_dir` where cgroups are mounted, version 1 or 2.
    """
    quotas = [quota for quota in _quotas(own_cgroups, cgroup_dir) if quota is not None]
    return min(quotas, default=None)


def _siblings(cpu: int, cpu_dir: Path) -> str:
    try:
        return (cpu_dir / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas(own_cgroups: Path, cgroup_dir: Path) -> Iterator[int | None]:
    """Yield the quota of the process's cgroup and of each above it, in each hierarchy that counts CPU time."""
    for line in _read(own_cgroups).splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if controllers == "":
            for folder in _upwards(cgroup_dir, path):
                yield _cores(*_read(folder / "cpu.max").split()[:2])
        elif "cpu" in controllers.split(","):
            for mount in (cgroup_dir / controllers, cgroup_dir / "cpu"):
                for folder in _upwards(mount, path):
                    yield _cores(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """Yield the folders of a cgroup and of all above it; of one outside of what is mounted here, only the topmost."""
    relative = PurePosixPath(path.lstrip("/"))
    if ".." in relative.parts:
        relative = PurePosixPath()
    yield mount / relative
    yield from (mount / parent for parent in relative.parents)


def _cores(quota_us: str = "", period_us: str = "") -> int | None:
    """Return so many cores' time as the quota is of the period, rounded up; None for no limit, "max" or -1."""
    try:
        quota, period = int(quota_us), int(period_us)
    except ValueError:
        return None
    return max(1, -(-quota // period)) if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
