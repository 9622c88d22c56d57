"""llama.cpp, measured by its own programs, llama-bench and llama-perplexity, at its fastest setting.

Where the build can repack weights for the processor, both ways are measured and each figure takes the faster one.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.errors import CommandFailed, NothingToMeasure

LLAMA_BENCH = "llama-bench"
LLAMA_PERPLEXITY = "llama-perplexity"

_PERPLEXITY = re.compile(r"Final estimate: PPL = ([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second: prefill into an empty context, decode behind a context."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """What is measured, on both sides alike."""

    prompt_tokens: int = 128
    context_tokens: int = 512
    decode_tokens: int = 32
    runs: int = 3
    threads: int = 2


class LlamaBench:
    """One build of llama-bench."""

    def __init__(self, program: Path) -> None:
        """Ask it what it can; raise CommandFailed."""
        self.program = program
        has_repack = "--repack" in _run([str(program), "--help"])
        self._variants = (("--repack", "0"), ("--repack", "1")) if has_repack else ((),)

    def speeds(self, model: Path, plan: SpeedPlan) -> tuple[Speed, ...]:
        """Return the speeds with each setting, always in the same order."""
        return tuple(
            Speed(
                self._median(model, plan, variant, ["-p", str(plan.prompt_tokens), "-n", "0"]),
                self._median(
                    model, plan, variant, ["-p", "0", "-n", str(plan.decode_tokens), "-d", str(plan.context_tokens)]
                ),
            )
            for variant in self._variants
        )

    def fastest(self, model: Path, plan: SpeedPlan) -> Speed:
        """Return the best of each over all settings."""
        speeds = self.speeds(model, plan)
        return Speed(max(speed.prefill for speed in speeds), max(speed.decode for speed in speeds))

    def _median(self, model: Path, plan: SpeedPlan, variant: tuple[str, ...], test: list[str]) -> float:
        common = ["-m", str(model), "-t", str(plan.threads), "-r", str(plan.runs), "-o", "json"]
        return read_speed(_run([str(self.program), *common, *variant, *test]))


def find_llama_bench(given: Path | None) -> Path | None:
    """Return the given program or the one on PATH; None if there is neither. Raise NothingToMeasure."""
    if given is not None:
        if not os.access(given, os.X_OK) or given.is_dir():
            raise NothingToMeasure(f"{given}: no program; --llama-bench takes the path of llama-bench")
        return given
    found = shutil.which(LLAMA_BENCH)
    return None if found is None else Path(found)


def read_speed(output: str) -> float:
    """Return the median tokens a second of the one test in llama-bench's JSON; raise CommandFailed."""
    try:
        (test,) = json.loads(output)
        return float(median(test["samples_ts"]))
    except (ValueError, TypeError, KeyError):
        raise CommandFailed(f"{LLAMA_BENCH}: one test with samples_ts was expected, {output[:80]!r} came") from None


def measure_perplexity(llama_bench: Path, model: Path, text: Path, *, n_chunks: int, window: int) -> float | None:
    """Return llama.cpp's perplexity of a text's beginning; None if llama-perplexity does not lie beside llama-bench.

    It scores the second half of each window.
    """
    program = llama_bench.with_name(LLAMA_PERPLEXITY)
    if not program.exists():
        return None
    arguments = ["-m", str(model), "-f", str(text), "-c", str(window), "-b", str(window), "--chunks", str(n_chunks)]
    found = _PERPLEXITY.search(_run([str(program), *arguments], with_stderr=True))
    if found is None:
        raise CommandFailed(f"{program}: it did not say a perplexity")
    return float(found[1])


def _run(command: list[str], *, with_stderr: bool = False) -> str:
    stderr = subprocess.STDOUT if with_stderr else subprocess.PIPE
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise CommandFailed(f"{command[0]}: ended with {done.returncode}: {said[-1]}")
    return done.stdout
