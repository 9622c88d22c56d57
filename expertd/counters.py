"""What has happened since the start, counted: requests, loads, what was refused. Pure; the service's lock guards it.

`expertd.metrics` shows it to Prometheus. No count is of a single expert: those would be thousands.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

from expertd.host_slots import SessionFigures
from protocol.messages import Message, Refused, RequestRefusal

# Seconds; what is longer falls beyond the last one.
REQUEST_BOUNDS_S = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LOAD_BOUNDS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

_ANSWERED = "ok"


class BadMessage(StrEnum):
    """Why a message counts as bad."""

    MALFORMED = "malformed"  # not in the table of messages, or out of its bounds
    UNEXPECTED = "unexpected"  # a message, but not now, or not there
    STRAY = "stray"  # a frame without the token of a session of that process


class Rejection(StrEnum):
    """Why a peer has no session, or no longer one."""

    ANOTHER_USER = "another_user"
    TOO_MANY = "too_many"
    DRAINING = "draining"
    VERSION = "version"
    NO_HELLO = "no_hello"
    BAD_MESSAGES = "bad_messages"


@dataclass(slots=True)
class Durations:
    """How often something took how long: a count for each bound, one for what is beyond, and the sum."""

    bounds_s: Sequence[float]
    counts: list[int] = field(default_factory=list)
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds_s) + 1)

    def add(self, duration_s: float) -> None:
        """Count one; a bound counts what is not longer."""
        self.counts[bisect_left(self.bounds_s, duration_s)] += 1
        self.sum_s += duration_s


@dataclass(slots=True)
class SlotUse:
    """What sessions had of slots, summed."""

    n_hits: int = 0
    n_misses: int = 0
    waited_s: float = 0.0
    prefetches: Counter[str] = field(default_factory=Counter)

    def add(self, figures: SessionFigures) -> None:
        """Count a session's figures."""
        self.n_hits += figures.n_hits
        self.n_misses += figures.n_misses
        self.waited_s += figures.waited_s
        self.prefetches["used"] += figures.n_hints_used
        self.prefetches["late"] += figures.n_hints_late
        self.prefetches["wasted"] += figures.n_hints_wasted
        self.prefetches["dropped"] += figures.n_hints_dropped


@dataclass(slots=True)
class Counters:
    """Everything that is counted and never goes down."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    durations: dict[str, Durations] = field(default_factory=dict)
    loads: Durations = field(default_factory=lambda: Durations(LOAD_BOUNDS_S))
    loaded_nbytes: int = 0
    n_load_failures: int = 0
    ended_sessions: SlotUse = field(default_factory=SlotUse)
    bad_messages: Counter[str] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)

    def request(self, question: Message, answer: Message | None, duration_s: float) -> None:
        """Count a message that was decided on; None is the answer to a hint."""
        op = operation(question)
        self.requests[op, _code(answer)] += 1
        if op not in self.durations:
            self.durations[op] = Durations(REQUEST_BOUNDS_S)
        self.durations[op].add(duration_s)

    def load(self, nbytes: int, load_s: float) -> None:
        """Count a store that was read from disk."""
        self.loaded_nbytes += nbytes
        self.loads.add(load_s)

    def copy(self) -> "Counters":
        """Return the figures of now, which change no more."""
        return deepcopy(self)


def operation(message: Message) -> str:
    """Return a message's name as metrics write it: `get_status` for GetStatus."""
    return _words(type(message).__name__)


@lru_cache  # of a table of messages that does not grow; asked with every request
def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _code(answer: Message | None) -> str:
    match answer:
        case Refused(code) | RequestRefusal(_, Refused(code)):
            return str(code)
    return _ANSWERED
