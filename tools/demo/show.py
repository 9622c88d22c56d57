"""What a newcomer sees: text from a model that expertd holds, twice, and what that costs.

Leaves the daemon as it was found: one that the show started is stopped, whatever happens; one that ran before runs
on, with the stores that it held.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tools.demo.commands import Commands, run_step, shown, uninterrupted
from tools.demo.errors import StepFailed

NEXT_PROMPT = "Why is the sky blue? Answer in one sentence."


@dataclass(frozen=True, slots=True)
class DaemonState:
    """What the demo found, and leaves."""

    is_running: bool
    holds_store: bool


def show(commands: Commands, store: Path, prompt: str) -> None:
    """Generate twice from the store, print expertd's status, and say what to try next; raise StepFailed."""
    generate = [*commands.runner, "generate", "--store", str(store), "--prompt", prompt]
    with daemon_holding(commands, store):
        run_timed(generate)
        print("\nOnce more: expertd still holds the weights, a new runner only maps them.")
        run_timed(generate)
        run_step([*commands.expertd, "status"])
    print(_next_steps(commands, store))


@contextmanager
def daemon_holding(commands: Commands, store: Path) -> Iterator[None]:
    """Have a daemon hold the store inside the block, and leave it afterwards as it was found; raise StepFailed."""
    before = daemon_state(commands, store)
    if before.is_running:
        print("\nexpertd runs already and is left running.")
    try:
        run_step([*commands.expertd, "load" if before.is_running else "start", str(store)])
        yield
    except BaseException:
        # What went wrong first is what is told: leaving has its own message, but not the last word.
        with suppress(StepFailed):
            _leave(commands, store, before)
        raise
    _leave(commands, store, before)


def daemon_state(commands: Commands, store: Path) -> DaemonState:
    """Return whether expertd runs and holds the store; raise StepFailed if it does not say."""
    argv = [*commands.expertd, "status", "--json"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if answer == {"running": False}:
        return DaemonState(is_running=False, holds_store=False)
    if done.returncode or not isinstance(answer, dict):
        sys.stderr.write(done.stderr)
        raise StepFailed(shown(argv), done.returncode or 1)
    paths = [Path(held["path"]) for held in answer["stores"]]
    return DaemonState(is_running=True, holds_store=store in paths)


def run_timed(argv: list[str]) -> None:
    """Run the command and print how long it took from start to end; raise StepFailed."""
    start = time.perf_counter()
    run_step(argv)
    print(f"({time.perf_counter() - start:.1f} s from the start of the command to its end)", flush=True)


def _leave(commands: Commands, store: Path, before: DaemonState) -> None:
    # A second Ctrl-C must not leave behind the daemon that the first one is about to stop.
    with uninterrupted():
        now = daemon_state(commands, store)
        if now.is_running and not before.is_running:
            run_step([*commands.expertd, "stop"])
        elif now.holds_store and not before.holds_store:
            run_step([*commands.expertd, "unload", str(store)])


def _next_steps(commands: Commands, store: Path) -> str:
    generate = [*commands.runner, "generate", "--store", str(store), "--prompt", NEXT_PROMPT]
    convert = [*commands.expertd, "quantize", "CHECKPOINT", "STORE", "--config", "configs/mixtral-8x7b-4bit.toml"]
    return f"""
The model of this demo is a small dense model (SmolLM2-135M-Instruct) made into eight near-copy experts. It shows how
the program works, not what a trained mixture of experts can do. What to try next:

  {shown(generate)}
      the runner starts expertd by itself, and the weights stay warm for the next one
  {shown([*commands.expertd, "inspect", str(store)])}
      what a store holds
  {shown([*commands.expertd, "stop"])}
      give the memory back
  {shown(convert)}
      your own Mixtral"""
