"""The demo's model end to end, ours and llama.cpp's: one checkpoint, in our store and as GGUF with experts of 4 bits.

llama.cpp takes the faster of Q4_0 and Q4_1 and of its settings, for each figure. The model's own source was stored in
Q4_1: as Q4_1 GGUF it loses next to nothing, which no other format of 4 bits can equal.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.big_files import ROOT, make_room, run_tool, sources_key
from benchmarks.errors import CommandFailed, NothingToMeasure
from benchmarks.figures import Figure, ratios
from benchmarks.layers import our_speed
from benchmarks.peer import LlamaBench, Speed, SpeedPlan, measure_perplexity
from benchmarks.processes import Environment
from benchmarks.settings import Settings

TYPES = ("Q4_0", "Q4_1")

_WINDOW = 512
_N_WINDOWS = 4
_GGUF_NBYTES = 500_000_000
_CHECKPOINT_NBYTES = 1_460_000_000
_GGUF_SOURCES = ("tools/geometry.py", "tools/gguf_file", "tools/demo_checkpoint")


def measure_demo(environment: Environment, settings: Settings) -> list[Figure]:
    """Return tokens a second and perplexity of both, and the ratios; raise BenchmarkError."""
    if settings.store is None or settings.llama_bench is None:
        raise NothingToMeasure("demo: the demo's store and llama-bench are needed")
    models = demo_ggufs(settings)
    plan = SpeedPlan(threads=settings.threads, runs=settings.runs)
    bench = LlamaBench(settings.llama_bench)
    ours: list[Speed] = []
    theirs: dict[str, list[Speed]] = {}
    with environment.daemon(settings.store):
        for _ in range(settings.rounds):
            ours.append(our_speed(environment, settings.store, plan))
            for name, model in models.items():
                for setting, speed in enumerate(bench.speeds(model, plan)):
                    theirs.setdefault(f"{name}, setting {setting}", []).append(speed)
        figures = list(_speed_figures(ours, theirs, plan))
        if settings.text is not None:
            figures += _perplexities(environment, settings.store, settings.text)
    if settings.text is not None:
        figures += _their_perplexities(settings.llama_bench, models, settings.text)
    return figures


def demo_ggufs(settings: Settings) -> dict[str, Path]:
    """Return the demo's checkpoint as a GGUF of each type, made if need be; raise BenchmarkError."""
    key = sources_key(_GGUF_SOURCES)
    paths = {name: settings.folder / f"demo-{name}-{key}.gguf" for name in TYPES}
    missing = {name: path for name, path in paths.items() if not path.is_file()}
    if not missing:
        return paths
    checkpoint = settings.demo_checkpoint or settings.folder / f"demo-checkpoint-{key}"
    stale = [old for old in settings.folder.glob("demo-*") if old not in {*paths.values(), checkpoint}]
    own_nbytes = 0 if checkpoint.is_dir() else _CHECKPOINT_NBYTES
    make_room(next(iter(missing.values())), len(missing) * _GGUF_NBYTES + own_nbytes, stale)
    if not checkpoint.is_dir():
        source = [] if settings.demo_source is None else ["--gguf", str(settings.demo_source)]
        run_tool("tools.demo_checkpoint", str(checkpoint), *source)
    for name, path in missing.items():
        run_tool("tools.gguf_file", "checkpoint", str(checkpoint), str(path), "--experts-type", name)
    if settings.demo_checkpoint is None:
        shutil.rmtree(checkpoint)
    return paths


def _speed_figures(ours: list[Speed], theirs: dict[str, list[Speed]], plan: SpeedPlan) -> Iterator[Figure]:
    measured = {
        f"decode behind {plan.context_tokens} tokens": (
            [speed.decode for speed in ours],
            {name: [speed.decode for speed in speeds] for name, speeds in theirs.items()},
        ),
        f"prefill of {plan.prompt_tokens} tokens": (
            [speed.prefill for speed in ours],
            {name: [speed.prefill for speed in speeds] for name, speeds in theirs.items()},
        ),
    }
    for what, (mine, others) in measured.items():
        yield Figure(f"demo model, {what}: ours", "tok/s", tuple(mine))
        for name, values in others.items():
            yield Figure(f"demo model, {what}: llama.cpp {name}", "tok/s", tuple(values))
        fastest = max(others.values(), key=median)
        yield Figure(f"demo model, {what}: ours / fastest llama.cpp", "", ratios(mine, fastest))


def _perplexities(environment: Environment, store: Path, text: Path) -> list[Figure]:
    command = [sys.executable, "-m", "benchmarks.second_halves", str(store), str(text), str(_N_WINDOWS), str(_WINDOW)]
    done = subprocess.run(command, cwd=ROOT, env=environment.variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandFailed(f"perplexity: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return [Figure(f"{_perplexity_name()}: ours", "", (float(done.stdout),))]


def _their_perplexities(llama_bench: Path, models: dict[str, Path], text: Path) -> Iterator[Figure]:
    for name, model in models.items():
        value = measure_perplexity(llama_bench, model, text, n_chunks=_N_WINDOWS, window=_WINDOW)
        if value is not None:
            yield Figure(f"{_perplexity_name()}: llama.cpp {name}", "", (value,))


def _perplexity_name() -> str:
    return f"demo model, perplexity of the second halves of {_N_WINDOWS} windows of {_WINDOW}"
