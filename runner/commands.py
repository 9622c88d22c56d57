"""The commands of `runner`. Owns the flags and what is printed where; computes nothing.

stdout carries the text (or, with --json, one object), stderr all else. Nothing heavy is imported before the command
line has been found right.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from protocol.errors import FaultPointUnknown
from protocol.fault_points import arm
from protocol.version import LIBRARY_VERSION
from quant.errors import QuantError
from runner.bench_commands import bench
from runner.compare_command import compare
from runner.config import RunnerConfig, fault_point
from runner.engine_command import engine_options, opened, print_json, read_settings
from runner.errors import PromptInvalid, RunnerError
from runner.progress import shown_progress
from runner.texts import check_text, read_stdin, read_text
from runner.trace_commands import replay, trace

if TYPE_CHECKING:
    from runner.engine import Engine
    from runner.generate import Generation, Prompt, Startup
    from runner.perplexity import Score

EXIT_ERROR = 1
EXIT_USAGE = 2


def execute(arguments: list[str]) -> tuple[int, str | None]:
    """Run the command line; return its exit status and the line that says what went wrong, if anything did."""
    try:
        arm(fault_point())
        # Not cli.main(): that has its own ideas of a closed pipe and of an interruption.
        with cli.make_context("runner", arguments) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code, None
    except click.UsageError as error:
        return EXIT_USAGE, error.format_message()
    except (RunnerError, QuantError, FaultPointUnknown) as error:
        return EXIT_ERROR, str(error)
    return 0, None


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(LIBRARY_VERSION, prog_name="runner")
def cli() -> None:
    """Execute a model whose experts expertd holds in shared memory."""


cli.add_command(bench)
cli.add_command(compare)
cli.add_command(trace)
cli.add_command(replay)


@cli.command()
@engine_options
@click.option("--prompt", "text", help="The prompt; read from stdin if not given.")
@click.option("--system", help="A system message before the prompt.")
@click.option("--raw", "is_raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--context", type=int, help="The most tokens that prompt and answer have together.")
@click.option("--max-new-tokens", type=int, help="The most tokens of the answer.")
@click.option("--temperature", type=float, help="0 takes the most probable token each time.")
@click.option("--top-k", type=int, help="Draw from the k most probable tokens.")
@click.option("--top-p", type=float, help="Draw from the most probable tokens of this probability together.")
@click.option("--seed", type=int, help="Where the random numbers start.")
def generate(
    store_dir: Path,
    as_json: bool,
    text: str | None,
    system: str | None,
    is_raw: bool,
    **flags: object,
) -> None:
    """Answer a prompt; the text comes as it is generated."""
    settings = read_settings(flags)
    if is_raw and system is not None:
        raise click.UsageError("--system has no place without the chat template; leave out --raw or --system")
    for name, typed in (("--prompt", text), ("--system", system)):
        check_text(typed or "", name)
    if text is None:
        text = read_stdin()
    if not text:
        raise PromptInvalid("the prompt is empty")

    with opened(store_dir, settings) as (engine, startup):
        from runner.generate import Prompt

        _answer(engine, Prompt(text, system, is_raw), settings, startup, as_json=as_json)


@cli.command()
@engine_options
@click.option("--text", "text_file", type=click.Path(path_type=Path), required=True, help="A text file in UTF-8.")
@click.option("--tokens", type=click.IntRange(min=2), help="Take this many tokens of the text; all if not given.")
@click.option("--window", type=click.IntRange(2, 1 << 20), default=512, show_default=True, help="Tokens per window.")
def perplexity(
    store_dir: Path,
    as_json: bool,
    text_file: Path,
    tokens: int | None,
    window: int,
    **flags: object,
) -> None:
    """Measure how well the model predicts a text, in windows that are scored each by itself."""
    settings = read_settings(flags | {"context": window})
    text = read_text(text_file)

    from time import monotonic

    with opened(store_dir, settings) as (engine, _):
        from runner.perplexity import perplexity as perplexity_of
        from runner.perplexity import score_windows

        token_ids = engine.tokenizer.encode(text, add_special_tokens=False)[:tokens]
        started = monotonic()
        scores = list(_shown(score_windows(engine, token_ids, window), len(token_ids)))
        elapsed_s = monotonic() - started
    n_scored = sum(score.n_tokens for score in scores)
    value, tokens_per_s = perplexity_of(scores), n_scored / elapsed_s
    if as_json:
        from runner.report import perplexity_figures

        print_json(perplexity_figures(value, n_tokens_scored=n_scored, window=window, tokens_per_s=tokens_per_s))
    else:
        click.echo(f"perplexity {value:.4f} · {n_scored} tokens scored · {tokens_per_s:.1f} tok/s")


def _answer(engine: "Engine", prompt: "Prompt", settings: RunnerConfig, startup: "Startup", *, as_json: bool) -> None:
    """Generate and print; an interruption ends the answer where it is, and is passed on behind the report."""
    from runner.generate import Generation

    generation = Generation(engine, prompt, settings, startup)
    pieces: list[str] = []
    try:
        for piece in generation:
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
    except KeyboardInterrupt:
        _print_report(generation, "".join(pieces), as_json=as_json)
        raise
    except RunnerError:
        if pieces and not as_json:
            click.echo()
        raise
    _print_report(generation, "".join(pieces), as_json=as_json)


def _print_report(generation: "Generation", text: str, *, as_json: bool) -> None:
    from runner.report import report_figures, report_lines

    report = generation.report()
    if as_json:
        print_json({"text": text, "tokens": generation.token_ids} | report_figures(report))
        return
    click.echo()
    for line in report_lines(report):
        click.echo(line, err=True)


def _shown(scores: Iterator["Score"], n_tokens: int) -> Iterator["Score"]:
    return shown_progress(scores, "scoring", n_tokens, lambda score: score.n_tokens + 1)
