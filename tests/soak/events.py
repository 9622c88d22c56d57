"""What a soak does to runners and daemon, one event after another, drawn at random. For one thread.

The daemon is the one that `expertd start` leaves in the background, and every other command is the real one too.
"""

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from protocol.runtime_dir import RuntimeDir
from tests.support.crowd import Crowd, Member
from tests.support.daemon import background_pid, run_expertd
from tests.support.frozen import thaw
from tests.support.waiting import wait_for_exit

FROZEN_S = 1.0
COMMAND_WITHIN_S = 600.0  # it may wait itself, and the machine may be busy


@dataclass(slots=True)
class Soak:
    """The crowd, the daemon it meets, and what was done to them so far."""

    directory: RuntimeDir
    store: Path
    other_store: Path
    gathered: Crowd
    rng: random.Random
    n_events: Counter[str] = field(default_factory=Counter)
    complaints: Counter[str] = field(default_factory=Counter)
    frozen: list[Member] = field(default_factory=list)
    holds_other: bool = False

    def one_event(self) -> None:
        """Do one thing at random; whoever ended by itself since the last one has complained."""
        self._thaw_some()
        self.complaints.update(self.gathered.replace_ended())
        name = self.rng.choices(list(_EVENTS), [weight for weight, _ in _EVENTS.values()])[0]
        self.n_events[name] += 1
        _EVENTS[name][1](self)

    def settle(self) -> None:
        """Let everybody go on, and have a daemon serve."""
        while self.frozen:
            thaw(self.frozen.pop().pid)
        self.command("start", self.store)

    def command(self, *arguments: str | Path) -> None:
        """Run the command line; what it cannot do is a complaint."""
        result = run_expertd(*arguments, timeout_s=COMMAND_WITHIN_S)
        if result.returncode:
            self.complaints[result.stderr.strip().splitlines()[-1]] += 1

    def kill_runner(self) -> None:
        """SIGKILL a runner; it may be a frozen one."""
        self.gathered.kill_one()
        self.frozen = [member for member in self.frozen if member in self.gathered.members]

    def freeze_runner(self) -> None:
        """SIGSTOP a runner for some events."""
        self.frozen.append(self.gathered.freeze_one())

    def kill_daemon(self) -> None:
        """SIGKILL the daemon and start another; a runner may be quicker."""
        pid = background_pid(self.directory)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            wait_for_exit(pid)
        self.holds_other = False
        self.command("start", self.store)

    def freeze_daemon(self) -> None:
        """SIGSTOP the daemon for a moment: shorter than clients wait."""
        pid = background_pid(self.directory)
        if pid is not None:
            os.kill(pid, signal.SIGSTOP)
            Event().wait(FROZEN_S)
            thaw(pid)

    def restart_daemon(self) -> None:
        """Put another daemon in its place."""
        self.command("restart")

    def load_or_unload(self) -> None:
        """Load another store, or let it go."""
        self.command("unload" if self.holds_other else "load", self.other_store)
        self.holds_other = not self.holds_other

    def _thaw_some(self) -> None:
        for member in [member for member in self.frozen if self.rng.random() < 0.5]:
            self.frozen.remove(member)
            thaw(member.pid)


_EVENTS: dict[str, tuple[int, Callable[[Soak], None]]] = {
    "runner killed": (50, Soak.kill_runner),
    "runner frozen": (15, Soak.freeze_runner),
    "store loaded or unloaded": (15, Soak.load_or_unload),
    "daemon killed": (8, Soak.kill_daemon),
    "daemon restarted": (7, Soak.restart_daemon),
    "daemon frozen": (5, Soak.freeze_daemon),
}
