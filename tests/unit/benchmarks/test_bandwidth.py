import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bandwidth import STREAMS, BandwidthMeter
from benchmarks.compiled import compiled
from benchmarks.errors import CompileFailed
from benchmarks.our_roof import RangeReader

SOURCE = Path(__file__).parents[3] / "benchmarks" / "csrc" / "read_bandwidth.c"

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture
def library(tmp_path: Path) -> ctypes.CDLL:
    library = compiled(SOURCE, tmp_path)
    library.read_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.read_memory.restype = ctypes.c_uint64
    library.read_nbytes.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.read_nbytes.restype = ctypes.c_size_t
    return library


@needs_compiler
@pytest.mark.parametrize("n_streams", STREAMS)
def test_the_loop_reads_every_byte_it_counts_once(library: ctypes.CDLL, n_streams: int) -> None:
    nbytes = 1 << 20
    words = np.random.default_rng(0).integers(0, 1 << 64, size=nbytes // 8, dtype=np.uint64)
    n_read = library.read_nbytes(nbytes, n_streams)

    total = library.read_memory(words.ctypes.data, nbytes, n_streams)

    assert n_read > 0.9 * nbytes
    assert total == int(words[: n_read // 8].sum())


@needs_compiler
def test_the_meter_returns_gigabytes_a_second(tmp_path: Path) -> None:
    meter = BandwidthMeter(memoryview(bytearray(4 << 20)), tmp_path)

    assert 0.01 < meter.best_gb_per_s(2) < 10_000


@needs_compiler
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_the_shares_of_all_threads_are_a_range_but_for_its_end(tmp_path: Path, n_threads: int) -> None:
    ranges = [np.random.default_rng(n).integers(0, 1 << 64, size=n, dtype=np.uint64) for n in (64 * 12, 64 * 12 + 5)]

    total = RangeReader(tmp_path, n_threads).read([memoryview(words).cast("B") for words in ranges])  # type: ignore[arg-type]

    # 6 KiB, which 2, 4 and 6 streams of whole turns of 256 bytes are; 40 bytes are not.
    assert total == int(sum(int(words[: 64 * 12].sum()) for words in ranges)) % (1 << 64)


@needs_compiler
def test_a_source_is_compiled_once(tmp_path: Path) -> None:
    compiled(SOURCE, tmp_path)
    (library,) = tmp_path.iterdir()
    before = library.stat().st_mtime_ns

    compiled(SOURCE, tmp_path)

    assert library.stat().st_mtime_ns == before


def test_without_a_compiler_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")

    with pytest.raises(CompileFailed, match="no C compiler was found: install one"):
        compiled(SOURCE, tmp_path)


@needs_compiler
def test_a_source_that_is_no_c_leaves_nothing_but_the_complaint(tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text("int main(")

    with pytest.raises(CompileFailed, match=r"wrong\.c: .* refused it"):
        compiled(source, tmp_path / "libraries")

    assert list((tmp_path / "libraries").iterdir()) == []
