"""The C library as tests use it past its doors: which kernels compute."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from quant.errors import KernelsMissing
from quant.library import kernels_in_use, library, use_kernels

# All that there are; which of them a machine has is another matter.
KERNELS = ("portable", "avx2", "vnni")

needs_library = pytest.mark.skipif(library() is None, reason="the C library was not built")


def loaded_library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def has_kernels(name: str) -> bool:
    """Whether the library can compute with these kernels here."""
    try:
        with kernels(name):
            return True
    except KernelsMissing:
        return False


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Compute with these kernels inside, with those in use before afterwards."""
    before = kernels_in_use()
    use_kernels(name)
    try:
        yield
    finally:
        assert before is not None
        use_kernels(before)


def by_all_kernels(compute: Callable[[], Tensor]) -> list[Tensor]:
    """Return what each set of kernels of this machine computes, the portable ones first."""
    results = []
    for name in filter(has_kernels, KERNELS):
        with kernels(name):
            results.append(compute())
    return results


needs_avx2 = pytest.mark.skipif(not has_kernels("avx2"), reason="this machine has no AVX2: one set of kernels only")
