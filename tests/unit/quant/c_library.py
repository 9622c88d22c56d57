"""The C library as tests use it past its doors: which kernels compute."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from quant.library import library

needs_library = pytest.mark.skipif(library() is None, reason="the C library was not built")


def loaded_library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def kernels_name() -> str:
    """Return the name of the kernels in use."""
    function = loaded_library()["expertd_kernels_name"]  # an object of its own, unlike the attribute
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def has_kernels(name: str) -> bool:
    """Whether the library can compute with these kernels here."""
    if library() is None:
        return False
    with kernels(kernels_name()):
        return int(loaded_library().expertd_use_kernels(name.encode())) == 0


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Compute with these kernels inside, with those in use before afterwards."""
    before = kernels_name()
    assert loaded_library().expertd_use_kernels(name.encode()) == 0
    try:
        yield
    finally:
        loaded_library().expertd_use_kernels(before.encode())


def by_all_kernels(compute: Callable[[], Tensor]) -> list[Tensor]:
    """Return what each set of kernels of this machine computes."""
    results = []
    for name in filter(has_kernels, ("portable", "avx2")):
        with kernels(name):
            results.append(compute())
    return results


needs_avx2 = pytest.mark.skipif(not has_kernels("avx2"), reason="this machine has no AVX2: one set of kernels only")
