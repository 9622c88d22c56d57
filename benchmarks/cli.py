"""The command `python -m benchmarks NAME`, which `make bench` runs. Owns flags, printed tables, JSON and exit codes."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.bandwidth import measure_bandwidth
from benchmarks.cache import measure_cache
from benchmarks.demo import measure_demo
from benchmarks.errors import BenchmarkError
from benchmarks.expert_kernels import measure_kernels
from benchmarks.figures import Figure, table
from benchmarks.full import measure_full
from benchmarks.larger import measure_larger_demo, measure_larger_layers
from benchmarks.layers import measure_layers
from benchmarks.machine import Machine, describe_machine
from benchmarks.peer import LLAMA_BENCH, find_llama_bench
from benchmarks.processes import Environment
from benchmarks.quality import measure_quality, quality_table
from benchmarks.quantizing import measure_conversion, measure_solver
from benchmarks.requests import measure_requests
from benchmarks.roof import measure_roof
from benchmarks.settings import Settings
from benchmarks.several import measure_several
from benchmarks.slots import measure_slots
from benchmarks.store import measure_store
from benchmarks.tiered import measure_tiered, measure_tiered_disk
from quant.errors import StaleLibrary
from tools.demo.cache import cache_folder

Measure = Callable[[Environment, Settings], list[Figure]]

# In the order in which `all` runs them; what is not in it takes long or much room and runs only when named.
BENCHMARKS: dict[str, Measure] = {
    "bandwidth": lambda _, settings: measure_bandwidth(settings),
    "kernels": lambda _, settings: measure_kernels(settings),
    "layers": measure_layers,
    "demo": measure_demo,
    "several": measure_several,
    "store": measure_store,
    "cache": lambda _, settings: measure_cache(settings),
    "requests": measure_requests,
    "slots": measure_slots,
}
ON_REQUEST: dict[str, Measure] = {
    "full": measure_full,
    "larger-demo": measure_larger_demo,
    "larger-layers": measure_larger_layers,
    "solver": lambda _, settings: measure_solver(settings),
    "conversion": measure_conversion,
    "quality": measure_quality,
    "roof": measure_roof,
    "tiered": measure_tiered,
    "tiered-disk": measure_tiered_disk,
}
# Benchmarks whose figures make more than a list.
TABLES: dict[str, Callable[[list[Figure]], str]] = {"quality": quality_table}

_NEEDS_STORE = ("demo", "several", "store", "cache")
_NEEDS_PEER = ("demo",)
_SCHEMES, _TIERS = Settings(Path()).schemes, Settings(Path()).tiers

_NAMES = (*BENCHMARKS, *ON_REQUEST)
_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("names", type=click.Choice(["all", *_NAMES]), nargs=-1)
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="How often all is measured.")
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True, help="Of a program, in one round.")
@click.option("--threads", type=click.IntRange(1, 64), default=2, show_default=True, help="The most threads, of both.")
@click.option("--scheme", "schemes", type=click.Choice(_SCHEMES), multiple=True, help="Only these; all if not given.")
@click.option(
    "--store", type=_PATH, help="The store for demo, several, store and cache; that of `make demo` if not given."
)
@click.option("--text", type=_PATH, help="A text in UTF-8 for perplexity, which is left out without it.")
@click.option("--llama-bench", type=_PATH, help="llama.cpp's program; the one on PATH if not given.")
@click.option("--prototype", type=_PATH, help="Another implementation's C file, for kernels; left out without it.")
@click.option(
    "--kernels", multiple=True, help="Of ours for `kernels`, `layers`, `roof`, as vnni or avx2; else the fastest."
)
@click.option("--demo-checkpoint", type=_PATH, help="The demo's checkpoint, if there is one; built if not given.")
@click.option("--demo-source", type=_PATH, help="The GGUF that it is built from; downloaded (93 MB) if not given.")
@click.option("--checkpoint", type=_PATH, help="Any Mixtral checkpoint, for quality.")
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True, help="Of the text, for quality.")
@click.option("--tier", "tiers", type=click.Choice(_TIERS), multiple=True, help="Only these stores, for tiered.")
@click.option("--out", type=_PATH, help="Where the JSON goes.")
def cli(
    names: tuple[str, ...],
    *,
    rounds: int,
    runs: int,
    threads: int,
    schemes: tuple[str, ...],
    kernels: tuple[str, ...],
    tokens: int,
    tiers: tuple[str, ...],
    out: Path | None,
    **paths: Path | None,
) -> None:
    """Measure what NAMES say, or `all` of the first five rows; the rest runs only when named.

    \b
    bandwidth  how fast memory is read        kernels  one expert of Mixtral's size
    layers     a layer, beside llama.cpp      demo     the demo's model, beside llama.cpp
    several    runners at the same time       store    daemon, sharing, first token
    cache      what an expert cache costs     requests  the daemon's answers, beside an echo
    slots      experts from disk to slots
    full       a whole Mixtral-8x7B of 2 and 3 bits: writes 36 GB
    larger-demo    the demo's model in half of its memory, beside llama.cpp: takes root
    larger-layers  likewise, layers of Mixtral's size: writes 6.5 GB
    solver     one matrix, beside hqq         conversion  full-size matrices, whole
    quality    the paper's table of a checkpoint
    roof       a token beside reading its weights only
    tiered     stores larger than their memory, where reading takes as long as computing
    tiered-disk  the same with the disk as it is
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise click.UsageError(f"--out: {out.absolute().parent} is no folder")
    try:
        settings = _settings(rounds, threads, schemes, kernels, paths)
        settings = replace(settings, tokens=tokens, runs=runs, tiers=tiers or _TIERS)
        machine = describe_machine()
    except (BenchmarkError, StaleLibrary) as error:
        _complain(error)
        sys.exit(1)
    chosen = _chosen(names, settings)
    figures = _measure(chosen, settings)
    _report(machine, figures, out)
    sys.exit(len(figures) < len(chosen))


def _settings(
    rounds: int, threads: int, schemes: tuple[str, ...], kernels: tuple[str, ...], paths: dict[str, Path | None]
) -> Settings:
    demo_folder = cache_folder(os.environ, Path.home())
    given = {name: path and path.absolute() for name, path in paths.items()}
    return Settings(
        folder=demo_folder.parent / "bench",
        rounds=rounds,
        threads=threads,
        store=given["store"] or _newest_demo_store(demo_folder),
        text=given["text"],
        llama_bench=find_llama_bench(given["llama_bench"]),
        prototype=given["prototype"],
        schemes=schemes or _SCHEMES,
        kernels=kernels,
        demo_checkpoint=given["demo_checkpoint"],
        demo_source=given["demo_source"],
        checkpoint=given["checkpoint"],
    )


def _chosen(names: Sequence[str], settings: Settings) -> list[str]:
    """Return what to measure: what was named; for `all`, or nothing, what there is all for, saying what is left out."""
    if names and "all" not in names:
        return list(dict.fromkeys(names))
    chosen = []
    for name in BENCHMARKS:
        if name in _NEEDS_STORE and settings.store is None:
            click.echo(f"{name} is left out: there is no demo store; `make demo` makes one", err=True)
        elif name in _NEEDS_PEER and settings.llama_bench is None:
            click.echo(
                f"{name} is left out: {LLAMA_BENCH} is not on PATH; docs/performance.md says how to get it", err=True
            )
        else:
            chosen.append(name)
    if settings.llama_bench is None and "layers" in chosen:
        click.echo(f"layers is measured without llama.cpp: no {LLAMA_BENCH} on PATH", err=True)
    return chosen + [name for name in ON_REQUEST if name in names]


def _measure(names: Sequence[str], settings: Settings) -> dict[str, list[Figure]]:
    """Return the figures of all that succeed; of what does not, say why."""
    figures = {}
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as runtime_dir:
        Path(runtime_dir).chmod(0o700)
        environment = Environment(Path(runtime_dir) / "run")
        for name in names:
            click.echo(f"{name} …", err=True)
            try:
                figures[name] = (BENCHMARKS | ON_REQUEST)[name](environment, settings)
            except BenchmarkError as error:
                # The others may have taken hours, or will.
                _complain(error)
    return figures


def _complain(error: Exception) -> None:
    click.echo(f"benchmarks: {error}", err=True)


def _report(machine: Machine, figures: dict[str, list[Figure]], out: Path | None) -> None:
    click.echo(f"{machine.summary}\ncommit {machine.commit}")
    for name, measured in figures.items():
        click.echo(f"\n{name}\n\n{table(measured)}")
        if name in TABLES:
            click.echo(f"\n{TABLES[name](measured)}")
    if out is not None:
        document = {
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
            "machine": machine.as_json(),
            "figures": {name: [figure.as_json() for figure in measured] for name, measured in figures.items()},
        }
        out.write_text(json.dumps(document, indent=1))


def _newest_demo_store(folder: Path) -> Path | None:
    manifests = sorted(folder.glob("store-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return manifests[-1].parent if manifests else None
