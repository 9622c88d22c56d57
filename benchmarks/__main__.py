"""`make bench`: run the measurements on a store, print a table, write JSON with machine, commit and command."""

import json
import os
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.daemon import measure_attach, measure_load, measure_start
from benchmarks.figures import Figure, table
from benchmarks.generation import measure_generation, measure_perplexity
from benchmarks.machine import describe_machine
from benchmarks.processes import Environment
from benchmarks.sharing import measure_sharing
from tools.demo.cache import cache_folder


@click.command()
@click.option("--store", type=click.Path(path_type=Path), default=None, help="[default: the store of `make demo`]")
@click.option(
    "--text", type=click.Path(path_type=Path), default=None, help="A text for perplexity; left out if not given."
)
@click.option("--runs", type=click.IntRange(1), default=5, help="How often each thing is done.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Where the JSON goes.")
def main(store: Path | None, text: Path | None, runs: int, out: Path | None) -> None:
    """Measure expertd and runner on STORE, in a runtime directory of their own."""
    store = store or _demo_store()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as runtime_dir:
        Path(runtime_dir).chmod(0o700)
        environment = Environment(Path(runtime_dir) / "run")
        for measure in (measure_start, measure_load, measure_attach, measure_sharing, measure_generation):
            click.echo(f"{measure.__module__}.{measure.__name__} …", err=True)
            figures += measure(environment, store.absolute(), runs)
        if text is not None:
            figures += measure_perplexity(environment, store.absolute(), text.absolute())
    machine = describe_machine()
    click.echo(f"{machine.summary}\ncommit {machine.commit}\n")
    click.echo(table(figures))
    if out is not None:
        document = {
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
            "machine": machine.as_json(),
            "figures": [figure.as_json() for figure in figures],
        }
        out.write_text(json.dumps(document, indent=1))


def _demo_store() -> Path:
    stores = sorted(cache_folder(os.environ, Path.home()).glob("store-*/manifest.json"))
    if not stores:
        raise click.UsageError("there is no demo store yet: `make demo` makes one, or name another with --store")
    return stores[-1].parent


main(prog_name="python -m benchmarks")
