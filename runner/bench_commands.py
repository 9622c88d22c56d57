"""The commands `runner bench` and `runner bench ablation`: their flags and what they print where. Measures nothing.

`runner bench` without a further word is `runner bench speed`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.config import RunnerConfig
from runner.devices import CPU, choose_device
from runner.devices.link_speed import LINK_PREFIX, parse_link
from runner.engine_command import engine_options, opened, print_json, read_settings
from runner.texts import read_text

if TYPE_CHECKING:
    from runner.ablation import Ablation, AblationPlan
    from runner.engine import Engine
    from runner.models.opening import CachePlan

# runner.ablation's, which imports torch.
ROW_NAMES = ("resident", "full", "no prefetch", "no cache", "naive")

_COUNT = click.IntRange(0, 1 << 20)
_SEED = click.IntRange(0, (1 << 63) - 1)


class _Bench(click.Group):
    """A group whose command `speed` need not be named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["speed", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Bench)
def bench() -> None:
    """Measure speed (if nothing else is said), or what each part of an expert cache is worth."""


@bench.command()
@engine_options
@click.option("--prompt-tokens", type=_COUNT, default=128, show_default=True, help="Prefill so many; 0: no prefill.")
@click.option("--context-tokens", type=_COUNT, default=512, show_default=True, help="Decode behind so many.")
@click.option("--decode-tokens", type=_COUNT, default=32, show_default=True, help="Decode so many; 0: no decode.")
@click.option("--runs", type=click.IntRange(1, 1000), default=3, show_default=True, help="Measure so many times.")
@click.option("--seed", "bench_seed", type=_SEED, default=0, help="Where tokens start.")
@click.option("--kernels", metavar="NAME", help="Compute with vnni, avx2 or portable kernels; the fastest if not set.")
def speed(
    store_dir: Path,
    *,
    as_json: bool,
    prompt_tokens: int,
    context_tokens: int,
    decode_tokens: int,
    runs: int,
    bench_seed: int,
    kernels: str | None,
    **flags: object,
) -> None:
    """Measure prefill and decode in tokens per second, on random tokens; the store needs no tokenizer."""
    if not prompt_tokens and not decode_tokens:
        raise click.UsageError("--prompt-tokens and --decode-tokens are both 0: there is nothing to measure")
    settings = read_settings(flags)

    with opened(store_dir, settings) as (engine, _):
        from quant.library import use_kernels
        from runner.bench import BenchPlan
        from runner.bench import bench as bench_of
        from runner.report import bench_figures, bench_lines

        if kernels is not None:
            use_kernels(kernels)
        measured = bench_of(engine, BenchPlan(prompt_tokens, context_tokens, decode_tokens, runs, bench_seed))
    if as_json:
        print_json(bench_figures(measured))
    else:
        for line in bench_lines(measured):
            click.echo(line)


@bench.command()
@engine_options
@click.option(
    "--text", "text_file", type=click.Path(path_type=Path), help="Compute a file in UTF-8, not random tokens."
)
@click.option("--routing", "trace_file", type=click.Path(path_type=Path), help="Choose experts as this trace does.")
@click.option("--recall", type=click.FloatRange(0, 1), help="How often guesses are right, with --routing. [default: 1]")
@click.option(
    "--naive-to-compute",
    type=click.FloatRange(1.01, 1e4),
    help="Take the link's speed at which the naive way takes so many times what computing alone does.",
)
@click.option(
    "--row", "row_names", multiple=True, type=click.Choice(ROW_NAMES), help="Measure this one; all if not set."
)
@click.option("--context-tokens", type=click.IntRange(1, 1 << 20), default=64, show_default=True, help="Decode behind.")
@click.option("--decode-tokens", type=click.IntRange(1, 1 << 20), default=64, show_default=True, help="Decode so many.")
@click.option("--runs", type=click.IntRange(1, 1000), default=3, show_default=True, help="Measure so many times.")
@click.option("--seed", "bench_seed", type=_SEED, default=0, help="Where random numbers start.")
def ablation(
    store_dir: Path,
    *,
    as_json: bool,
    text_file: Path | None,
    trace_file: Path | None,
    recall: float | None,
    naive_to_compute: float | None,
    row_names: tuple[str, ...],
    context_tokens: int,
    decode_tokens: int,
    runs: int,
    bench_seed: int,
    **flags: object,
) -> None:
    """Measure the expert cache whole, without prefetching, without keeping anything, and the naive way."""
    settings = read_settings(flags)
    if recall is not None and trace_file is None:
        raise click.UsageError("--recall: only with --routing; without it the guesses are the gates' own")
    if naive_to_compute is not None and not settings.device.startswith(LINK_PREFIX):
        raise click.UsageError(f"--naive-to-compute: only with --device link:SPEED, not {settings.device}")
    text = None if text_file is None else read_text(text_file)

    from runner.ablation import ROWS, AblationPlan
    from runner.traces.reader import read_trace

    plan = AblationPlan(
        context_tokens=context_tokens,
        decode_tokens=decode_tokens,
        runs=runs,
        seed=bench_seed,
        trace=None if trace_file is None else read_trace(trace_file),
        recall=1.0 if recall is None else recall,
        rows=tuple(row for row in ROWS if not row_names or row.value in row_names),
    )
    if text is not None:
        with opened(store_dir, settings) as (engine, _):
            plan = replace(plan, token_ids=engine.tokenizer.encode(text, add_special_tokens=False)[: plan.n_tokens])
    measured = _measure(store_dir, settings, plan, naive_to_compute)

    from runner.ablation_report import ablation_figures, ablation_lines

    if as_json:
        print_json(ablation_figures(measured))
    else:
        for line in ablation_lines(measured):
            click.echo(line)


def _measure(
    store_dir: Path, settings: RunnerConfig, plan: "AblationPlan", naive_to_compute: float | None
) -> "Ablation":
    from runner.ablation import NO_SLOTS, measure_ablation, measure_compute_s, naive_speed

    if choose_device(settings.device) == CPU:
        raise NO_SLOTS

    @contextmanager
    def opened_as(settings: RunnerConfig, cache_plan: "CachePlan") -> Iterator["Engine"]:
        with opened(store_dir, settings, cache_plan) as (engine, _):
            yield engine

    if naive_to_compute is not None:
        with opened(store_dir, settings) as (engine, _):
            manifest = engine.store.manifest
        compute_s = measure_compute_s(opened_as, settings, plan)
        settings = replace(settings, device=naive_speed(manifest, compute_s, naive_to_compute))
    return measure_ablation(
        opened_as,
        settings,
        plan,
        bytes_per_s=parse_link(settings.device).bytes_per_s if settings.device.startswith(LINK_PREFIX) else None,
        on_run=lambda row: click.echo(f"measuring: {row.value}", err=True),
    )
