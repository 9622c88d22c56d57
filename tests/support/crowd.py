"""Runners that write one text after another until they are told to end, to be killed and frozen at random meanwhile.

They are forked off a nursery, a process that has imported what a runner imports and done nothing with it yet: that
takes seconds and is done once, and a runner that was killed has its successor at once. Run as a module: the nursery of
a folder, which reads one order a line and answers with the pid; or a store alone, to write every prompt's text once.
"""

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from protocol.fault_points import arm
from runner.config import fault_point
from tests.support.frozen import thaw
from tests.support.waiting import wait_for_exit, wait_until

PROMPTS: tuple[tuple[int, ...], ...] = tuple(
    tuple(3 + (7 * index + 11 * number) % 90 for index in range(5 + 9 * number)) for number in range(8)
)
N_NEW = 64
WITHIN_S = 120.0
ROOT = Path(__file__).parents[2]

Text = tuple[int, ...]  # token ids


@dataclass(frozen=True, slots=True)
class Member:
    """One runner, alive or not, and where its texts and its complaints go."""

    pid: int
    lines: Path
    said: Path

    def texts(self) -> list[tuple[int, Text]]:
        """Return the texts it finished: the number of the prompt and the tokens."""
        return [(number, tuple(tokens)) for number, tokens in filter(None, self._lines())]

    def complaint(self) -> str | None:
        """Return what it said last if it ended otherwise than it should; to be asked when it has ended."""
        if None in self._lines():
            return None
        said = self.said.read_text().strip().splitlines()
        of_daemon = [line for line in said[:-1] if line.startswith("expertd: ")]
        return " | ".join([*of_daemon[-1:], *said[-1:]]) or "ended without a word"

    def is_alive(self) -> bool:
        """Whether it runs, or is frozen; an ended one is nobody's zombie."""
        return Path(f"/proc/{self.pid}").exists()

    def _lines(self) -> list[tuple[int, list[int]] | None]:
        *whole, _cut = self.lines.read_bytes().split(b"\n")
        return [json.loads(line) for line in whole]


@dataclass(slots=True)
class Crowd:
    """So many runners over one store; whoever is killed is replaced. For one thread."""

    store: Path
    folder: Path
    rng: random.Random
    nursery: subprocess.Popen[str]
    members: list[Member] = field(default_factory=list)
    former: list[Member] = field(default_factory=list)

    def begin(self, n_members: int) -> None:
        """Start so many runners and return when each has finished a text."""
        self.members = [self._new_member() for _ in range(n_members)]
        wait_until(lambda: all(member.texts() for member in self.members), "everybody's first text", WITHIN_S)

    def kill_one(self) -> None:
        """SIGKILL one at random, and start another in its place."""
        victim = self.rng.choice(self.members)
        os.kill(victim.pid, signal.SIGKILL)
        wait_for_exit(victim.pid)
        self._replace(victim)

    def freeze_one(self) -> Member:
        """SIGSTOP one at random and return it, to be thawed."""
        member = self.rng.choice(self.members)
        os.kill(member.pid, signal.SIGSTOP)
        return member

    def replace_ended(self) -> list[str]:
        """Start others in the place of those that ended by themselves; return what these said last."""
        ended = [member for member in self.members if not member.is_alive()]
        for member in ended:
            self._replace(member)
        return [member.complaint() or "ended by itself" for member in ended]

    def end(self) -> list[str]:
        """Let everybody finish the text at hand and end; return what those said who could not."""
        (self.folder / "end").touch()
        for member in self.members:
            wait_for_exit(member.pid, WITHIN_S)
        return [complaint for member in self.members if (complaint := member.complaint()) is not None]

    def kill_all(self) -> None:
        """Leave no process behind, however this went."""
        for member in self.members:
            if member.is_alive():
                thaw(member.pid)
                os.kill(member.pid, signal.SIGKILL)
                wait_for_exit(member.pid)

    def texts(self) -> list[tuple[int, Text]]:
        """Return every text that somebody finished."""
        return [text for member in (*self.former, *self.members) for text in member.texts()]

    def _replace(self, member: Member) -> None:
        self.former.append(member)
        self.members[self.members.index(member)] = self._new_member()

    def _new_member(self) -> Member:
        number = len(self.former) + len(self.members) + 1
        lines, said = self.folder / f"{number}.texts", self.folder / f"{number}.said"
        lines.touch()
        said.touch()
        order = json.dumps([str(self.store), self.rng.randrange(1 << 30), str(lines), str(said)])
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(order + "\n")
        self.nursery.stdin.flush()
        return Member(int(self.nursery.stdout.readline()), lines, said)


@contextmanager
def crowd(store: Path, folder: Path, seed: int) -> Iterator[Crowd]:
    """Give a crowd that has no members yet; none is left at the end."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.support.crowd", "nursery", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as nursery:
        gathered = Crowd(store, folder, random.Random(seed), nursery)
        try:
            yield gathered
        finally:
            gathered.kill_all()
            nursery.kill()


def undisturbed_texts(store: Path) -> dict[int, Text]:
    """Return what each prompt is continued with, computed by one process that nobody disturbs."""
    command = [sys.executable, "-m", "tests.support.crowd", "alone", str(store)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, cwd=ROOT, check=True)
    return {number: tuple(tokens) for number, tokens in map(json.loads, result.stdout.splitlines())}


def wrong_texts(texts: Sequence[tuple[int, Text]], expected: dict[int, Text]) -> list[int]:
    """Return the prompts that were not continued as they should."""
    return [number for number, tokens in texts if tokens != expected[number]]


def be_nursery(folder: Path) -> None:
    """Fork a runner for every line of standard input, until it ends."""
    import runner.client
    import runner.engine

    assert runner.engine  # imported for the children
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    for line in sys.stdin:
        store, seed, lines, said = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _be_member(Path(store), seed, folder / "end", lines, said)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def _be_member(store: Path, seed: int, end: Path, lines: str, said: str) -> None:
    """Write texts until the file `end` is there. Never return into the nursery."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        error = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        out = os.open(lines, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for fd, standard in ((null, 0), (out, 1), (error, 2)):
            os.dup2(fd, standard)
        _write_texts(store, _numbers(seed, end))
        os.write(1, b"null\n")
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        raise
    finally:
        os._exit(0)


def _numbers(seed: int, end: Path) -> Iterator[int]:
    rng = random.Random(seed)
    while not end.exists():
        yield rng.randrange(len(PROMPTS))


def _write_texts(store: Path, numbers: Iterator[int]) -> None:
    import runner

    with runner.open_engine(store, context=256, threads=1, device="cpu") as engine:
        for number in numbers:
            tokens = list(engine.generate(PROMPTS[number], max_new_tokens=N_NEW))
            os.write(1, json.dumps([number, tokens]).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1] == "nursery":
        be_nursery(Path(sys.argv[2]))
    else:
        arm(fault_point())
        _write_texts(Path(sys.argv[2]), iter(range(len(PROMPTS))))
