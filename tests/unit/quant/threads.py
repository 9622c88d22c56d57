"""The threads of this process as the system sees them."""

from dataclasses import dataclass
from pathlib import Path

_TASKS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class ThreadTimes:
    """How often a thread gave its core up by itself, and for how long it ran, in clock ticks."""

    n_waits: int
    ran_ticks: int


def thread_ids() -> set[int]:
    return {int(task.name) for task in _TASKS.iterdir()}


def is_asleep(thread_id: int) -> bool:
    return _fields_after_name(thread_id)[0] == "S"


def times_of(thread_id: int) -> ThreadTimes:
    status = (_TASKS / str(thread_id) / "status").read_text()
    n_waits = next(line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
    fields = _fields_after_name(thread_id)
    return ThreadTimes(int(n_waits.split()[1]), int(fields[11]) + int(fields[12]))  # utime and stime


def _fields_after_name(thread_id: int) -> list[str]:
    return (_TASKS / str(thread_id) / "stat").read_text().rpartition(")")[2].split()
