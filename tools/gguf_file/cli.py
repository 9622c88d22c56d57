"""The command `python -m tools.gguf_file`. Owns flags and printed lines, nothing else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertd.convert.errors import ConvertError
from expertd.errors import ExpertdError
from tools.geometry import chosen_geometry, geometry_options
from tools.gguf_file.errors import GgufFileError

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from tools.gguf_file.model import GgufTensor
    from tools.gguf_file.writing import Make

_K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K")


@click.group()
def cli() -> None:
    """Write GGUF files for llama.cpp, to measure beside our stores."""


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@geometry_options
@click.option("--experts-type", type=click.Choice(_K_QUANTS), default="Q4_K", show_default=True)
@click.option("--attention-type", type=click.Choice(_K_QUANTS), default="Q4_K", show_default=True)
@click.option("--head-type", type=click.Choice(_K_QUANTS), default="Q6_K", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Where the numbers start.")
def synthetic(
    out: Path,
    *,
    geometry_name: str,
    experts_type: str,
    attention_type: str,
    head_type: str,
    seed: int,
    **sizes: int | None,
) -> None:
    """Write random weights of Mixtral's geometry to OUT, without a tokenizer: llama-bench needs none."""
    _check_gguf()
    import numpy as np
    from gguf import GGMLQuantizationType

    from tools.gguf_file.model import TensorTypes, add_sizes, tensors
    from tools.gguf_file.random_blocks import random_tensor
    from tools.gguf_file.vocabulary import NO_VOCABULARY

    types = [GGMLQuantizationType[name] for name in (experts_type, attention_type, head_type, attention_type)]
    geometry = chosen_geometry(geometry_name, sizes)
    generator = np.random.Generator(np.random.SFC64(seed))

    def add_keys(writer: "GGUFWriter") -> None:
        add_sizes(writer, geometry)
        writer.add_tokenizer_model(NO_VOCABULARY)

    with _errors_told():
        listed = tensors(geometry, TensorTypes(*types))
        _write(out, listed, add_keys, lambda tensor: random_tensor(tensor, generator))


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--experts-type", type=click.Choice(["Q4_0", "Q4_1", "Q8_0"]), default="Q4_1", show_default=True)
def checkpoint(checkpoint: Path, out: Path, *, experts_type: str) -> None:
    """Write a Mixtral CHECKPOINT folder to OUT: experts as chosen, all other matrices in 8 bits, its tokenizer."""
    _check_gguf()
    from gguf import GGMLQuantizationType

    from expertd.convert.checkpoint import read_checkpoint
    from tools.gguf_file.checkpoint import CheckpointSource, checkpoint_types
    from tools.gguf_file.model import tensors

    with _errors_told():
        opened = read_checkpoint(checkpoint)
        source = CheckpointSource(opened)
        listed = tensors(source.geometry, checkpoint_types(GGMLQuantizationType[experts_type]))
        _write(out, listed, source.add_keys, source.tensor)


@cli.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def store(store: Path, out: Path) -> None:
    """Write the weights of a synthetic STORE to OUT, exactly, with a tokenizer that makes each byte a token."""
    _check_gguf()
    from tools.gguf_file.model import tensors
    from tools.gguf_file.store import open_store_source

    with _errors_told(), open_store_source(store) as source:
        _write(out, tensors(source.geometry, source.types), source.add_keys, source.tensor)


@contextmanager
def _errors_told() -> Iterator[None]:
    """End the program with one line for an error that its user can understand."""
    try:
        yield
    except (GgufFileError, ConvertError, ExpertdError) as error:
        click.echo(f"gguf_file: {error}", err=True)
        sys.exit(1)


def _write(out: Path, listed: "list[GgufTensor]", add_keys: "Callable[[GGUFWriter], None]", make: "Make") -> None:
    from tools.gguf_file.writing import gguf_nbytes, write_gguf

    total = gguf_nbytes(listed)
    click.echo(f"{out}: {total / 1e9:.2f} GB", err=True)
    with click.progressbar(length=total, label="writing", file=sys.stderr) as bar:
        write_gguf(out, listed, add_keys=add_keys, make=make, on_written=bar.update)
    click.echo(f"{out}: {len(listed)} tensors")


def _check_gguf() -> None:
    try:
        import gguf  # noqa: F401  # whether it is there is the question
    except ImportError:
        raise click.ClickException("the gguf package is needed: pip install 'expertd[demo]'") from None
