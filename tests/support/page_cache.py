"""What of a file lies in the page cache: the second copy that nobody should pay for."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def cached_nbytes(path: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    nbytes = path.stat().st_size
    residence = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    with path.open("rb") as file:
        address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    result = _libc.mincore(address, nbytes, residence)
    _libc.munmap(address, nbytes)
    assert result == 0
    return sum(page & 1 for page in residence) * mmap.PAGESIZE


def drop_cached(path: Path) -> None:
    """Empty the page cache of a file; skip the test where a file lives nowhere else."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_nbytes(path) > path.stat().st_size // 2:
        pytest.skip("this file system keeps its files in memory")
