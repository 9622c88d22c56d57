"""The command `runner compare`: its flags, and what is printed where.

Nothing heavy is imported before the command line has been found right.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.engine_command import opened, print_json, read_settings
from runner.progress import shown_progress
from runner.texts import read_text

if TYPE_CHECKING:
    from runner.comparison import WindowDifference

_STORE = click.Path(path_type=Path)


@click.command()
@click.argument("reference", metavar="STORE_A", type=_STORE)
@click.argument("other", metavar="STORE_B", type=_STORE)
@click.option("--text", "text_file", type=click.Path(path_type=Path), required=True, help="A text file in UTF-8.")
@click.option("--tokens", type=click.IntRange(min=2), help="Take this many tokens of the text; all if not given.")
@click.option("--window", type=click.IntRange(2, 1 << 20), default=512, show_default=True, help="Tokens per window.")
@click.option("--threads", type=int, help="How many threads compute; one per physical core if not set.")
@click.option("--exact", is_flag=True, default=None, help="Compute with 32-bit floats throughout; slower.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def compare(
    reference: Path,
    other: Path,
    *,
    text_file: Path,
    tokens: int | None,
    window: int,
    as_json: bool,
    **flags: object,
) -> None:
    """Measure how far STORE_B's predictions of a text are from STORE_A's, the reference: two stores of one model.

    Both stores are in memory at the same time; computed is on the CPU.
    """
    settings = read_settings(flags | {"context": window, "device": "cpu"})
    text = read_text(text_file)

    with opened(reference, settings) as (reference_engine, _), opened(other, settings) as (other_engine, _):
        from runner.comparison import common_tokens, compare_windows, summarize
        from runner.report import comparison_figures, comparison_lines

        token_ids = common_tokens(reference_engine, other_engine, text)[:tokens]
        windows = compare_windows(reference_engine, other_engine, token_ids, window)
        comparison = summarize(_shown(windows, len(token_ids)))
    if as_json:
        print_json(comparison_figures(comparison, window=window))
    else:
        for line in comparison_lines(comparison):
            click.echo(line)


def _shown(windows: Iterator["WindowDifference"], n_tokens: int) -> Iterator["WindowDifference"]:
    return shown_progress(windows, "comparing", n_tokens, lambda window: window.reference.n_tokens + 1)
