"""Our side of `roof`: tokens decoded, and what they read of the store read with nothing to compute, in turn.

Run as a module, on a store that a daemon holds: the store, the folder for the compiled loop, threads, tokens of
context, tokens a round, rounds, and the kernels, if not the fastest. Prints JSON. Both are in one process and follow
each other within a second, since on a shared machine the memory is faster in one second than in another.
"""

import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import runner
from benchmarks.compiled import compiled
from protocol.handles import ExpertKey
from quant.library import use_kernels
from runner.engine import Engine

_SOURCE = Path(__file__).parent / "csrc" / "read_bandwidth.c"


@dataclass(slots=True)
class Roof:
    """Seconds a token, a sample a round; `nbytes` is what one reads of the store."""

    nbytes: int
    read_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    outside_s: list[float] = field(default_factory=list)  # of decode_s: all but matrix products


class RangeReader:
    """Reads ranges of memory with the C loop, every thread its share of each. One thread calls it."""

    def __init__(self, folder: Path, n_threads: int) -> None:
        """Raise CompileFailed."""
        self._n_threads = n_threads
        self._read = compiled(_SOURCE, folder).read_shares
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]
        self._read.restype = ctypes.c_uint64

    def read(self, ranges: Sequence[memoryview]) -> int:
        """Read all of them once; return the sum of their 64-bit words, but for the end of each."""
        addresses = (ctypes.c_void_p * len(ranges))(*(_address(view) for view in ranges))
        nbytes = (ctypes.c_size_t * len(ranges))(*(view.nbytes for view in ranges))
        with ThreadPoolExecutor(self._n_threads) as pool:
            shares = [
                pool.submit(self._read, addresses, nbytes, len(ranges), share, self._n_threads)
                for share in range(self._n_threads)
            ]
            return sum(int(share.result()) for share in shares) % (1 << 64)


class Decoding:
    """An engine behind a context of random tokens, and what its tokens read."""

    def __init__(self, engine: Engine, *, context_tokens: int, n_tokens: int, seed: int = 0) -> None:
        self._engine, self._context_tokens, self._n_tokens = engine, context_tokens, n_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._sequence = engine.new_sequence(context_tokens + n_tokens)
        self._sequence.append(self._token_ids(context_tokens))
        engine.step([self._sequence])

    def ranges(self) -> Iterator[memoryview]:
        """What a token reads: of each layer the dense weights and experts drawn uniformly; then the head."""
        store, config = self._engine.store, self._engine.config
        dense = [name for name in store.manifest.dense if name != "embed_tokens"]  # of which it reads one row
        for layer in range(config.n_layers):
            yield from (store.dense_record(name) for name in dense if name.startswith(f"layers.{layer}."))
            for expert in torch.randperm(config.n_experts, generator=self._generator)[: config.top_k].tolist():
                yield store.expert_record(ExpertKey(layer, expert))
        yield from (store.dense_record(name) for name in dense if not name.startswith("layers."))

    def decode(self) -> tuple[float, float]:
        """Return the seconds of a token, the middle one, and how many of them are outside of products."""
        taken = []
        with self._engine.awake():
            for token_id in self._token_ids(self._n_tokens):
                self._sequence.append([token_id])
                started, products_before_s = perf_counter(), self._engine.products_s
                self._engine.step([self._sequence])
                elapsed_s = perf_counter() - started
                taken.append((elapsed_s, elapsed_s - (self._engine.products_s - products_before_s)))
        self._sequence.kv_cache.length = self._context_tokens
        return median(elapsed_s for elapsed_s, _ in taken), median(outside_s for _, outside_s in taken)

    def _token_ids(self, n_tokens: int) -> list[int]:
        vocab_size = self._engine.config.vocab_size
        ids: list[int] = torch.randint(vocab_size, (n_tokens,), generator=self._generator).tolist()
        return ids


def measure(decoding: Decoding, reader: RangeReader, *, n_tokens: int, rounds: int) -> Roof:
    """Return what each round read and decoded; one round more comes first, to warm up."""
    roof = Roof(sum(view.nbytes for view in decoding.ranges()))
    for _ in range(1 + rounds):
        read_s = []
        for _ in range(n_tokens):
            ranges = list(decoding.ranges())
            started = perf_counter()
            reader.read(ranges)
            read_s.append(perf_counter() - started)
        decode_s, outside_s = decoding.decode()
        roof.read_s.append(median(read_s))
        roof.decode_s.append(decode_s)
        roof.outside_s.append(outside_s)
    return Roof(roof.nbytes, roof.read_s[1:], roof.decode_s[1:], roof.outside_s[1:])


def main(arguments: Sequence[str]) -> None:
    """Measure and say what came of it."""
    store, folder, *numbers = arguments[:6]
    threads, context_tokens, n_tokens, rounds = map(int, numbers)
    for kernels in arguments[6:]:
        use_kernels(kernels)
    torch.set_num_threads(1)
    with runner.open_engine(store, autostart=False, threads=threads) as engine:
        decoding = Decoding(engine, context_tokens=context_tokens, n_tokens=n_tokens)
        roof = measure(decoding, RangeReader(Path(folder), threads), n_tokens=n_tokens, rounds=rounds)
    print(json.dumps(asdict(roof)))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


if __name__ == "__main__":
    main(sys.argv[1:])
