"""What a soak found: samples of the daemon over time, and the verdict. JSON for programs, a table for people."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from protocol import messages as m
from protocol.control_client import ControlClient
from protocol.errors import ProtocolError
from protocol.messages import Status
from protocol.runtime_dir import RuntimeDir


@dataclass(frozen=True, slots=True)
class Sample:
    """The daemon at one moment."""

    at_s: float
    pid: int
    private_nbytes: int
    shared_nbytes: int
    n_fds: int
    n_sessions: int


def take_sample(directory: RuntimeDir, start: float) -> Sample | None:
    """Return what the daemon holds now; None if none answers just now."""
    try:
        with ControlClient(directory, timeout_s=2.0) as client:
            status = client.ask(m.GetStatus(), Status)
            n_fds = len(list(Path(f"/proc/{status.pid}/fd").iterdir()))
    except (ProtocolError, PermissionError, FileNotFoundError):
        return None
    return Sample(
        round(time.monotonic() - start, 1),
        status.pid,
        status.private_nbytes,
        status.shared_nbytes,
        n_fds - 1,
        len(status.sessions) - 1,
    )


@dataclass(slots=True)
class Report:
    """All of it; `is_clean` is the verdict."""

    machine: dict[str, object]
    seed: int
    minutes: float
    memory: str | None
    n_texts: int = 0
    n_tokens: int = 0
    n_wrong_texts: int = 0
    n_runners: int = 0
    events: dict[str, int] = field(default_factory=dict)
    complaints: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether no token was wrong, nobody complained and nothing was left."""
        return self.n_texts > 0 and not (self.n_wrong_texts or self.complaints or self.left)

    def as_json(self) -> str:
        """Return all of it."""
        return json.dumps(asdict(self) | {"is_clean": self.is_clean}, indent=1)

    def as_table(self) -> str:
        """Return the figures that matter, and how the daemon's memory went."""
        rows: list[tuple[str, object]] = [
            ("minutes", f"{self.minutes:g}"),
            ("budget of the store", self.memory or "all of it"),
            ("texts / tokens compared", f"{self.n_texts} / {self.n_tokens}"),
            ("texts that differ from an undisturbed run's", self.n_wrong_texts),
            ("runners begun", self.n_runners),
            *self.events.items(),
            ("complaints of runners and commands", sum(self.complaints.values())),
            ("left behind", ", ".join(self.left) or "nothing"),
            ("daemon's own memory, MB: first, median, most", self._spread("private_nbytes", 1e6)),
            ("daemon's descriptors: first, median, most", self._spread("n_fds", 1)),
        ]
        lines = ["| what | how much |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        lines += [f"complaint x {n}: {text}" for text, n in self.complaints.items()]
        return "\n".join(lines)

    def _spread(self, name: str, unit: float) -> str:
        values = [getattr(sample, name) / unit for sample in self.samples]
        if not values:
            return "not seen"
        return f"{values[0]:.0f}, {sorted(values)[len(values) // 2]:.0f}, {max(values):.0f}"
