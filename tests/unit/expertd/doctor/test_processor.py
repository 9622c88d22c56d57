"""What is said of processors, NUMA and GPUs; and the same kernels are named that compute."""

from pathlib import Path

import pytest

from expertd.doctor import readings
from expertd.doctor.findings import Level
from expertd.doctor.processor import (
    Gpus,
    check_gpu,
    check_kernels,
    check_numa,
    count_of_list,
    cpu_flags,
    kernels_name,
)
from quant.library import LIBRARY_FILE, kernels_in_use

AVX2 = {"sse", "avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl"}


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (AVX512 | {"avx512_vnni"}, "vnni"),
        (AVX512, "avx2"),
        (AVX2 | {"avx_vnni"}, "avx2"),
        (AVX2 - {"fma"}, "portable"),
        ({"asimd", "fp"}, "portable"),
    ],
)
def test_the_kernels_follow_from_the_features(flags: set[str], name: str) -> None:
    assert kernels_name(flags) == name


def test_the_kernels_named_are_those_that_compute_here() -> None:
    flags = cpu_flags(Path("/proc/cpuinfo").read_text())

    in_use = kernels_in_use()

    assert readings.LIBRARY_FILE == LIBRARY_FILE
    assert readings.has_c_library() == (in_use is not None)
    assert in_use in (None, kernels_name(flags))


@pytest.mark.parametrize(
    ("flags", "has_library", "level"),
    [
        (AVX512 | {"avx512_vnni"}, True, Level.OK),
        (AVX2, True, Level.OK),
        (set(), True, Level.NOTE),
        (AVX2, False, Level.NOTE),
    ],
)
def test_slow_kernels_are_noted(flags: set[str], level: Level, *, has_library: bool) -> None:
    assert check_kernels(flags, has_library=has_library).level is level


def test_a_feature_counts_only_if_every_processor_has_it() -> None:
    text = "processor\t: 0\nflags\t\t: sse avx2 fma\n\nprocessor\t: 1\nflags\t\t: sse avx2\n"

    assert cpu_flags(text) == {"sse", "avx2"}
    assert cpu_flags("processor : 0\n") == frozenset()


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-1\n", 2), ("0-1,3\n", 3), ("0,2-5", 5)])
def test_a_list_of_the_kernel_is_counted(text: str, count: int) -> None:
    assert count_of_list(text) == count


@pytest.mark.parametrize(("nodes", "level"), [(None, Level.OK), ("0\n", Level.OK), ("0-1\n", Level.NOTE)])
def test_several_numa_nodes_are_noted(nodes: str | None, level: Level) -> None:
    assert check_numa(nodes).level is level


@pytest.mark.parametrize(
    ("gpus", "level", "word"),
    [
        (Gpus(has_driver=True, lines=("RTX 4090, 24564 MiB, 580.1",)), Level.OK, "RTX 4090"),
        (Gpus(has_driver=True, lines=()), Level.NOTE, "no GPU can be asked"),
        (Gpus(has_driver=True, lines=None), Level.NOTE, "no GPU can be asked"),
        (Gpus(has_driver=False, lines=None), Level.OK, "none"),
    ],
)
def test_a_driver_without_a_gpu_is_noted_no_gpu_is_fine(gpus: Gpus, level: Level, word: str) -> None:
    finding = check_gpu(gpus)

    assert finding.level is level
    assert word in finding.found
