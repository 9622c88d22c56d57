"""A command that computes: the options all of them have, and the engine they open. Knows no single command.

Nothing heavy is imported before the command line has been found right.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import click

from runner.config import RunnerConfig, load_config, with_options
from runner.devices import choose_device
from runner.errors import ConfigInvalid

if TYPE_CHECKING:
    from runner.engine import Engine
    from runner.generate import Startup
    from runner.models.opening import CachePlan

_Command = TypeVar("_Command", bound=Callable[..., None])


def engine_options(command: _Command) -> _Command:
    """Add the options that every command has that computes; an option not given is the file's or the default."""
    options = (
        click.option("--store", "store_dir", type=click.Path(path_type=Path), required=True, help="The store."),
        click.option("--device", metavar="DEVICE", help="Where to compute: auto, cpu, cuda, cuda:N, link:SPEED."),
        click.option("--threads", type=int, help="How many threads compute; one per physical core if not set."),
        click.option("--exact", is_flag=True, default=None, help="Compute with 32-bit floats throughout; slower."),
        click.option("--cache-experts", type=int, help="Experts of each layer that the device keeps."),
        click.option("--device-memory", metavar="SIZE", help="Memory to use on the device, as in 11GiB, instead."),
        click.option("--prefetch-depth", type=int, help="Foresee experts so many layers ahead; 0: not at all."),
        click.option("--prefetch-experts", type=int, help="How many experts of a layer are foreseen."),
        click.option("--pin", help="How experts reach a GPU: staged, or direct from the store's memory."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def read_settings(flags: dict[str, object]) -> RunnerConfig:
    """Return the options of the file with those of the command line before them."""
    config = load_config()
    try:
        return with_options(config, {name: value for name, value in flags.items() if value is not None})
    except ConfigInvalid as error:
        raise click.UsageError("--" + str(error).replace("_", "-")) from None


@contextmanager
def opened(
    store_dir: Path, settings: RunnerConfig, cache_plan: "CachePlan | None" = None
) -> Iterator[tuple["Engine", "Startup"]]:
    """Import what computes and open the store; yield the engine and what that took."""
    choose_device(settings.device)

    from time import monotonic

    with _interruption_held():
        from runner.engine import open_configured
        from runner.generate import Startup
    from runner.metrics import process_age_s

    imports_s = process_age_s()
    started = monotonic()
    with open_configured(store_dir, settings, cache_plan) as engine:
        attach_s = monotonic() - started - engine.dense_weights_s
        yield engine, Startup(imports_s=imports_s, attach_s=attach_s, dense_weights_s=engine.dense_weights_s)


def print_json(document: dict[str, object]) -> None:
    """Print one JSON object on stdout; a NaN among its numbers is our bug."""
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))


@contextmanager
def _interruption_held() -> Iterator[None]:
    """Raise KeyboardInterrupt behind the block if SIGINT came within: what torch runs at its import loses it.

    A second one ends the process at once; nothing is attached yet.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signals: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signals:
        raise KeyboardInterrupt
