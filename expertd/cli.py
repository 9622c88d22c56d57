"""The `expertd` command: arguments, and what a user reads. Everything else is elsewhere and imported when needed."""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertd.errors import ExpertdError
from expertd.progress import progress_bar
from expertd.store_commands import STORE, inspect, naming, quantize, verify
from expertd.view_commands import connect, doctor, status, top
from protocol.errors import ProtocolError
from protocol.version import LIBRARY_VERSION

if TYPE_CHECKING:
    from expertd.admin import LoadOutcome
    from expertd.budget import MemoryWish
    from expertd.config import DaemonConfig, StoreConfig
    from protocol.control_client import ControlClient
    from protocol.messages import StoreStatus

MEMORY = click.option(
    "--memory", help="What a store may take of this machine's memory, as 8GiB [default: what there is]."
)
PIN = click.option(
    "--pin",
    type=click.Path(path_type=Path),
    help="A trace of `runner trace`: what it chose most stays in memory where not all experts can.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(LIBRARY_VERSION, prog_name="expertd")
def cli() -> None:
    """Keep one copy of a model's quantized experts in memory, for every runner on this machine."""


@cli.command()
@click.argument("stores", nargs=-1, type=click.Path(path_type=Path))
@click.option("--foreground", is_flag=True, help="Stay in this terminal; log to standard error.")
@click.option("--config", type=click.Path(path_type=Path), default=None, help="Settings [default: the user's own].")
@click.option(
    "--idle-timeout", type=click.FloatRange(0, 1e9), default=None, help="End after so many seconds unused; 0: never."
)
@MEMORY
@PIN
@click.option("--ready-fd", type=int, default=None, hidden=True)
@click.option("--take-over", is_flag=True, hidden=True)
def start(
    stores: tuple[Path, ...],
    *,
    foreground: bool,
    config: Path | None,
    idle_timeout: float | None,
    memory: str | None,
    pin: Path | None,
    ready_fd: int | None,
    take_over: bool,
) -> None:
    """Start the daemon if none runs, and load STORES into it."""
    from expertd.config import load_config, my_runtime_dir
    from expertd.store import read_manifest

    _check_idle_timeout(idle_timeout)
    settings = load_config(config)  # a mistake in it is said here, not in a log
    wishes = {store: _memory_wish(settings.of_store(store), memory, pin) for store in stores}
    if foreground:
        _start_in_foreground(wishes, settings, idle_timeout, ready_fd, takes_over=take_over)
        return
    from expertd.admin import start_in_background

    arguments = _daemon_arguments(config, idle_timeout)
    for store in stores:
        with naming(store):
            read_manifest(store)
    started = start_in_background(my_runtime_dir(), arguments)
    with started.client as client:
        word = "started" if started.was_started else "already running"
        click.echo(f"expertd: {word}, pid {client.welcome.pid}", err=True)
        if not started.was_started and arguments:
            click.echo("expertd: its settings stay as they are; stop it first to change them", err=True)
        for store in stores:
            _load(client, store, wishes[store])


@cli.command()
@STORE
@MEMORY
@PIN
def load(store: Path, *, memory: str | None, pin: Path | None) -> None:
    """Load STORE into the running daemon."""
    from expertd.config import load_config

    wish = _memory_wish(load_config(None).of_store(store), memory, pin)
    with connect() as client:
        _load(client, store, wish)


@cli.command()
@click.argument("store")
def unload(store: str) -> None:
    """Let STORE go: a path, or the beginning of a digest. Runners that use it keep it until they end."""
    from expertd.admin import resolve_store
    from protocol.messages import Unload, Unloaded

    with connect() as client:
        held = resolve_store(client, store)
        client.ask(Unload(held.digest), Unloaded)
        click.echo(f"expertd: unloaded {held.path}", err=True)
        if held.n_sessions:
            click.echo(f"expertd: {held.n_sessions} runner(s) still map it; its memory is free when they end", err=True)


@cli.command()
def stop() -> None:
    """Stop the daemon. Runners go on with what they map."""
    from expertd.admin import stop_daemon

    with connect() as client:
        pid = client.welcome.pid
        if not stop_daemon(client, within_s=15.0):
            raise ExpertdError(f"expertd (pid {pid}) does not end; `kill -9 {pid}` if it must")
    click.echo(f"expertd: stopped, pid {pid}", err=True)


@cli.command()
@click.option("--config", type=click.Path(path_type=Path), default=None, help="Settings [default: the user's own].")
@click.option(
    "--idle-timeout", type=click.FloatRange(0, 1e9), default=None, help="End after so many seconds unused; 0: never."
)
def restart(config: Path | None, idle_timeout: float | None) -> None:
    """Put a new daemon in the place of the one that runs, with its stores; runners go on and attach to it."""
    from expertd.admin import restart_daemon
    from expertd.config import my_runtime_dir
    from protocol.messages import GetStatus, Status

    arguments = _daemon_arguments(config, idle_timeout)
    with connect() as client:
        old_pid = client.welcome.pid
    with restart_daemon(my_runtime_dir(), arguments, old_pid) as client:
        stores = client.ask(GetStatus(), Status).stores
        click.echo(f"expertd: restarted, pid {client.welcome.pid} in place of {old_pid}", err=True)
    for store in stores:
        click.echo(f"expertd: {store.path} is {store.state}: {store.nbytes / 1e9:.2f} GB", err=True)


for command in (quantize, verify, inspect, status, top, doctor):
    cli.add_command(command)


def main() -> None:
    """Run the command. One line for every foreseen failure, and the exit code: 1, 2 for usage, 130 for Ctrl-C."""
    _fill_standard_descriptors()
    try:
        _arm_fault_point()
        sys.exit(cli.main(standalone_mode=False))
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("expertd: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader has left. What Python would still flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ExpertdError, ProtocolError) as error:
        click.echo(f"expertd: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"expertd: {error.filename or 'output'}: {error.strerror}", err=True)
        sys.exit(1)


def _arm_fault_point() -> None:
    from expertd.config import fault_point
    from protocol.fault_points import arm

    arm(fault_point())


def _fill_standard_descriptors() -> None:
    """Leave none of 0, 1 and 2 free: a file or socket opened later would be taken for a terminal."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(fd, True)  # noqa: FBT003 - it takes no keyword
    os.close(fd)


def _check_idle_timeout(idle_timeout_s: float | None) -> None:
    if idle_timeout_s is not None and not math.isfinite(idle_timeout_s):
        raise click.UsageError(f"--idle-timeout: a number of seconds was expected, {idle_timeout_s} came")


def _daemon_arguments(config: Path | None, idle_timeout_s: float | None) -> list[str]:
    """Return the options of a daemon in the background; a mistake is said here, not in its log."""
    from expertd.config import load_config

    _check_idle_timeout(idle_timeout_s)
    load_config(config)
    arguments = ["--config", str(config.absolute())] if config else []
    return arguments + (["--idle-timeout", str(idle_timeout_s)] if idle_timeout_s is not None else [])


def _memory_wish(settings: "StoreConfig", memory: str | None, pin: Path | None) -> "MemoryWish":
    """Return how much of a store is to be in memory: as the flags say, else as its settings do."""
    from expertd.budget import MemoryWish
    from expertd.profile import most_chosen
    from protocol.quantities import nbytes_of, what_a_size_is
    from protocol.schema import PINNED_KEYS_MAX

    nbytes = settings.memory_nbytes if memory is None else nbytes_of(memory)
    if memory is not None and not nbytes:
        raise click.UsageError(f"--memory: {what_a_size_is()}, {memory!r:.40} came")
    profile = pin or settings.pin
    return MemoryWish(nbytes, most_chosen(profile, PINNED_KEYS_MAX) if profile else ())


def _start_in_foreground(
    wishes: "dict[Path, MemoryWish]",
    config: "DaemonConfig",
    idle_timeout_s: float | None,
    ready_fd: int | None,
    *,
    takes_over: bool,
) -> None:
    from expertd.config import my_runtime_dir, take_manager_environment
    from expertd.daemon import StoreOrder, run_daemon
    from expertd.lifecycle import ReadyPipe
    from expertd.store import path_problem, read_manifest
    from expertd.systemd import ManagerEnvironment, ServiceManager

    said = take_manager_environment()
    # With somebody else waiting for its word, it is no service: what stands there is meant for a parent.
    manager = ServiceManager(said if ready_fd is None else ManagerEnvironment())
    if idle_timeout_s is not None:
        config = replace(config, idle_timeout_s=idle_timeout_s)
    orders = []
    for store, wish in wishes.items():
        with naming(store):
            orders.append(StoreOrder(store.absolute(), read_manifest(store).digest, wish))
    for order in orders:
        problem = path_problem(str(order.path))
        if problem:
            raise ExpertdError(f"{order.path}: {problem}")
    run_daemon(config, my_runtime_dir(), orders, ReadyPipe(ready_fd), manager, takes_over=takes_over)


def _load(client: "ControlClient", store: Path, wish: "MemoryWish") -> None:
    from expertd.admin import load_store

    with naming(store), progress_bar("loading") as on_progress:
        outcome = load_store(client, store, wish, on_progress)
    click.echo(f"expertd: {_loaded_line(store, outcome)}", err=True)
    for key in outcome.status.corrupt:
        click.echo(f"expertd: {key} is corrupt and is not served; see `expertd verify {store}`", err=True)


def _loaded_line(store: Path, outcome: "LoadOutcome") -> str:
    held = outcome.status
    if held.n_slots:
        return _tiered_line(store, held)
    if outcome.was_held:
        return f"{store} is in memory already: {held.nbytes / 1e9:.2f} GB; it stays until `expertd stop`"
    rate = held.nbytes / max(held.load_s, 1e-9) / 1e9
    return (
        f"{store} is in memory: {held.nbytes / 1e9:.2f} GB, loaded in {held.load_s:.2f} s ({rate:.2f} GB/s); "
        "it stays until `expertd stop`"
    )


def _tiered_line(store: Path, held: "StoreStatus") -> str:
    """Say what of a store is in memory, and what that means."""
    n_others = held.n_experts - held.n_pinned
    pinned = f" and {held.n_pinned} pinned experts" if held.n_pinned else ""
    return (
        f"{store} takes {held.nbytes / 1e9:.2f} GB of memory, less than it has: dense weights{pinned} stay there, "
        f"{held.n_slots} slots of {held.slot_nbytes / 1e6:.1f} MB are for the other {n_others} experts, which are read "
        "from disk when they are needed; more --memory makes it faster"
    )
