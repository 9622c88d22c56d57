"""How fast this machine reads a sealed segment: the best of several streams a thread. The measure of every kernel."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from time import perf_counter

from benchmarks.compiled import compiled
from benchmarks.figures import Figure
from benchmarks.segments import sealed
from benchmarks.settings import Settings

STREAMS = (1, 2, 4, 8)

_SOURCE = Path(__file__).parent / "csrc" / "read_bandwidth.c"
_SEGMENT_NBYTES = 1 << 30
_ALIGNMENT = 4096


class BandwidthMeter:
    """Reads one buffer with the C loop. One thread calls it; the threads that read are its own."""

    def __init__(self, buffer: memoryview, folder: Path) -> None:
        """Take the buffer to read; raise CompileFailed."""
        library = compiled(_SOURCE, folder)
        self._read = library.read_memory
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._read.restype = ctypes.c_uint64
        self._read_nbytes = library.read_nbytes
        self._read_nbytes.argtypes = [ctypes.c_size_t, ctypes.c_int]
        self._read_nbytes.restype = ctypes.c_size_t
        self._buffer = buffer  # keeps the mapping
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))

    def gb_per_s(self, n_threads: int, n_streams: int) -> float:
        """Return how fast the threads together read the buffer once."""
        share = self._buffer.nbytes // n_threads // _ALIGNMENT * _ALIGNMENT
        with ThreadPoolExecutor(n_threads) as pool:
            barrier = Barrier(n_threads)
            list(pool.map(lambda _: barrier.wait(), range(n_threads)))  # all run before the clock does
            start = perf_counter()
            shares = [
                pool.submit(self._read, self._address + thread * share, share, n_streams) for thread in range(n_threads)
            ]
            for one in shares:
                one.result()
            elapsed_s = perf_counter() - start
        return float(n_threads * self._read_nbytes(share, n_streams) / elapsed_s / 1e9)

    def best_gb_per_s(self, n_threads: int) -> float:
        """Return the best over all numbers of streams."""
        return max(self.gb_per_s(n_threads, n_streams) for n_streams in STREAMS)


def measure_bandwidth(settings: Settings) -> list[Figure]:
    """Return the read bandwidth of 1 and 2 threads with 1, 2, 4 and 8 streams each, and the best of each round."""
    meter = BandwidthMeter(sealed(_SEGMENT_NBYTES, _fill), settings.folder)
    meter.best_gb_per_s(1)  # maps every page
    samples: dict[tuple[int, int], list[float]] = {}
    for _ in range(settings.rounds):
        for n_threads in settings.thread_counts:
            for n_streams in STREAMS:
                samples.setdefault((n_threads, n_streams), []).append(meter.gb_per_s(n_threads, n_streams))
    figures = [
        Figure(f"read, {_threads(n_threads)}, {n_streams} stream(s) each", "GB/s", tuple(values))
        for (n_threads, n_streams), values in samples.items()
    ]
    for n_threads in settings.thread_counts:
        rounds = zip(*(samples[n_threads, n_streams] for n_streams in STREAMS), strict=True)
        figures.append(Figure(f"read, {_threads(n_threads)}, best", "GB/s", tuple(max(values) for values in rounds)))
    return figures


def _threads(n_threads: int) -> str:
    return "1 thread" if n_threads == 1 else f"{n_threads} threads"


def _fill(view: memoryview) -> None:
    pattern = bytes(range(256)) * 4096
    for start in range(0, view.nbytes, len(pattern)):
        view[start : start + len(pattern)] = pattern
