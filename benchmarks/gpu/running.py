"""One step in a process of its own, with a time limit: whatever it does, the next one is run and the report is written.

A step is a command that prints one JSON object as its last line. Its process leads a session, and all of that is killed
when the time is over; a process that even that does not end, stuck in a driver, is left behind and said to be.
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import IO

_KILLED_S = 10.0
_PRINTED_NBYTES_MAX = 1 << 20
_REASON_LENGTH_MAX = 500

OK = "ok"
FAILED = "failed"
TIMED_OUT = "timed out"
CRASHED = "crashed"
SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended: its result where it is ok, else the reason; how long it took."""

    outcome: str
    took_s: float = 0.0
    result: Mapping[str, object] | None = None
    reason: str | None = None

    def as_json(self) -> dict[str, object]:
        """Return it without what is not there."""
        fields = {"outcome": self.outcome, "took_s": round(self.took_s, 2)}
        optional = {"result": self.result, "reason": self.reason}
        return fields | {name: value for name, value in optional.items() if value is not None}


def run_step(command: Sequence[str], limit_s: float, variables: Mapping[str, str]) -> Outcome:
    """Run the command to its end or for so long; return what became of it. Nothing that it does is raised."""
    began_s = monotonic()
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=told,
            env=dict(variables),
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Outcome(TIMED_OUT, monotonic() - began_s, reason=f"after {limit_s:.0f} s{_kill(process)}")
        except BaseException:
            _kill(process)
            raise
        took_s = monotonic() - began_s
        if status == 0:
            return _read(printed, took_s)
        ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        last = _last_line(told)
        if status < 0 or last is None:
            return Outcome(CRASHED, took_s, reason=f"{ended}: {last or 'nothing was said'}")
        return Outcome(FAILED, took_s, reason=last)


def _kill(process: subprocess.Popen[bytes]) -> str:
    """Kill the step's session; return what to add to the reason."""
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(_KILLED_S)
    except subprocess.TimeoutExpired:
        return ", and it could not be killed"
    return ""


def _read(printed: IO[bytes], took_s: float) -> Outcome:
    last = _last_line(printed, nbytes_max=_PRINTED_NBYTES_MAX) or ""
    try:
        result = json.loads(last)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        return Outcome(FAILED, took_s, reason=f"a JSON object is expected as the last line, {last!r:.80} came")
    return Outcome(OK, took_s, result=result)


def _last_line(file: IO[bytes], *, nbytes_max: int = _REASON_LENGTH_MAX) -> str | None:
    """Return the last line that is not empty, its end if it is too long; None if there is none."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - nbytes_max))
    lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else None
