"""How many threads compute on the CPU. Knows no model; torch's thread count is the process's, and is set here only.

Matrix products are shared among the workspace's threads; torch gets one. Its own threads spin while they wait for each
other: with another process on the cores that made prefill and decode five times slower (docs/LOG.md).
"""

import os
from pathlib import Path

_CPU_DIR = Path("/sys/devices/system/cpu")


def set_threads(threads: int | None) -> int:
    """Return how many threads compute, by default one a physical core this process may use; leave torch with one."""
    import torch

    torch.set_num_threads(1)
    return threads or n_physical_cores(os.sched_getaffinity(0), _CPU_DIR)


def n_physical_cores(cpus: set[int], cpu_dir: Path) -> int:
    """Return how many physical cores those logical CPUs are; each counts by itself where the system does not say."""
    return len({_siblings(cpu, cpu_dir) for cpu in cpus})


def _siblings(cpu: int, cpu_dir: Path) -> str:
    try:
        return (cpu_dir / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
