"""The command `python -m benchmarks.gpu`, which `make gpu` runs: every step in turn, then one JSON file.

Owns the folder that steps write to and the daemon that they start, and ends both.
"""

import getpass
import json
import platform
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import click

from benchmarks.errors import CommandFailed
from benchmarks.gpu.report import report_of
from benchmarks.gpu.running import OK, SKIPPED, Outcome, run_step
from benchmarks.gpu.steps import STEPS, Step
from benchmarks.machine import describe_machine
from benchmarks.processes import Environment
from runner.devices import why_no_gpu

_TRACE = Path("../shared/data/mixtral_8x7b_instruct_routing.txt")
_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--out", type=_PATH, default=Path("build/gpu.json"), show_default=True, help="Where the report goes.")
@click.option("--minutes", type=click.FloatRange(0.1, 60), default=10.0, show_default=True, help="What all may take.")
@click.option("--trace", type=_PATH, help="A recorded routing for the ablation; without one it is left out.")
@click.option("--work", type=_PATH, help="A folder with 4 GB to spare, for what is written meanwhile.")
def main(out: Path, minutes: float, trace: Path | None, work: Path | None) -> None:
    """Measure what this machine's first GPU makes of expertd, and write it to one JSON file."""
    reason = why_no_gpu(0)
    if reason is not None:
        click.echo(f"gpu: {reason}", err=True)
        sys.exit(1)
    trace = trace or (_TRACE if _TRACE.is_file() else None)
    with _working(work) as (work_dir, environment):
        outcomes = run_all(STEPS, work_dir, environment.variables, trace=trace, total_s=minutes * 60)
    report = report_of(describe_machine().as_json(), outcomes, own_names())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    click.echo(f"{out}: {sum(outcome.outcome == OK for outcome in outcomes.values())} of {len(outcomes)} steps are ok")


def run_all(
    steps: tuple[Step, ...], work_dir: Path, variables: Mapping[str, str], *, trace: Path | None, total_s: float
) -> dict[str, Outcome]:
    """Run the steps one after another, each to its limit, and none when the time for all is over."""
    ends_s = monotonic() + total_s
    outcomes: dict[str, Outcome] = {}
    for step in steps:
        left_s = ends_s - monotonic()
        if left_s <= 0:
            outcomes[step.name] = Outcome(SKIPPED, reason="the time for all steps was over")
            continue
        click.echo(f"{step.name} …", err=True)
        outcomes[step.name] = run_step(_command(step, work_dir, trace), min(step.limit_s, left_s), variables)
        click.echo(f"  {_summary(outcomes[step.name])}", err=True)
    return outcomes


def own_names() -> list[str]:
    """Return what would say whose machine this is: its names, the user's, and where the user's files lie."""
    names = [platform.node(), socket.gethostname(), str(Path.home()), str(Path.cwd())]
    names += [name.partition(".")[0] for name in names[:2]]
    with suppress(KeyError, OSError):
        names.append(getpass.getuser())
    return names


@contextmanager
def _working(work: Path | None) -> Iterator[tuple[Path, Environment]]:
    """Yield a folder that is gone afterwards, and an environment whose daemon is stopped then."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="expertd-gpu-", dir=work) as folder,
        # A socket's name has to be short, whatever folder was given.
        tempfile.TemporaryDirectory(prefix="expertd-") as runtime_dir,
    ):
        environment = Environment(Path(runtime_dir) / "run")
        try:
            yield Path(folder), environment
        finally:
            with suppress(CommandFailed):
                environment.expertd("stop")


def _command(step: Step, work_dir: Path, trace: Path | None) -> list[str]:
    named = [] if trace is None else ["--trace", str(trace)]
    return [sys.executable, "-m", "benchmarks.gpu.step", step.name, str(work_dir), *named]


def _summary(outcome: Outcome) -> str:
    reason = "" if outcome.reason is None else f": {outcome.reason}"
    return f"{outcome.outcome}, {outcome.took_s:.1f} s{reason}"
