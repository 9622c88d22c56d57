"""Ways to write into a segment that a client has a descriptor of, for tests that find all of them closed."""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
_MADV_REMOVE = 9
_PAGE_NBYTES = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def reopen_and_write(fd: int) -> None:
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        os.pwrite(writable, b"x", 0)
    finally:
        os.close(writable)


def change_mode_and_write(fd: int) -> None:
    os.fchmod(fd, 0o777)
    reopen_and_write(fd)


def map_writable(fd: int) -> None:
    mmap.mmap(fd, _PAGE_NBYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()


def map_reopened_writable(fd: int) -> None:
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        map_writable(writable)
    finally:
        os.close(writable)


def punch_hole(fd: int) -> None:
    _check(_libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, 0, _PAGE_NBYTES), "fallocate")


def protect_writable(fd: int) -> None:
    address = _mapped_read_only(fd)
    _check(_libc.mprotect(address, _PAGE_NBYTES, mmap.PROT_READ | mmap.PROT_WRITE), "mprotect")


def remove_pages(fd: int) -> None:
    _check(_libc.madvise(_mapped_read_only(fd), _PAGE_NBYTES, _MADV_REMOVE), "madvise")


def copy_into(fd: int) -> None:
    """Have the kernel copy another file's bytes into it."""
    source = os.memfd_create("source")
    try:
        os.write(source, b"x")
        os.sendfile(fd, source, 0, 1)
    finally:
        os.close(source)


WRITE_ROUTES: dict[str, Callable[[int], object]] = {
    "pwrite": lambda fd: os.pwrite(fd, b"x", 0),
    "sendfile": copy_into,
    "ftruncate": lambda fd: os.ftruncate(fd, 1),
    "truncate of a re-open": lambda fd: os.truncate(f"/proc/self/fd/{fd}", 1),
    "growing a re-open": lambda fd: os.truncate(f"/proc/self/fd/{fd}", 1 << 40),
    "write through a re-open": reopen_and_write,
    "writable mapping": map_writable,
    "writable mapping of a re-open": map_reopened_writable,
    "mprotect": protect_writable,
    "fallocate": punch_hole,
    "madvise": remove_pages,
    "seals": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
    "mode": change_mode_and_write,
}


def _mapped_read_only(fd: int) -> int:
    """Return the address of a mapping of the first page, which is left to the end of the process."""
    address = _libc.mmap(None, _PAGE_NBYTES, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return int(address)


def _check(result: int, name: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), name)
