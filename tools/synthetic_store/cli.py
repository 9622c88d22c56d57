"""The command `python -m tools.synthetic_store OUT`. Owns flags and printed lines, nothing else."""

import sys
from pathlib import Path

import click

from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import ConvertError
from tools.geometry import chosen_geometry, geometry_options
from tools.synthetic_store.packed import SecondLevel
from tools.synthetic_store.store import SyntheticPlan, plan_synthetic_store, write_synthetic_store

_EXIT_INTERRUPTED = 130


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@geometry_options
@click.option("--experts-scheme", default="4bit-g64", show_default=True, help="As in configs/mixtral-8x7b-4bit.toml.")
@click.option("--attention", default="4bit-g64", show_default=True, help="Likewise.")
@click.option("--head", default="8bit-g64", show_default=True, help="Likewise.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Where the numbers start.")
@click.option("--for-gguf", is_flag=True, help="Weights that `tools.gguf_file store` can write exactly, for llama.cpp.")
@click.option("--force", is_flag=True, help="Replace a store that stands there.")
def main(
    out: Path,
    *,
    geometry_name: str,
    experts_scheme: str,
    attention: str,
    head: str,
    seed: int,
    for_gguf: bool,
    force: bool,
    **sizes: int | None,
) -> None:
    """Write a store of Mixtral's geometry with random weights to OUT, to measure with.

    It has no tokenizer: `runner bench` needs none. Its text would be noise.
    """
    try:
        schemes = QuantizeConfig(experts=experts_scheme, attention=attention, head=head)
        second_level = SecondLevel.GGUF if for_gguf else SecondLevel.FULL
        plan = plan_synthetic_store(chosen_geometry(geometry_name, sizes), schemes, second_level)
        _write(out, plan, seed, force=force)
    except ConvertError as error:
        click.echo(f"synthetic_store: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("synthetic_store: interrupted; nothing was kept", err=True)
        sys.exit(_EXIT_INTERRUPTED)


def _write(out: Path, plan: SyntheticPlan, seed: int, *, force: bool) -> None:
    click.echo(f"{out}: {plan.nbytes / 1e9:.2f} GB", err=True)
    total = sum(record.nbytes for record in plan.store.records)
    with click.progressbar(length=total, label="writing", file=sys.stderr) as bar:
        manifest = write_synthetic_store(out, plan, seed=seed, force=force, on_written=bar.update)
    click.echo(f"{out}: {len(manifest.experts)} experts, digest {manifest.digest[:12]}")
