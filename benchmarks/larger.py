"""A model larger than memory, ours beside llama.cpp's mmap: the same weights, the same tokens, the same kind of limit.

Each program is first measured without a limit, ours with the slots that it will have. What it then holds beside the
model's weights (its own memory, and a little for what differs from run to run, alike for both), its dense weights and
half the bytes of its experts are the limit of its control group; on our side daemon and runner share one. Every run
starts with nothing of the model in the page cache. Rounds interleave the programs. Perplexities beside each other show
that both computed one model on one text.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.big_files import ROOT, same_weights
from benchmarks.confined import MemoryGroup, memory_group
from benchmarks.demo import demo_ggufs
from benchmarks.errors import CommandFailed, NothingToMeasure
from benchmarks.figures import Figure, ratios
from benchmarks.peer import LLAMA_PERPLEXITY
from benchmarks.peer_decode import Decoded, decode_with_llama, read_nbytes
from benchmarks.processes import Environment
from benchmarks.settings import Settings
from expertd.store import read_manifest

N_TOKENS = 64
N_LAYERS = 4
SHARE = 0.5
MARGIN_NBYTES = 16 << 20
# The part of a text that llama-perplexity is given: it tokenizes all of it, and wants twice the window.
_TEXT_NBYTES = 16 * N_TOKENS


@dataclass(frozen=True, slots=True)
class Model:
    """One model on both sides. `is_byte_a_token`: it has no tokenizer but that."""

    name: str
    store: Path
    gguf: Path
    is_byte_a_token: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What a program may take: the whole limit, and what of it is for the model."""

    limit_nbytes: int
    weights_nbytes: int


@dataclass(slots=True)
class Runs:
    """What one program did in every round."""

    room: Room
    decoded: list[Decoded] = field(default_factory=list)
    most_nbytes: list[int] = field(default_factory=list)
    n_kills: int = 0

    def add(self, decoded: Decoded, group: MemoryGroup) -> None:
        """Take one run, and what its group says."""
        self.decoded.append(decoded)
        self.most_nbytes.append(group.most_nbytes)
        self.n_kills += group.n_kills

    @property
    def tokens_per_s(self) -> list[float]:
        """The speed of every round."""
        return [N_TOKENS / decoded.elapsed_s for decoded in self.decoded]


def measure_larger_demo(environment: Environment, settings: Settings) -> list[Figure]:
    """Return both programs' figures with the demo's model; raise BenchmarkError."""
    if settings.store is None or settings.llama_bench is None:
        raise NothingToMeasure("larger-demo: the demo's store and llama-bench are needed")
    gguf = demo_ggufs(settings)["Q4_0"]
    return _measure(environment, settings, Model("demo model", settings.store, gguf, is_byte_a_token=False))


def measure_larger_layers(environment: Environment, settings: Settings) -> list[Figure]:
    """Return both programs' figures with layers of Mixtral-8x7B's size; raise BenchmarkError."""
    store, gguf = same_weights(settings.folder, N_LAYERS)
    model = Model(f"{N_LAYERS} layers of Mixtral-8x7B's size", store, gguf, is_byte_a_token=True)
    return _measure(environment, settings, model)


def _measure(environment: Environment, settings: Settings, model: Model) -> list[Figure]:
    if settings.llama_bench is None or not settings.llama_bench.with_name(LLAMA_PERPLEXITY).exists():
        raise NothingToMeasure(f"larger: {LLAMA_PERPLEXITY} beside llama-bench is needed")
    comparison = _Comparison(
        environment, model, _excerpt(settings), settings.llama_bench.with_name(LLAMA_PERPLEXITY), settings.threads
    )
    theirs, ours = Runs(comparison.their_room()), Runs(comparison.our_room())
    for _ in range(settings.rounds):
        comparison.run_theirs(theirs)
        comparison.run_ours(ours)
    return [*_figures(model, ours, "ours"), *_figures(model, theirs, "llama.cpp"), _ratio(model, ours, theirs)]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Both programs on one model and text."""

    environment: Environment
    model: Model
    text: Path
    llama: Path
    threads: int

    def their_room(self) -> Room:
        """Measure llama.cpp with room for everything; return what it gets for the rounds."""
        with memory_group("resident") as group:
            self._their_decode(group)
            own_nbytes = group.own_nbytes
        whole, experts = self.model.gguf.stat().st_size, _gguf_experts_nbytes(self.model.gguf)
        weights = int(whole - (1 - SHARE) * experts)
        return Room(own_nbytes + MARGIN_NBYTES + weights, weights)

    def our_room(self) -> Room:
        """Measure daemon and runner with their slots and no limit; return what they get for the rounds."""
        manifest = read_manifest(self.model.store)
        dense = sum(record.nbytes for record in manifest.dense.values())
        weights = int(dense + SHARE * sum(record.nbytes for record in manifest.experts.values()))
        with memory_group("resident") as group, self._daemon(group, "--memory", str(weights)):
            group.forget_most()  # of what loading took meanwhile
            with self._our_decode(group):
                own_nbytes = group.own_nbytes
        return Room(own_nbytes + MARGIN_NBYTES + weights, weights)

    def run_theirs(self, runs: Runs) -> None:
        """Run llama.cpp in its limit."""
        with memory_group("theirs") as group:
            group.limit(runs.room.limit_nbytes)
            runs.add(self._their_decode(group), group)

    def run_ours(self, runs: Runs) -> None:
        """Run daemon and runner together in theirs.

        The limit is set when the daemon has taken its part: it would keep more for its runners than this one needs.
        """
        arguments = ("--memory", str(runs.room.weights_nbytes))
        with memory_group("ours") as group, self._daemon(group, *arguments):
            group.limit(runs.room.limit_nbytes)
            with self._our_decode(group) as decoded:
                runs.add(decoded, group)

    def _their_decode(self, group: MemoryGroup) -> Decoded:
        _forget_cached([self.model.gguf])
        return decode_with_llama(
            self.llama, self.model.gguf, self.text, n_tokens=N_TOKENS, threads=self.threads, confined=group.command
        )

    @contextmanager
    def _daemon(self, group: MemoryGroup, *arguments: str) -> Iterator[None]:
        _forget_cached(self.model.store.iterdir())
        with self.environment.daemon(self.model.store, *arguments, confined=group.command):
            yield

    @contextmanager
    def _our_decode(self, group: MemoryGroup) -> Iterator[Decoded]:
        """Yield what the runner did, which has its memory until the `with` ends."""
        tokens = "bytes" if self.model.is_byte_a_token else "tokenizer"
        arguments = [str(self.model.store), str(self.text), str(N_TOKENS), str(self.threads), tokens]
        command = group.command([sys.executable, "-m", "benchmarks.our_decode", *arguments])
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=ROOT, env=self.environment.variables, stdin=pipe, stdout=pipe, text=True
        ) as process:
            if process.stdin is None or process.stdout is None or process.stdout.readline() != "ready\n":
                raise CommandFailed("larger: our runner failed")
            pids = [process.pid, json.loads(self.environment.expertd("status", "--json"))["pid"]]
            before = sum(map(read_nbytes, pids))
            process.stdin.write("go\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise CommandFailed("larger: our runner failed while it decoded")
            found = json.loads(line)
            print(f"ours: {found}", file=sys.stderr)
            yield Decoded(found["elapsed_s"], sum(map(read_nbytes, pids)) - before, found["perplexity"])
            process.stdin.close()


def _figures(model: Model, runs: Runs, who: str) -> Iterator[Figure]:
    name = f"{model.name}, {who}"
    read_mb = tuple(decoded.read_nbytes / N_TOKENS / 1e6 for decoded in runs.decoded)
    yield Figure(f"{name}: decode of {N_TOKENS} tokens", "tok/s", tuple(runs.tokens_per_s))
    yield Figure(f"{name}: read from disk a token", "MB", read_mb)
    yield Figure(f"{name}: memory limit", "MB", (runs.room.limit_nbytes / 1e6,))
    yield Figure(f"{name}: of it for weights", "MB", (runs.room.weights_nbytes / 1e6,))
    yield Figure(f"{name}: most memory used", "MB", tuple(nbytes / 1e6 for nbytes in runs.most_nbytes))
    yield Figure(f"{name}: processes killed for memory", "", (float(runs.n_kills),))
    yield Figure(f"{name}: perplexity", "", tuple(decoded.perplexity for decoded in runs.decoded))


def _ratio(model: Model, ours: Runs, theirs: Runs) -> Figure:
    return Figure(f"{model.name}: tok/s ours / llama.cpp", "", ratios(ours.tokens_per_s, theirs.tokens_per_s))


def _excerpt(settings: Settings) -> Path:
    """Write the beginning of the text, words with one space between them, and return its path."""
    words = (settings.text or ROOT / "LICENSE").read_text(encoding="utf-8")[: 4 * _TEXT_NBYTES].split()
    path = settings.folder / "larger.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(words).encode("ascii", "ignore").decode()[:_TEXT_NBYTES], encoding="ascii")
    return path


def _gguf_experts_nbytes(path: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors if "_exps" in tensor.name)


def _forget_cached(files: "Iterator[Path] | list[Path]") -> None:
    """Have the kernel drop what it holds of these files."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
