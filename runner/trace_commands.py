"""The commands about routing: `runner trace` records it, `runner replay` asks what a cache would have made of it.

Owns their flags and what they print where; computes nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.engine_command import engine_options, opened, print_json, read_settings
from runner.errors import PromptInvalid
from runner.progress import shown_progress
from runner.texts import check_text, read_text
from runner.traces.plot import check_plot, write_png
from runner.traces.replay import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.engine import Engine
    from runner.traces.record import TokenRouting
    from runner.traces.tracing import Tracing

_WINDOW = 2048

# Those of the paper's figure, beside chance and what no policy can pass.
_TRACED_POLICIES = ("lru", "random", "belady")


@click.command()
@click.argument("trace_file", metavar="TRACE", type=click.Path(path_type=Path))
@click.option(
    "--policy", "policies", type=click.Choice(POLICIES), multiple=True, help="Replay this one; all if not set."
)
@click.option(
    "--cache-experts",
    type=click.IntRange(min=1),
    multiple=True,
    help="Slots per layer; may be repeated; all if not set.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def replay(trace_file: Path, *, policies: tuple[str, ...], cache_experts: tuple[int, ...], as_json: bool) -> None:
    """Print the hit ratios of caching policies on a recorded trace: its own format, or Mixtral-8x7B's as plain text."""
    from runner.traces.locality import measure_locality
    from runner.traces.reader import read_trace
    from runner.traces.report import locality_lines, trace_figures

    locality = measure_locality(read_trace(trace_file), policies or POLICIES, cache_experts)
    if as_json:
        print_json(trace_figures(locality))
    else:
        _print_lines(locality_lines(locality))


@click.command()
@engine_options
@click.option("--text", "text_file", type=click.Path(path_type=Path), help="Record the tokens of a file in UTF-8.")
@click.option("--tokens", type=click.IntRange(min=1), help="Take this many tokens of the text; all if not given.")
@click.option("--window", type=click.IntRange(1, 1 << 20), help="Tokens of it that are one sequence; 2048 if not set.")
@click.option("--prompt", help="Record a prompt, as prefill, and the most probable answer.")
@click.option("--raw", "is_raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--max-new-tokens", type=int, help="The most tokens of the answer.")
@click.option("--out", "trace_file", type=click.Path(path_type=Path), help="Write the trace to this file.")
@click.option("--plot", "png_file", type=click.Path(path_type=Path), help="Draw hit ratios and recall as a PNG.")
def trace(
    store_dir: Path,
    *,
    as_json: bool,
    text_file: Path | None,
    tokens: int | None,
    window: int | None,
    prompt: str | None,
    is_raw: bool,
    trace_file: Path | None,
    png_file: Path | None,
    **flags: object,
) -> None:
    """Record which experts a text or an answer chooses; print how local that is, and how well it can be foreseen."""
    for_text = {"--text": text_file, "--tokens": tokens, "--window": window}
    _check_choice(for_text, {"--prompt": prompt, "--raw": is_raw or None, "--max-new-tokens": flags["max_new_tokens"]})
    window = window or _WINDOW
    settings = read_settings(flags | {"context": window} if text_file is not None else flags)
    if png_file is not None:
        check_plot()
    text = _text(text_file, prompt)

    with opened(store_dir, settings) as (engine, _), _written_to(trace_file, engine) as on_token:
        from runner.traces.tracing import Tracing

        tracing = Tracing(engine, on_token)
        if text_file is not None:
            token_ids = engine.tokenizer.encode(text, add_special_tokens=False)[:tokens]
            windows = tracing.compute_text(token_ids, window)
            for _ in shown_progress(windows, "recording", len(token_ids), int):
                pass
        else:
            prompt_ids = engine.tokenizer.encode(text) if is_raw else engine.tokenizer.encode_chat(text)
            tracing.compute_answer(prompt_ids, settings.max_new_tokens)
    _report(tracing, png_file, as_json=as_json)


def _check_choice(for_text: Mapping[str, object], for_prompt: Mapping[str, object]) -> None:
    """Raise UsageError unless the first of one of them is set, and none of the other; None is not set."""
    given_text, given_prompt = (
        [name for name, value in options.items() if value is not None] for options in (for_text, for_prompt)
    )
    if ("--text" in given_text) == ("--prompt" in given_prompt):
        raise click.UsageError("exactly one of --text and --prompt is expected")
    chosen, others = ("--text", given_prompt) if "--text" in given_text else ("--prompt", given_text)
    if others:
        raise click.UsageError(f"{', '.join(others)}: without a meaning for {chosen}")


def _text(text_file: Path | None, prompt: str | None) -> str:
    """Return the text to compute; raise PromptInvalid."""
    if text_file is not None:
        return read_text(text_file)
    if not prompt:
        raise PromptInvalid("the prompt is empty")
    check_text(prompt, "--prompt")
    return prompt


@contextmanager
def _written_to(trace_file: Path | None, engine: "Engine") -> Iterator["Callable[[TokenRouting], None]"]:
    """Yield what takes the tokens: the writer of that file, if there is one."""
    from runner.traces.json_lines import TraceWriter
    from runner.traces.tracing import shape_of

    with nullcontext() if trace_file is None else trace_file.open("w", encoding="ascii") as file:
        yield (lambda _: None) if file is None else TraceWriter(file, shape_of(engine)).write


def _report(tracing: "Tracing", png_file: Path | None, *, as_json: bool) -> None:
    from runner.traces.locality import measure_locality
    from runner.traces.report import locality_lines, recall_lines, trace_figures

    locality, recalls = measure_locality(tracing.trace(), _TRACED_POLICIES), tracing.recalls()
    if png_file is not None:
        write_png(png_file, locality, recalls)
    if as_json:
        print_json(trace_figures(locality, recalls))
    else:
        _print_lines(locality_lines(locality) + recall_lines(locality, recalls))


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)
