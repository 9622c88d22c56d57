"""What machine this is and which commit is measured."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Machine:
    """What a figure depends on, without names of hosts or users."""

    cpu: str
    n_cpus: int
    memory_gb: float
    kernel: str
    python: str
    torch: str
    kernels: str | None
    commit: str

    @property
    def summary(self) -> str:
        """One line for people."""
        kernels = "no C kernels" if self.kernels is None else f"C kernels ({self.kernels})"
        return (
            f"{self.cpu}, {self.n_cpus} cores, {self.memory_gb:.0f} GB, Linux {self.kernel}, "
            f"Python {self.python}, torch {self.torch}, {kernels}"
        )

    def as_json(self) -> dict[str, object]:
        """Return all of it."""
        return asdict(self)


def describe_machine() -> Machine:
    """Return the machine this process runs on."""
    import torch

    from quant.library import kernels_in_use

    return Machine(
        cpu=_cpu_model(),
        n_cpus=len(os.sched_getaffinity(0)),
        memory_gb=psutil.virtual_memory().total / 1e9,
        kernel=platform.release(),
        python=platform.python_version(),
        torch=torch.__version__,
        kernels=kernels_in_use(),
        commit=_commit(),
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
