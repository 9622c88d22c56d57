"""The product's commands as the demo runs them: printed first, so that a newcomer learns them.

Owns the child processes. Each call blocks until its command has ended; a signal to the demo ends the command too.
"""

import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tools.demo.errors import StepFailed, Terminated

# How long a command may take to end by itself after Ctrl-C.
_PATIENCE_S = 10.0

_TERMINATING = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Commands:
    """How each program is called: the beginning of its argument list."""

    expertd: tuple[str, ...]
    runner: tuple[str, ...]
    demo_checkpoint: tuple[str, ...]


def installed_commands() -> Commands:
    """Return the commands that belong to this interpreter."""
    return Commands(
        expertd=_program("expertd"),
        runner=_program("runner"),
        demo_checkpoint=(sys.executable, "-m", "tools.demo_checkpoint"),
    )


def run_step(argv: Sequence[str]) -> None:
    """Print the command, run it with its output on our terminal, and return when it is done; raise StepFailed."""
    print(f"\n$ {shown(argv)}", flush=True)
    exit_code = _run(argv)
    if exit_code:
        raise StepFailed(shown(argv), exit_code)


def shown(argv: Sequence[str]) -> str:
    """Return the command as one would type it, its program relative to the working folder."""
    program = Path(argv[0])
    here = Path.cwd()
    typed = str(program.relative_to(here)) if program.is_relative_to(here) else str(program)
    return shlex.join([typed, *argv[1:]])


@contextmanager
def termination_raised() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise Terminated in the main thread, so that what was started gets stopped."""

    def end(signum: int, _frame: FrameType | None) -> None:
        raise Terminated(signum)

    with _handling(_heeded(), end):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore the signals that end a program, here and in commands started meanwhile."""
    with _handling((signal.SIGINT, *_TERMINATING), signal.SIG_IGN):
        yield


@contextmanager
def _handling(signums: Sequence[signal.Signals], handler: "signal._HANDLER") -> Iterator[None]:
    before = [signal.signal(signum, handler) for signum in signums]
    try:
        yield
    finally:
        for signum, old in zip(signums, before, strict=True):
            signal.signal(signum, old)


def _heeded() -> list[signal.Signals]:
    """Return the terminating signals that are not ignored: what `nohup` or uninterrupted() ignores stays so."""
    return [signum for signum in _TERMINATING if signal.getsignal(signum) != signal.SIG_IGN]


def _program(name: str) -> tuple[str, ...]:
    script = Path(sysconfig.get_path("scripts")) / name
    # Without the installed script, its entry point in this repository is called as the script would.
    return (str(script),) if script.exists() else (sys.executable, "-c", f"from {name}.cli import main; main()")


def _run(argv: Sequence[str]) -> int:
    """Run the command to its end and return its exit code; raise Terminated if a signal asked us to end it."""
    started: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        for process in started:
            process.terminate()

    # The signal is passed on instead of raised: raised while the command is being started, it would lose its process.
    with _handling(_heeded(), pass_on):
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        started.append(process)
        if received:
            process.terminate()
        exit_code = _wait(process)
    if received:
        raise Terminated(received[0])
    return exit_code


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The terminal sends Ctrl-C to the command as well: it is left to end in its own way.
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
