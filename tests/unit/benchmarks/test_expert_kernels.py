import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.errors import NothingToMeasure
from benchmarks.expert_kernels import BATCHES, measure_kernels
from benchmarks.settings import Settings
from quant.library import kernels_in_use
from tools.geometry import GEOMETRIES, MIXTRAL_8X7B

SMALL = replace(GEOMETRIES[MIXTRAL_8X7B], hidden=128, intermediate=192)

# Takes the time of writing its output; in a format of 64 bytes a matrix.
PROTOTYPE = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
size_t mat_bytes(int fmt, int rows, int cols) { return 64; }
void fill_random(int fmt, char *out, int rows, int cols, uint64_t seed) { memset(out, (int)seed, 64); }
void expert(int up, int down, const char *w1, const char *w3, const char *w2, int hidden, int inner, const float *x,
            int n, float *y, int threads) { memset(y, 0, sizeof(float) * n * hidden); }
"""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def test_every_batch_has_its_time_beside_the_bandwidth(tmp_path: Path) -> None:
    settings = Settings(tmp_path, rounds=2, threads=1, schemes=("3bit-g64",))

    figures = measure_kernels(settings, SMALL, segment_nbytes=1 << 20)

    named = {figure.name: figure for figure in figures}
    ours = f"ours ({kernels_in_use()})"
    assert all(f"3bit-g64, 1 thread(s), batch {batch}: {ours}, an expert" in named for batch in BATCHES)
    assert "3bit-g64, 1 thread(s): read bandwidth, best" in named
    assert all(len(figure.samples) == 2 for figure in figures)


def test_another_implementation_is_measured_in_the_same_rounds(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text(PROTOTYPE)
    settings = Settings(
        tmp_path, rounds=2, threads=1, schemes=("4bit-g64",), kernels=("portable",), prototype=tmp_path / "other.c"
    )
    before = kernels_in_use()

    figures = measure_kernels(settings, SMALL, segment_nbytes=1 << 20)

    (ratio,) = [figure for figure in figures if figure.name.endswith("batch 1: time ours (portable) / prototype")]
    assert len(ratio.samples) == 2
    assert all(sample > 1 for sample in ratio.samples)
    assert kernels_in_use() == before


def test_kernels_that_this_machine_does_not_have_are_not_measured(tmp_path: Path) -> None:
    settings = Settings(tmp_path, rounds=1, threads=1, schemes=("4bit-g64",), kernels=("portable", "abacus"))
    before = kernels_in_use()

    with pytest.raises(NothingToMeasure, match="abacus: this machine or this build has none"):
        measure_kernels(settings, SMALL, segment_nbytes=1 << 20)

    assert kernels_in_use() == before
