"""llama.cpp's side of `larger`: llama-perplexity over one window of a text, in batches of one token: decode.

Its own log says when it begins and ends, to the millisecond. Weights are mapped, not repacked: repacking makes a
private copy of them, which no limit below the model's size has room for. Nothing is read to warm up.
"""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import CommandFailed

_STAMP = r"^(\d+)\.(\d+)\.(\d+)\.(\d+) "
_BEGINS = re.compile(_STAMP + r".*calculating perplexity over 1 chunks")
_ENDS = re.compile(_STAMP + r".*seconds per pass")
_PERPLEXITY = re.compile(r"Final estimate: PPL = ([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one program did: seconds for all tokens, bytes read from disk meanwhile, perplexity of the second half."""

    elapsed_s: float
    read_nbytes: int
    perplexity: float


def decode_with_llama(
    program: Path, model: Path, text: Path, *, n_tokens: int, threads: int, confined: Callable[[list[str]], list[str]]
) -> Decoded:
    """Return what llama-perplexity does with the first n_tokens of a text of twice as many; raise CommandFailed."""
    command = [
        str(program), "-m", str(model), "-f", str(text), "-c", str(n_tokens), "-b", "1", "-ub", "1", "--chunks", "1",
        "-t", str(threads), "--no-repack", "--no-warmup", "--log-timestamps",
    ]  # fmt: skip
    pipe = subprocess.PIPE
    lines: list[str] = []
    moments: list[tuple[float, int]] = []
    with subprocess.Popen(
        confined(command), stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            found = _BEGINS.match(line) if not moments else _ENDS.match(line)
            if found and len(moments) < 2:
                moments.append((_seconds(found), read_nbytes(process.pid)))
    predicted = _PERPLEXITY.search("".join(lines))
    if process.returncode or len(moments) < 2 or predicted is None:
        said = (lines or ["no message"])[-1].strip()
        raise CommandFailed(f"{program}: ended with {process.returncode}: {said}")
    (began_s, read_before), (ended_s, read_after) = moments
    return Decoded(ended_s - began_s, read_after - read_before, float(predicted[1]))


def read_nbytes(pid: int) -> int:
    """Return what a process has had read from disks, by page faults too."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise CommandFailed(f"/proc/{pid}/io does not say read_bytes")


def _seconds(stamp: re.Match[str]) -> float:
    minutes, seconds, milliseconds, microseconds = (int(stamp[i]) for i in range(1, 5))
    return minutes * 60 + seconds + milliseconds / 1e3 + microseconds / 1e6
