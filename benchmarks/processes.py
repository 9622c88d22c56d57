"""Starting our commands in a runtime directory of their own, and reading what the kernel says of them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import CommandFailed

_CPUCLOCK_SCHED = 2
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the measured daemon is met; nobody else's daemon is touched."""

    runtime_dir: Path

    @property
    def variables(self) -> dict[str, str]:
        """The environment of every measured process."""
        return dict(os.environ) | {"EXPERTD_RUNTIME_DIR": str(self.runtime_dir)}

    def expertd(self, *arguments: str) -> str:
        """Run `expertd` and return its standard output; raise CommandFailed."""
        return _run(_command("expertd", *arguments), self.variables)

    def runner(self, *arguments: str) -> str:
        """Run `runner` and return its standard output; raise CommandFailed."""
        return _run(_command("runner", *arguments), self.variables)

    def run(self, command: list[str]) -> str:
        """Run a command that meets this daemon and return its standard output; raise CommandFailed."""
        return _run(command, self.variables)

    @contextmanager
    def daemon(
        self,
        store: Path | None = None,
        *arguments: str,
        confined: Callable[[list[str]], list[str]] = lambda command: command,
    ) -> Iterator[None]:
        """Have a daemon run, with a store in memory perhaps, and stop it at the end; `confined` changes the command."""
        try:
            _run(confined(_command("expertd", "start", *([str(store)] if store else []), *arguments)), self.variables)
            yield
        finally:
            with suppress(CommandFailed):
                self.expertd("stop")


@dataclass(frozen=True, slots=True)
class SwapState:
    """The machine's swap: what is in use, and how many pages went in or out since it was started."""

    used_nbytes: int
    n_pages_moved: int


def read_swap() -> SwapState:
    """Return the machine's swap now."""
    meminfo, vmstat = Path("/proc/meminfo"), Path("/proc/vmstat")
    used = _kilobytes(meminfo, "SwapTotal:") - _kilobytes(meminfo, "SwapFree:")
    return SwapState(used * 1024, _kilobytes(vmstat, "pswpin ") + _kilobytes(vmstat, "pswpout "))


def shmem_nbytes() -> int:
    """Return the shared memory of the whole machine."""
    return _kilobytes(Path("/proc/meminfo"), "Shmem:") * 1024


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used, all of its threads together, those that ended too."""
    # What clock_getcpuclockid(3) returns. It counts nanoseconds, /proc/PID/stat ticks of 10 ms: a process that wakes
    # now and then may use no tick for minutes.
    clock = ~pid << 3 | _CPUCLOCK_SCHED
    return time.clock_gettime_ns(clock) / 1e9


def private_dirty_nbytes(pid: int) -> int:
    """Return what one process has written and shares with nobody, the store's segments left out.

    The kernel calls a page private that only one process maps. The daemon maps no segment once it is sealed, so the
    pages of a store with one runner would count as that runner's.
    """
    nbytes, is_counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if _MAPPING.match(line):
            is_counted = "memfd:expertd" not in line
        elif is_counted and line.startswith("Private_Dirty:"):
            nbytes += int(line.split()[1]) * 1024
    return nbytes


def _command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _run(command: list[str], variables: dict[str, str]) -> str:
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if result.returncode:
        said = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandFailed(f"{' '.join(command[-4:])}: {said}")
    return result.stdout


def _kilobytes(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise CommandFailed(f"{path} does not say {name}")
